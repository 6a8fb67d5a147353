"""What is done to a whole batch once it is on the device: normalisation, and to train classifiers random erasing.

Batches come as 8-bit pixels, a quarter of the bytes to copy between processes and to the device.
"""

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from yacs.config import CfgNode

from utils.precision import memory_format


class Normalize:
    """8-bit images [B, C, H, W] -> normalised ones, in the layout that the configuration asks for.

    Args:
        config: The configuration, of any task.
        device: Where the images are.
    """

    def __init__(self, config: CfgNode, device: torch.device) -> None:
        self._layout = memory_format(config)
        # Tensors on the device, as CUDA divides by a number of Python's by multiplying with its rounded inverse.
        self._white = torch.tensor(255.0, device=device)
        self._mean = torch.tensor(config.DATA.MEAN, device=device).view(-1, 1, 1)
        self._std = torch.tensor(config.DATA.STD, device=device).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalises as torchvision's ToTensor and Normalize do, to the same bits."""
        images = images.to(torch.float32, memory_format=self._layout)
        return images.div_(self._white).sub_(self._mean).div_(self._std)


class NormalizeAndErase(Normalize):
    """8-bit images [B, C, H, W] -> normalised ones, rectangles of which are erased at random.

    Erasing draws from the generators as they stand, so whoever calls seeds them for the step.

    Args:
        config: The configuration.
        device: Where the images are.
    """

    def __init__(self, config: CfgNode, device: torch.device) -> None:
        super().__init__(config, device)
        aug = config.AUG
        self._erase = RandomErasing(aug.REPROB, mode=aug.REMODE, max_count=aug.RECOUNT, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalises, and erases."""
        return self._erase(super().__call__(images))
