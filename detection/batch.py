"""A batch of images of any sizes with what is in them, as loaders give it and the network takes it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Objects = dict[str, Tensor]  # 'boxes' [N, 4] as x1, y1, x2, y2 in pixels, 'labels' [N], perhaps 'masks' [N, H, W]


@dataclass(frozen=True)
class Batch:
    """Images and their objects.

    Attributes:
        images: [C, H, W] each, of 8 bits as loaded, from 0 to 1 as the network takes them.
        targets: The objects of each image.
    """

    images: list[Tensor]
    targets: list[Objects]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The batch on a device."""
        parts = (self.images, self.targets)
        return Batch(*tree_map(lambda tensor: tensor.to(device, non_blocking=non_blocking), parts))

    def pin_memory(self) -> "Batch":
        """The batch in memory that is copied to GPUs while others compute."""
        return Batch(*tree_map(Tensor.pin_memory, (self.images, self.targets)))


def finish(batch: Batch) -> Batch:
    """8-bit pixels -> 0 to 1; torchvision's detectors normalise, resize and pad."""
    return Batch([image.float() / 255 for image in batch.images], batch.targets)
