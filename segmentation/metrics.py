"""Mean IoU, mean accuracy and pixel accuracy from one confusion matrix over the whole set."""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from segmentation.labels import IGNORE
from segmentation.loss import summed_cross_entropy
from utils.dist import sum_over_ranks


@dataclass(frozen=True)
class SegmentationScore:
    """What a network reached on a data set.

    Attributes:
        measures: As in `utils.metrics.TaskScore`.
        images: Number of images, each counted once.
        loss: Mean cross-entropy of the labelled pixels.
        confusion: Labelled pixels by their class, and then by the predicted one.
    """

    measures: ClassVar[dict[str, str]] = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}
    images: int
    loss: float
    confusion: list[list[int]]

    @property
    def iou_of_classes(self) -> list[float]:
        """Percentage, for each class, of the pixels of it or predicted as it that are both; nan where there is none."""
        matrix = self._matrix
        both = matrix.diagonal()
        return (100 * both / (matrix.sum(0) + matrix.sum(1) - both)).tolist()

    @property
    def acc_of_classes(self) -> list[float]:
        """Percentage of each class's pixels that are predicted as it; nan where there is none."""
        return (100 * self._matrix.diagonal() / self._matrix.sum(1)).tolist()

    @property
    def miou(self) -> float:
        """Mean intersection over union of the classes that occur or are predicted."""
        return _mean(self.iou_of_classes)

    @property
    def macc(self) -> float:
        """Mean accuracy of the classes that occur."""
        return _mean(self.acc_of_classes)

    @property
    def aacc(self) -> float:
        """Percentage of the labelled pixels that are right."""
        return _mean([(100 * self._matrix.diagonal().sum() / self._matrix.sum()).item()])

    @property
    def _matrix(self) -> Tensor:
        return torch.tensor(self.confusion, dtype=torch.float64)


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else 0.0


class SegmentationSums:
    """Adds up a confusion matrix and the loss on the device, and over ranks once at the end.

    Args:
        num_classes: How many classes there are.
        device: Where outputs and targets are.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes = num_classes
        self._confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
        self._images = torch.zeros(1, dtype=torch.int64, device=device)
        self._loss = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: logits [B, classes, H, W] and class numbers [B, H, W], IGNORE where there is none."""
        labelled = targets != IGNORE
        pairs = targets[labelled].long() * self._num_classes + logits.argmax(dim=1)[labelled]
        self._confusion += torch.bincount(pairs, minlength=len(self._confusion))
        self._images += len(targets)
        self._loss += summed_cross_entropy(logits, targets)[0].double()

    def total(self) -> SegmentationScore:
        """The score over all ranks; every rank must ask."""
        confusion = sum_over_ranks(self._confusion).view(self._num_classes, self._num_classes)
        images, loss = sum_over_ranks(self._images).item(), sum_over_ranks(self._loss).item()
        return SegmentationScore(images, loss / max(int(confusion.sum()), 1), confusion.tolist())
