"""Scores where an image's class is not one of all the network's: among some of them only, or one of several labels."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from utils.dist import sum_over_ranks
from utils.metrics import Score, ScoreSums, top5

_NO_CLASS = -1


class SubsetSums(ScoreSums):
    """Adds up accuracies among some of a network's classes: the logits of the others are left out.

    Args:
        classes: The network's numbers of these classes; targets are places in this list.
        device: Where the logits are.
    """

    def __init__(self, classes: list[int], device: torch.device) -> None:
        super().__init__(device)
        self._classes = torch.tensor(classes, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: logits [B, classes of the network] and places in the list [B]."""
        super().add(logits[:, self._classes], targets)


class AnyLabelSums:
    """Adds up accuracies where any of an image's labels is right.

    Args:
        labels: The class numbers that are right for each image, one at least.
        device: Where the logits are.
    """

    def __init__(self, labels: list[list[int]], device: torch.device) -> None:
        rows = [torch.tensor(row, dtype=torch.int64) for row in labels]
        self._labels = pad_sequence(rows, batch_first=True, padding_value=_NO_CLASS).to(device)
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: logits [B, classes] and the images' places in the list of labels [B]."""
        is_right = (top5(logits)[:, :, None] == self._labels[targets][:, None, :]).any(dim=2)
        seen = torch.full((), len(targets), device=targets.device)
        self._counts += torch.stack([seen, is_right[:, 0].sum(), is_right.any(dim=1).sum()])

    def total(self) -> Score:
        """The score over all ranks, without a loss; every rank must ask."""
        images, correct1, correct5 = sum_over_ranks(self._counts).tolist()
        return Score(images, correct1, correct5, loss=float("nan"))
