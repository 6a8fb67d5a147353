"""Scores class by class, and which classes are taken for which."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils.reporting.outcomes import Outcomes


@dataclass(frozen=True)
class ClassScores:
    """Counts of each class [classes], and what follows from them: shares from 0 to 1, NaN where there is none.

    Attributes:
        images: Images of the class.
        predicted: Images that the class was said of.
        correct: Images of the class that it was said of.
        correct5: Images of the class that had it among the first five.
    """

    images: np.ndarray
    predicted: np.ndarray
    correct: np.ndarray
    correct5: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """Numbers of the classes that have images."""
        return np.flatnonzero(self.images)

    @property
    def accuracy(self) -> np.ndarray:
        """Of the images of the class, the share that it was said of: its recall."""
        return _share(self.correct, self.images)

    @property
    def accuracy5(self) -> np.ndarray:
        """Of the images of the class, the share that had it among the first five."""
        return _share(self.correct5, self.images)

    @property
    def precision(self) -> np.ndarray:
        """Of the images that the class was said of, the share that is of it."""
        return _share(self.correct, self.predicted)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, of classes that have images."""
        return _share(2 * self.correct, np.where(self.images > 0, self.images + self.predicted, 0))

    @property
    def mean_accuracy(self) -> float:
        """Mean over the classes that have images."""
        return float(np.nanmean(self.accuracy))

    @property
    def macro_precision(self) -> float:
        """Mean over the classes that have images, with 0 for those that were never said."""
        return float(np.nan_to_num(self.precision[self.present]).mean())

    @property
    def macro_f1(self) -> float:
        """Mean over the classes that have images."""
        return float(np.nanmean(self.f1))


class Confusion(NamedTuple):
    """Two classes, and how many images of the one were taken for the other."""

    target: int
    prediction: int
    images: int


def score_classes(outcomes: Outcomes, num_classes: int) -> ClassScores:
    """Counts images, answers and right answers of each class."""

    def count(numbers: np.ndarray) -> np.ndarray:
        return np.bincount(numbers, minlength=num_classes)

    targets = outcomes.targets
    return ClassScores(
        count(targets),
        count(outcomes.predictions),
        count(targets[outcomes.are_right]),
        count(targets[outcomes.in_top5]),
    )


def confusions(outcomes: Outcomes) -> list[Confusion]:
    """Every pair of classes of which one was taken for the other, the most frequent first."""
    wrong = ~outcomes.are_right
    pairs, counts = np.unique(
        np.stack([outcomes.targets[wrong], outcomes.predictions[wrong]]), axis=1, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    return [
        Confusion(*pair, count) for pair, count in zip(pairs.T[order].tolist(), counts[order].tolist(), strict=True)
    ]


def confusion_matrix(outcomes: Outcomes, classes: np.ndarray, block: int = 1) -> np.ndarray:
    """Counts images by what they are and what was said.

    Args:
        outcomes: What was said.
        classes: Numbers of all classes that have images, ascending.
        block: Classes that share a row, and a column.

    Returns:
        Counts [rows, rows + 1]; a row is what images are, a column what was said, the last one all other classes.
    """
    rows = -(-len(classes) // block)
    matrix = np.zeros((rows, rows + 1), dtype=np.int64)
    columns = np.searchsorted(classes, outcomes.predictions)
    is_known = classes[np.minimum(columns, len(classes) - 1)] == outcomes.predictions
    np.add.at(
        matrix, (np.searchsorted(classes, outcomes.targets) // block, np.where(is_known, columns // block, rows)), 1
    )
    return matrix


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
