"""Cross-entropy over the labelled pixels."""

import torch
from torch import Tensor, nn

from segmentation.labels import IGNORE


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the labelled pixels' cross-entropies, and how many of them there are.

    By a gather, which unlike torch's own loss of images gives the same bits on every run on a GPU, too.

    Args:
        logits: [B, classes, H, W].
        targets: Class numbers [B, H, W], IGNORE where there is none.
    """
    labelled = targets != IGNORE
    chosen = targets.long().where(labelled, 0)[:, None]
    losses = -logits.float().log_softmax(dim=1).gather(1, chosen)[:, 0]
    return losses.where(labelled, 0).sum(), labelled.sum()


class SegmentationLoss(nn.Module):
    """Mean cross-entropy of the labelled pixels, and a share of the auxiliary head's; 0 where nothing is labelled.

    Args:
        aux_weight: What the auxiliary head's loss counts.
    """

    def __init__(self, aux_weight: float) -> None:
        super().__init__()
        self._aux_weight = aux_weight

    def forward(self, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """The loss of logits [B, classes, H, W], or of those and an auxiliary head's, by class numbers [B, H, W]."""
        if isinstance(outputs, tuple):
            logits, auxiliary = outputs
            return self(logits, targets) + self._aux_weight * self(auxiliary, targets)
        total, count = summed_cross_entropy(outputs, targets)
        return total / torch.clamp(count, min=1)
