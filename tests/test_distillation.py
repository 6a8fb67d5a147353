"""Knowledge distillation: the loss, the teacher, and runs that learn from one."""

import math
import re

import pytest
import timm
import torch
from helpers_unit import ALONE, CPU, configured, examples, write_folder
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.build import build_model
from utils import checkpoint
from utils.classification import classification
from utils.distillation import DistillationLoss, Teacher, build_teacher, check_teacher
from utils.errors import UserError
from utils.optim import build_loss
from utils.precision import Precision

FP32 = Precision("fp32", "cpu")
TINY = {
    "MODEL__GMA__EMBEDDING_DIMS": [40, 40, 40, 40],
    "MODEL__GMA__SERIAL_DEPTHS": [1, 1, 1, 1],
    "DATA__IMG_SIZE": 64,
    "MODEL__GMA__NUM_CLASSES": 3,
}
TIMM_TEACHER = "test_resnet"


class Remembering(nn.Module):
    """Answers with the mean of each channel, and keeps what it was asked."""

    def forward(self, images):
        self.asked = images
        return images.mean(dim=(2, 3))


def teacher_config(name, **values):
    return configured(**{**TINY, "DISTILL__TEACHER": str(name), **values})


@pytest.fixture
def taught(tmp_path):
    """A checkpoint of a network of ours with three classes, and the network."""
    config = configured(**TINY, DATA__MEAN=[0.1, 0.2, 0.3], DATA__STD=[0.5, 0.25, 0.125])
    torch.manual_seed(0)
    network = build_model(config, 3).eval()
    state = {"model": network.state_dict(), "config": config.dump(), "classes": ["a", "b", "c"]}
    checkpoint.save(state, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth", network


def literal_soft(logits, taught, temperature):
    """The Kullback-Leibler divergence of each image, summed over classes, by its definition."""
    total = 0.0
    for own, its in zip(logits.tolist(), taught.tolist(), strict=True):
        shares = [[math.exp(value / temperature) for value in row] for row in (own, its)]
        own_shares, its_shares = ([share / sum(row) for share in row] for row in shares)
        total += sum(p * math.log(p / q) for p, q in zip(its_shares, own_shares, strict=True))
    return temperature**2 * total / len(logits)


@given(st.integers(0, 99), st.floats(0, 1), st.floats(0.5, 8), st.integers(2, 6))
@examples(40)
def test_the_soft_loss_is_the_labels_and_the_divergence_from_the_teacher(seed, weight, temperature, classes):
    generator = torch.Generator().manual_seed(seed)
    logits, taught = (torch.randn(4, classes, generator=generator) * 2 for _ in range(2))
    labels = torch.randint(classes, (4,), generator=generator)
    loss = DistillationLoss(nn.CrossEntropyLoss(), weight, temperature, hard=False)(logits, (labels, taught))
    of_labels = nn.functional.cross_entropy(logits, labels).item()
    expected = (1 - weight) * of_labels + weight * literal_soft(logits, taught, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_hard_loss_takes_the_teachers_first_class_for_the_label():
    logits, taught = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.1, 0.3, 0.2]])
    loss = DistillationLoss(nn.CrossEntropyLoss(), 0.5, 3.0, hard=True)(logits, (torch.tensor([0]), taught))
    shares = logits.log_softmax(dim=1)[0]
    assert loss.item() == pytest.approx(-(shares[0] + shares[1]).item() / 2)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_run_learns_by_the_configured_loss(kind):
    config = teacher_config("teacher.pth", DISTILL__KIND=kind, DISTILL__ALPHA=0.3, DISTILL__TEMPERATURE=2.0)
    logits, labels, taught = torch.randn(2, 3), torch.eye(3)[:2], torch.randn(2, 3)
    expected = DistillationLoss(build_loss(config), 0.3, 2.0, hard=kind == "hard")
    assert torch.equal(
        classification().build_loss(config)(logits, (labels, taught)), expected(logits, (labels, taught))
    )


def test_a_teacher_sees_the_mixed_images_normalised_as_it_was_trained():
    pixels, network = torch.rand(2, 3, 8, 8), Remembering()
    ours = (pixels - 0.5) / 0.25
    teacher = Teacher(network, lambda images, labels: (images.flip(0), labels + 10), FP32, *scale_and_shift())
    images, (labels, taught) = teacher(ours, torch.tensor([1, 2]))
    torch.testing.assert_close(network.asked, (pixels.flip(0) - 0.1) / 0.5)
    assert torch.equal(images, ours.flip(0)) and labels.tolist() == [11, 12]
    assert torch.equal(taught, network.asked.mean(dim=(2, 3)))


def scale_and_shift():
    """From (x - 0.5) / 0.25 to (x - 0.1) / 0.5."""
    return torch.full((3,), 0.25 / 0.5), torch.full((3,), (0.5 - 0.1) / 0.5)


def test_a_checkpoint_teaches_what_its_network_answers(taught):
    path, network = taught
    teacher = build_teacher(teacher_config(path), 3, None, FP32, CPU)
    config, pixels = teacher_config(path), torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.DATA.MEAN, config.DATA.STD))
    its_mean, its_std = (torch.tensor(values).view(-1, 1, 1) for values in ([0.1, 0.2, 0.3], [0.5, 0.25, 0.125]))
    _, (labels, answers) = teacher((pixels - mean) / std, torch.tensor([0, 1]))
    with torch.no_grad():
        expected = network((pixels - its_mean) / its_std)
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [0, 1] and not answers.requires_grad


def test_a_network_of_timm_teaches_with_weights_from_a_file(tmp_path):
    network = timm.create_model(TIMM_TEACHER, num_classes=3).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    config = teacher_config(
        TIMM_TEACHER, DISTILL__WEIGHTS=str(tmp_path / "w.pth"), DATA__MEAN=[0.1, 0.2, 0.3], DATA__STD=[0.5, 0.25, 0.125]
    )
    pixels = torch.rand(2, 3, 64, 64)
    ours, its = (
        (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        for mean, std in (
            (config.DATA.MEAN, config.DATA.STD),
            (network.pretrained_cfg["mean"], network.pretrained_cfg["std"]),
        )
    )
    _, (_, answers) = build_teacher(config, 3, None, FP32, CPU)(ours, torch.tensor([0, 1]))
    with torch.no_grad():
        torch.testing.assert_close(answers, network(its), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        (
            {"DISTILL__TEACHER": "no_such_network"},
            3,
            "no_such_network is neither a checkpoint of this code nor a network",
        ),
        (
            {"DISTILL__TEACHER": TIMM_TEACHER, "DISTILL__WEIGHTS": "gone.pth"},
            3,
            "DISTILL.WEIGHTS gone.pth is no file: name one that holds weights of test_resnet",
        ),
        (
            {"DISTILL__TEACHER": TIMM_TEACHER, "DISTILL__WEIGHTS": __file__},
            3,
            "DISTILL.WEIGHTS .*py holds no weights of test_resnet for 3 classes .*: name another file",
        ),
        ({"DISTILL__WEIGHTS": "w.pth"}, 3, "DISTILL.WEIGHTS is for networks of timm, and .* leave it empty"),
        ({}, 4, "answers for 3 classes and not 4: choose another"),
        ({"MODEL__GMA__IN_DIM": 1}, 3, r"cannot take 1 x 64 x 64 pixels \(.*\): choose another"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_a_line(taught, values, classes, message):
    path, _ = taught
    with pytest.raises(UserError, match=message) as error:
        build_teacher(teacher_config(**{"name": path, **values}), classes, None, FP32, CPU)
    assert "\n" not in str(error.value)


def test_labels_are_mixed_over_the_classes_of_the_network_with_and_without_a_teacher(taught):
    path, network = taught
    for teacher in ("", path):
        config = teacher_config(teacher, MODEL__GMA__NUM_CLASSES=0, AUG__MIXUP=0.8)
        mix = classification().build_batch_transform(config, network, FP32)
        images, targets = mix(torch.rand(2, 3, 64, 64), torch.tensor([0, 2]))
        labels = targets[0] if teacher else targets
        assert images.shape == (2, 3, 64, 64) and labels.shape == (2, 3)


def test_a_teacher_of_other_classes_is_refused(taught):
    path, _ = taught
    check_teacher(teacher_config(path), ["a", "b", "c"])
    with pytest.raises(UserError, match=re.escape(f"{path} knows other classes than the data has")):
        check_teacher(teacher_config(path), ["a", "c", "b"])


def test_a_run_refuses_a_teacher_of_other_classes(taught, tmp_path):
    path, _ = taught
    for split in ("train", "val"):
        write_folder(tmp_path / "data" / split, {"a": 2, "b": 1, "d": 1})
    config = teacher_config(path, DATA__DATA_PATH=str(tmp_path / "data"), DATA__BATCH_SIZE=2, DATA__NUM_WORKERS=0)
    with pytest.raises(UserError, match="knows other classes than the data has"):
        classification().open_data(config, ALONE)


@pytest.mark.slow
def test_a_run_learns_from_a_teacher_and_goes_on_to_the_same_bits(train, trained, tmp_path, differences):
    opts = f"DISTILL.TEACHER {trained.folder / 'best.pth'} DISTILL.ALPHA 0.9 TRAIN.EPOCHS 2 AUG.MIXUP 0.8"
    whole = train(tmp_path / "whole", opts=opts)
    assert "loss DistillationLoss, Teacher" in whole.result.stdout
    assert "best.pth: 80,310 parameters, after Mixup" in whole.result.stdout
    train(tmp_path / "plain", opts="TRAIN.EPOCHS 2 AUG.MIXUP 0.8")
    plain = checkpoint.load(tmp_path / "plain/tiny/run/last.pth")
    assert differences(whole.checkpoint()["model"], plain["model"])
    whole.stopped_after(1, tmp_path / "again")
    again = train(tmp_path / "again", opts=opts)
    assert not differences(again.checkpoint()["model"], whole.checkpoint()["model"])
