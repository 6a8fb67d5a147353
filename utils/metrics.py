"""Exact sums over a data set, divided once at the end."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from utils.dist import sum_over_ranks


class TaskScore(Protocol):
    """What a network reached on a data set, by the measures of its task.

    Attributes:
        measures: Names of attributes, each a percentage, and what to call them; the first chooses the best epoch.
        images: Number of images, each counted once.
        loss: Mean loss, not a number where the task has none in evaluation.
    """

    measures: ClassVar[dict[str, str]]
    images: int
    loss: float


class Sums(Protocol):
    """Adds up what a task scores by."""

    def add(self, outputs: Any, targets: Any) -> None:
        """Adds a batch: what the network answers, and what the loader gives beside the images."""

    def total(self) -> TaskScore:
        """The score over all ranks; every rank must ask."""


def describe(score: TaskScore) -> str:
    """A score's measures in a line."""
    return " ".join(f"{label} {getattr(score, name):.3f}" for name, label in score.measures.items())


@dataclass(frozen=True)
class Score:
    """What a classifier reached on a data set.

    Attributes:
        measures: As in `TaskScore`.
        images: Number of images, each counted once.
        correct1: How many had their class first.
        correct5: How many had it among the first five.
        loss: Mean cross-entropy.
    """

    measures: ClassVar[dict[str, str]] = {"acc1": "Acc@1", "acc5": "Acc@5"}
    images: int
    correct1: int
    correct5: int
    loss: float

    @property
    def acc1(self) -> float:
        """Percentage with the class first."""
        return 100 * self.correct1 / self.images

    @property
    def acc5(self) -> float:
        """Percentage with the class among the first five."""
        return 100 * self.correct5 / self.images


def top5(logits: Tensor) -> Tensor:
    """The numbers of the five most probable classes, or of all where there are fewer: [B, 5] of logits [B, classes]."""
    return logits.float().topk(min(5, logits.shape[1]), dim=1).indices


class ScoreSums:
    """Adds up a classifier's scores on the device, without waiting for it, and over ranks once at the end."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._loss = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: logits [B, classes] and class numbers [B]."""
        hits = top5(logits) == targets[:, None]
        seen = torch.full((), len(targets), device=targets.device)
        self._counts += torch.stack([seen, hits[:, 0].sum(), hits.sum()])
        self._loss += nn.functional.cross_entropy(logits.float(), targets, reduction="sum").double()

    def total(self) -> Score:
        """The score over all ranks; every rank must ask."""
        images, correct1, correct5 = sum_over_ranks(self._counts).tolist()
        return Score(images, correct1, correct5, sum_over_ranks(self._loss).item() / max(images, 1))
