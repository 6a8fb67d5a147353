"""Segmentation's loss and scores, against literal forms."""

import math

import pytest
import torch
from helpers_segmentation import tiny
from helpers_unit import CPU, examples
from hypothesis import given
from hypothesis import strategies as st

from segmentation.labels import IGNORE
from segmentation.loss import SegmentationLoss, summed_cross_entropy
from segmentation.metrics import SegmentationScore, SegmentationSums
from segmentation.task import segmentation
from utils.metrics import describe


def answers(seed, images=2, classes=4, size=(5, 6), ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, *size, generator=generator)
    targets = torch.randint(classes, (images, *size), generator=generator).to(torch.uint8)
    targets[torch.rand(targets.shape, generator=generator) < ignored] = IGNORE
    return logits, targets


def literal_score(predictions, truths, classes):
    """mIoU, mean and pixel accuracy by sets of pixels."""
    known = [(p, t) for p, t in zip(predictions, truths, strict=True) if t != IGNORE]
    ious, accs = [], []
    for number in range(classes):
        predicted = {i for i, (p, _) in enumerate(known) if p == number}
        true = {i for i, (_, t) in enumerate(known) if t == number}
        if predicted | true:
            ious.append(100 * len(predicted & true) / len(predicted | true))
        if true:
            accs.append(100 * len(predicted & true) / len(true))
    right = 100 * sum(p == t for p, t in known) / len(known)
    return sum(ious) / len(ious), sum(accs) / len(accs), right


@examples(20)
@given(seed=st.integers(0, 1000), classes=st.integers(2, 6))
def test_scores_are_those_of_sets_of_pixels_over_all_batches(seed, classes):
    sums, predictions, truths = SegmentationSums(classes, CPU), [], []
    for number in range(3):
        logits, targets = answers(seed + number, classes=classes)
        sums.add(logits, targets)
        predictions += logits.argmax(1).flatten().tolist()
        truths += targets.flatten().tolist()
    score = sums.total()
    assert (score.miou, score.macc, score.aacc) == pytest.approx(literal_score(predictions, truths, classes))
    assert score.images == 6


def test_classes_that_neither_occur_nor_are_predicted_count_nowhere():
    score = SegmentationScore(1, 0.0, [[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert score.iou_of_classes[:2] == [75, 80]
    assert score.acc_of_classes[:2] == [75, 100]
    assert math.isnan(score.iou_of_classes[2]) and math.isnan(score.acc_of_classes[2])
    assert score.miou == 77.5
    assert score.macc == 87.5
    assert score.aacc == 87.5
    assert describe(score) == "mIoU 77.500 mAcc 87.500 aAcc 87.500"


def test_a_predicted_class_that_does_not_occur_lowers_the_mean_iou_but_not_the_mean_accuracy():
    score = SegmentationScore(1, 0.0, [[3, 0, 1], [0, 4, 0], [0, 0, 0]])
    assert score.miou == pytest.approx((75 + 100 + 0) / 3)
    assert score.macc == 87.5


def test_the_last_of_many_classes_is_counted_where_it_belongs():
    sums = SegmentationSums(255, CPU)
    targets = torch.tensor([[[254, 254, IGNORE]]], dtype=torch.uint8)
    sums.add(torch.nn.functional.one_hot(torch.tensor([[[254, 200, 0]]]), 255).permute(0, 3, 1, 2).float(), targets)
    confusion = torch.tensor(sums.total().confusion)
    assert confusion.dtype == torch.int64  # whole numbers, which stay exact
    assert {tuple(place): confusion[tuple(place)].item() for place in confusion.nonzero().tolist()} == {
        (254, 254): 1, (254, 200): 1,
    }  # fmt: skip


def test_scores_of_more_pixels_than_single_precision_counts_are_exact():
    score = SegmentationScore(1, 0.0, [[2**30, 1], [0, 1]])
    wanted = [100 * 2**30 / (2**30 + 1), 50]
    assert score.iou_of_classes == pytest.approx(wanted, rel=1e-13)
    assert score.acc_of_classes == pytest.approx([wanted[0], 100], rel=1e-13)
    assert score.aacc == pytest.approx(100 * (2**30 + 1) / (2**30 + 2), rel=1e-13)


def test_a_set_without_a_label_scores_nothing():
    sums = SegmentationSums(2, CPU)
    sums.add(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), IGNORE, dtype=torch.uint8))
    score = sums.total()
    assert (score.images, score.loss, score.miou, score.macc, score.aacc) == (1, 0, 0, 0, 0)


def test_the_loss_is_torchs_mean_over_the_labelled_pixels():
    logits, targets = answers(1)
    wanted = torch.nn.functional.cross_entropy(logits, targets.long(), ignore_index=IGNORE)
    assert SegmentationLoss(0.4)(logits, targets) == pytest.approx(wanted.item(), rel=1e-6)
    sums = SegmentationSums(4, CPU)
    sums.add(logits, targets)
    score = sums.total()
    assert score.loss == pytest.approx(wanted.item(), rel=1e-6)
    assert (type(score.loss), type(score.images)) == (float, int)


def test_small_losses_count_beside_a_large_sum():
    sums = SegmentationSums(2, CPU)
    for logit in [2.0**25, *[1.0] * 8]:
        sums.add(torch.tensor([logit, 0.0]).reshape(1, 2, 1, 1), torch.ones(1, 1, 1, dtype=torch.uint8))
    assert 9 * sums.total().loss - 2.0**25 == pytest.approx(8 * (1 + math.log1p(math.exp(-1))), rel=1e-6)


def test_the_gradient_is_torchs():
    gradients = []
    for loss in (SegmentationLoss(0.4), torch.nn.CrossEntropyLoss(ignore_index=IGNORE)):
        logits, targets = answers(2)
        logits.requires_grad_()
        loss(logits, targets if isinstance(loss, SegmentationLoss) else targets.long()).backward()
        gradients.append(logits.grad)
    assert torch.allclose(*gradients, atol=1e-8)


def test_the_auxiliary_heads_loss_counts_its_weight():
    (logits, targets), (others, _) = answers(3), answers(4)
    for weight in (0.4, 0.25):
        loss = segmentation().build_loss(tiny(MODEL__DECODER__AUX_WEIGHT=weight))
        assert loss((logits, others), targets) == loss(logits, targets) + weight * loss(others, targets)


def test_a_batch_without_a_label_has_no_loss_and_no_gradient():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    targets = torch.full((1, 2, 2), IGNORE, dtype=torch.uint8)
    loss = SegmentationLoss(0.4)(logits, targets)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
    assert summed_cross_entropy(logits, targets)[1] == 0
