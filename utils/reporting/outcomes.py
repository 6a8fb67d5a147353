"""What a classifier said of each image, kept while it is scored."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.dist import World, gather_objects
from utils.metrics import ScoreSums, top5


@dataclass(frozen=True)
class Outcomes:
    """What a classifier said of the images of a data set.

    Attributes:
        targets: Class numbers [N].
        predictions: Numbers of the classes that it put first [N].
        confidences: The probabilities that it gave to those [N].
        target_probabilities: The probabilities that it gave to the targets [N].
        in_top5: Whether it had the target among the first five [N].
    """

    targets: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    target_probabilities: np.ndarray
    in_top5: np.ndarray

    @property
    def are_right(self) -> np.ndarray:
        """Whether the target came first [N]."""
        return self.predictions == self.targets

    def worst_mistakes(self, most: int) -> np.ndarray:
        """Indices of the mistakes that it was surest of, the surest first, so many at most."""
        mistakes = np.flatnonzero(~self.are_right)
        return mistakes[np.argsort(-self.confidences[mistakes], kind="stable")][:most]


class OutcomeSums(ScoreSums):
    """Adds up scores as `ScoreSums` does, and keeps what was said of each image.

    Args:
        world: This process among all. Its n-th image is number rank + n * ranks, as `share_out` deals them out.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world.device)
        self._world = world
        self._batches: list[Tensor] = []

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: logits [B, classes] and class numbers [B]."""
        super().add(logits, targets)
        first = top5(logits)
        predictions, in_top5 = first[:, 0], (first == targets[:, None]).any(dim=1)
        probabilities = logits.float().softmax(dim=1)
        confidences, of_targets = (probabilities.gather(1, n[:, None])[:, 0] for n in (predictions, targets))
        columns = (targets, predictions, confidences, of_targets, in_top5)
        self._batches.append(torch.stack([column.double() for column in columns]))

    def outcomes(self) -> Outcomes:
        """What was said of the images of all ranks, in their order; every rank must ask."""
        own = torch.cat(self._batches, dim=1).cpu().numpy() if self._batches else np.zeros((5, 0))
        tables = gather_objects(own)
        order = np.concatenate(
            [rank + self._world.size * np.arange(table.shape[1]) for rank, table in enumerate(tables)]
        )
        targets, predictions, confidences, of_targets, in_top5 = np.concatenate(tables, axis=1)[:, np.argsort(order)]
        return Outcomes(targets.astype(int), predictions.astype(int), confidences, of_targets, in_top5.astype(bool))
