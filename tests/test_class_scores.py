"""Scores class by class and confusion are scikit-learn's, and what is not defined is no number."""

import warnings

import numpy as np
import pytest
from helpers_unit import examples
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support

from utils.reporting import class_scores
from utils.reporting.class_scores import Confusion, confusions, score_classes
from utils.reporting.outcomes import Outcomes

pytestmark = pytest.mark.filterwarnings("ignore:A single label was found")


def outcomes_of(targets, predictions, in_top5=None):
    targets, predictions = np.array(targets), np.array(predictions)
    nothing = np.zeros(len(targets))
    return Outcomes(targets, predictions, nothing, nothing, targets == predictions if in_top5 is None else in_top5)


@st.composite
def answers(draw):
    """Outcomes of a network, and its number of classes, of which some may have no image and never be said."""
    classes = draw(st.integers(1, 9))
    pairs = draw(st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=1, max_size=40))
    return outcomes_of(*zip(*pairs, strict=True)), classes


@examples(60)
@given(answers())
def test_class_scores_are_scikit_learns(answer):
    found, classes = answer
    scores = score_classes(found, classes)
    precision, recall, f1, support = precision_recall_fscore_support(
        found.targets, found.predictions, labels=range(classes), zero_division=np.nan
    )
    absent = support == 0
    np.testing.assert_array_equal(scores.images, support)
    np.testing.assert_allclose(scores.precision, precision, rtol=1e-12)
    np.testing.assert_allclose(scores.accuracy, recall, rtol=1e-12)
    np.testing.assert_allclose(scores.f1, np.where(absent, np.nan, f1), rtol=1e-12)
    assert np.isnan(scores.accuracy[absent]).all() and np.isnan(scores.f1[absent]).all()


@examples(60)
@given(answers())
def test_means_over_classes_are_scikit_learns_over_those_with_images(answer):
    found, classes = answer
    scores, present = score_classes(found, classes), np.unique(found.targets)
    precision, _, f1, _ = precision_recall_fscore_support(
        found.targets, found.predictions, labels=present, average="macro", zero_division=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that are said and have no images, which scikit-learn warns of
        balanced = balanced_accuracy_score(found.targets, found.predictions)
    assert scores.mean_accuracy == pytest.approx(balanced, rel=1e-12)
    assert scores.macro_precision == pytest.approx(precision, rel=1e-12)
    assert scores.macro_f1 == pytest.approx(f1, rel=1e-12)
    assert scores.present.tolist() == present.tolist()


@examples(60)
@given(answers(), st.integers(1, 4))
def test_confusion_is_scikit_learns_with_all_absent_classes_in_one_column_and_neighbours_in_blocks(answer, block):
    found, classes = answer
    whole = confusion_matrix(found.targets, found.predictions, labels=range(classes))
    present = np.unique(found.targets)
    blocks = [present[start : start + block] for start in range(0, len(present), block)]
    expected = [
        [whole[np.ix_(row, column)].sum() for column in blocks] + [np.delete(whole[row], present, axis=1).sum()]
        for row in blocks
    ]
    assert class_scores.confusion_matrix(found, present, block).tolist() == expected


@examples(60)
@given(answers())
def test_confused_pairs_are_all_cells_off_the_diagonal_the_most_frequent_first(answer):
    found, classes = answer
    whole = confusion_matrix(found.targets, found.predictions, labels=range(classes))
    np.fill_diagonal(whole, 0)
    cells = [Confusion(*map(int, cell), int(whole[tuple(cell)])) for cell in np.argwhere(whole)]
    assert confusions(found) == sorted(cells, key=lambda cell: (-cell.images, cell.target, cell.prediction))


def test_a_class_that_is_never_said_has_no_precision_and_one_without_images_no_accuracy():
    scores = score_classes(outcomes_of([0, 0, 1], [0, 2, 0], np.array([True, True, False])), 4)
    np.testing.assert_array_equal(scores.precision, [1 / 2, np.nan, 0, np.nan])
    np.testing.assert_array_equal(scores.accuracy, [1 / 2, 0, np.nan, np.nan])
    np.testing.assert_array_equal(scores.accuracy5, [1, 0, np.nan, np.nan])
    np.testing.assert_array_equal(scores.f1, [1 / 2, 0, np.nan, np.nan])
    assert (scores.mean_accuracy, scores.macro_precision, scores.macro_f1) == (1 / 4, 1 / 4, 1 / 4)


def test_nothing_is_confused_where_all_is_right():
    assert confusions(outcomes_of([0, 1], [0, 1])) == []
