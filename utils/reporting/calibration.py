"""Whether a classifier is right as often as it is sure (https://arxiv.org/abs/1706.04599)."""

from dataclasses import dataclass

import numpy as np

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Images in bins of confidence, which are of equal width and take in their upper edge.

    Attributes:
        edges: Of the bins, from 0 to 1 [bins + 1].
        images: In each bin [bins].
        accuracy: Share of right answers in each bin, NaN where it is empty [bins].
        confidence: Mean confidence in each bin, NaN where it is empty [bins].
    """

    edges: np.ndarray
    images: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @property
    def gaps(self) -> np.ndarray:
        """Accuracy less confidence, 0 where the bin is empty: below 0 is too sure [bins]."""
        return np.where(self.images > 0, self.accuracy - self.confidence, 0.0)

    @property
    def expected_error(self) -> float:
        """ECE: the mean over images of their bin's gap, without its sign."""
        return float((self.images * abs(self.gaps)).sum() / self.images.sum())

    @property
    def largest_error(self) -> float:
        """MCE: the largest gap of a bin."""
        return float(abs(self.gaps).max())

    @property
    def mean_accuracy(self) -> float:
        """Over all images."""
        return float(np.nansum(self.images * self.accuracy) / self.images.sum())

    @property
    def mean_confidence(self) -> float:
        """Over all images."""
        return float(np.nansum(self.images * self.confidence) / self.images.sum())


def calibrate(are_right: np.ndarray, confidences: np.ndarray, bins: int = BINS) -> Calibration:
    """Sorts answers into bins of confidence.

    Args:
        are_right: Whether each answer was right [N].
        confidences: The probability that was given to each answer [N].
        bins: How many.
    """
    edges = np.linspace(0, 1, bins + 1)
    places = np.digitize(confidences, edges[1:-1], right=True)
    images = np.bincount(places, minlength=bins)
    right, sure = (np.bincount(places, weights, minlength=bins) for weights in (are_right, confidences))
    with np.errstate(invalid="ignore"):
        return Calibration(edges, images, right / images, sure / images)
