"""Counts of right answers and the loss, against counting one by one."""

import math

import pytest
import torch
from helpers_unit import CPU, examples
from hypothesis import given
from hypothesis import strategies as st

from utils.metrics import Score, ScoreSums


def scored(logits, targets, sizes=None):
    sums = ScoreSums(CPU)
    for part, wanted in zip(*(values.split(sizes or len(values)) for values in (logits, targets)), strict=True):
        sums.add(part, wanted)
    return sums.total()


def literal(logits, targets):
    """(images, right first, right among the first five, mean loss), one image after another."""
    right1 = right5 = 0
    loss = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda number: -row[number])
        right1 += order[0] == target
        right5 += target in order[:5]
        loss += math.log(sum(math.exp(value) for value in row)) - row[target]
    return len(targets), right1, right5, loss / len(targets)


@given(classes=st.integers(1, 12), images=st.integers(1, 30), size=st.integers(1, 30), seed=st.integers(0, 10**6))
@examples(100)
def test_a_score_is_what_counting_gives_however_it_is_split(classes, images, size, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.stack([torch.randperm(classes, generator=generator) / 2 for _ in range(images)])
    targets = torch.randint(classes, (images,), generator=generator)
    score, wanted = scored(logits, targets, size), literal(logits, targets)
    assert (score.images, score.correct1, score.correct5) == wanted[:3]
    assert score.loss == pytest.approx(wanted[3], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5])
def test_among_five_classes_or_fewer_every_image_is_right_in_five(classes):
    targets = torch.arange(classes)
    score = scored(torch.eye(classes).flip(0), targets)
    assert (score.acc5, score.images) == (100.0, classes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_another_precision_are_scored_in_single(dtype):
    logits = torch.tensor([[9.0, 0.0, -3.0], [1.0, 2.0, 4.0]], dtype=dtype)
    targets = torch.tensor([0, 1])
    score = scored(logits, targets)
    assert score.loss == pytest.approx(literal(logits.double(), targets)[3], rel=1e-5)


def test_counts_stay_whole_and_percentages_are_taken_of_them():
    score = Score(images=50_000, correct1=41_700, correct5=48_232, loss=0.7)
    assert (score.acc1, score.acc5) == (83.4, 96.464)
    assert all(type(count) is int for count in (scored(torch.eye(2), torch.tensor([0, 1])).correct1, score.images))


def test_small_losses_count_beside_a_large_sum():
    sums = ScoreSums(CPU)
    sums.add(torch.tensor([[2.0**25, 0.0]]), torch.tensor([1]))
    for _ in range(8):
        sums.add(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    loss = sums.total().loss
    assert type(loss) is float
    assert 9 * loss - 2.0**25 == pytest.approx(8 * (1 + math.log1p(math.exp(-1))), rel=1e-6)


def test_no_image_is_a_score_of_none():
    total = ScoreSums(CPU).total()
    assert (total.images, total.correct1, total.correct5, total.loss) == (0, 0, 0, 0.0)
