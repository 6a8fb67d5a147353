"""What is kept of each image: in the order of the data on any number of ranks, and with the score that is printed."""

import numpy as np
import pytest
import torch
from helpers_unit import ALONE, CPU

from utils.dist import World
from utils.metrics import ScoreSums
from utils.reporting import outcomes as module
from utils.reporting.outcomes import Outcomes, OutcomeSums

CLASSES, IMAGES = 7, 23


@pytest.fixture
def answers():
    """Logits [23, 7] and class numbers [23]."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(IMAGES, CLASSES, generator=generator)
    return logits, torch.randint(CLASSES, (IMAGES,), generator=generator)


def collect(logits, targets, world=ALONE, size=4):
    sums = OutcomeSums(world)
    for batch in zip(logits.split(size), targets.split(size), strict=True):
        sums.add(*batch)
    return sums


def outcomes_of(are_right, confidences):
    targets = np.zeros(len(are_right), dtype=int)
    predictions = np.where(are_right, 0, 1)
    return Outcomes(targets, predictions, np.array(confidences), np.zeros(len(targets)), np.array(are_right))


def assert_same(one, other):
    for name in ("targets", "predictions", "confidences", "target_probabilities", "in_top5"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)


def test_score_is_the_one_without_outcomes(answers):
    plain, sums = ScoreSums(CPU), OutcomeSums(ALONE)
    for batch in zip(*(values.split(4) for values in answers), strict=True):
        plain.add(*batch)
        sums.add(*batch)
    assert sums.total() == plain.total()


def test_outcomes_are_those_of_each_image_by_itself(answers):
    found = collect(*answers).outcomes()
    for number, (logits, target) in enumerate(zip(*answers, strict=True)):
        powers = np.exp(logits.double().numpy())
        probabilities, ranking = powers / powers.sum(), np.argsort(-logits.numpy())
        assert found.targets[number] == target
        assert found.predictions[number] == ranking[0]
        assert found.confidences[number] == pytest.approx(probabilities[ranking[0]], rel=1e-5)
        assert found.target_probabilities[number] == pytest.approx(probabilities[target], rel=1e-5)
        assert found.in_top5[number] == (target in ranking[:5])
    assert found.are_right.sum() == collect(*answers).total().correct1
    assert 0 < found.are_right.sum() < found.in_top5.sum() < IMAGES


def test_ties_are_broken_as_in_the_score():
    logits, targets = torch.zeros(CLASSES, CLASSES), torch.arange(CLASSES)
    sums = collect(logits, targets)
    found, score = sums.outcomes(), sums.total()
    assert (found.are_right.sum(), found.in_top5.sum()) == (score.correct1, score.correct5)


@pytest.mark.parametrize("ranks", [2, 3, 30])
def test_images_of_all_ranks_stand_in_the_order_of_the_data(answers, ranks, monkeypatch):
    logits, targets = answers
    whole, tables = collect(*answers).outcomes(), []
    every = [collect(logits[r::ranks], targets[r::ranks], World(r, ranks, CPU), 3) for r in range(ranks) if r < IMAGES]
    every += [OutcomeSums(World(rank, ranks, CPU)) for rank in range(IMAGES, ranks)]
    monkeypatch.setattr(module, "gather_objects", lambda own: tables.append(own) or tables)
    for sums in every[:-1]:
        sums.outcomes()
    assert_same(every[-1].outcomes(), whole)


def test_half_precision_logits_give_probabilities_of_single_precision():
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    found = collect(logits, torch.tensor([0])).outcomes()
    assert found.confidences[0] == pytest.approx(0.66524096, rel=1e-6)


def test_surest_mistakes_come_first_and_equally_sure_ones_in_their_order():
    found = outcomes_of([False, True, False, False, False], [0.5, 0.99, 0.9, 0.7, 0.9])
    assert found.worst_mistakes(3).tolist() == [2, 4, 3]
    assert found.worst_mistakes(9).tolist() == [2, 4, 3, 0]
    assert outcomes_of([True], [1.0]).worst_mistakes(3).tolist() == []
