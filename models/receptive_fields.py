"""Effective receptive fields: which pixels a unit in the middle of a feature map answers to.

After "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", Luo et al., 2016,
https://arxiv.org/abs/1701.04128: the gradient of the middle unit, summed over its channels, with respect to each
pixel. The field here is the gradient's absolute value, summed over the image's channels and averaged over images.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.groupmixformer import GroupMixFormer

__all__ = ["middle_pixel", "receptive_fields", "square_around"]


def receptive_fields(network: GroupMixFormer, images: Tensor, stages: Sequence[int]) -> Tensor:
    """The fields of the middle unit of some stages' outputs, summed over images.

    Args:
        network: In evaluation mode, where images do not see each other.
        images: The network's input, [B, in_chans, H, W].
        stages: Their numbers, from 0.

    Returns:
        Sums of absolute gradients, [stages, H, W].
    """
    return torch.stack([_gradient(network, images, stage).abs().sum(dim=(0, 1)) for stage in stages])


def _gradient(network: GroupMixFormer, images: Tensor, stage: int) -> Tensor:
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        (output,) = network.forward_intermediates(images, [stage], stop_early=True, intermediates_only=True)
        middle = output[:, :, output.shape[2] // 2, output.shape[3] // 2].sum()
    return torch.autograd.grad(middle, images)[0]


def middle_pixel(shape: Sequence[int], stride: int) -> tuple[int, int]:
    """Row and column of the pixel that the middle unit of a feature map is centred at.

    Args:
        shape: Height and width of the image.
        stride: Pixels between neighbouring units, of which the first is centred at the first pixel.
    """
    row, column = (-(-pixels // stride) // 2 * stride for pixels in shape)
    return row, column


def square_around(field: Tensor, middle: tuple[int, int], share: float) -> tuple[int, int, int, int]:
    """The smallest square around a pixel that holds a share of a field; it ends where the image does.

    Args:
        field: Not negative, [H, W].
        middle: Row and column of the pixel.
        share: From 0 to 1.

    Returns:
        First row, first column, and the row and column after the last.
    """
    H, W = field.shape
    rows, columns = (torch.arange(count, device=field.device) for count in (H, W))
    distances = torch.maximum((rows - middle[0]).abs()[:, None], (columns - middle[1]).abs()[None])
    within = torch.bincount(distances.flatten(), weights=field.double().flatten()).cumsum(0)
    radius = int(torch.searchsorted(within, share * within[-1]).clamp(max=len(within) - 1))
    return (
        max(middle[0] - radius, 0),
        max(middle[1] - radius, 0),
        min(middle[0] + radius + 1, H),
        min(middle[1] + radius + 1, W),
    )
