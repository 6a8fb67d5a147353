"""Ways to look at images of any size: whole or through a sliding window, at one size or at several, mirrored too."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from segmentation.sizes import scaled_size


class SlidingWindow(nn.Module):
    """Means of a network's logits over overlapping square windows, the last ones moved back to the image's edge.

    Args:
        network: Images [B, C, H, W] -> logits [B, classes, H, W].
        window: Side of a window; an image that is smaller is one window.
        stride: Pixels from one window to the next, at most its side.
    """

    def __init__(self, network: nn.Module, window: int, stride: int) -> None:
        super().__init__()
        self.network, self._window, self._stride = network, window, stride

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes, H, W] of images [B, C, H, W]."""
        height, width = images.shape[-2:]
        total, count = None, images.new_zeros(1, 1, height, width)
        for top in self._starts(height):
            for left in self._starts(width):
                place = (..., slice(top, top + self._window), slice(left, left + self._window))
                logits = self.network(images[place])
                if total is None:
                    total = logits.new_zeros(*logits.shape[:2], height, width)
                total[place] += logits
                count[place] += 1
        return total / count

    def _starts(self, length: int) -> list[int]:
        last = max(length - self._window, 0)
        return [*range(0, last, self._stride), last]


class AtScales(nn.Module):
    """Looks at images scaled to a size, and answers at their own.

    With several scales, or mirrored images too, the answer is the logarithm of the mean probabilities.

    Args:
        network: Images [B, C, H, W] -> logits [B, classes, H, W].
        short_side: What an image's short side becomes at scale 1; 0 for its own length.
        long_side: What its long side becomes at most at scale 1.
        scales: To look at.
        flip: Whether to look at mirrored images, too.
    """

    def __init__(
        self, network: nn.Module, short_side: int, long_side: int, scales: Sequence[float] = (1.0,), flip: bool = False
    ) -> None:
        super().__init__()
        self.network, self._short_side, self._long_side = network, short_side, long_side
        self._scales, self._flip = scales, flip

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes, H, W] of images [B, C, H, W], or log-probabilities."""
        looks = [(scale, mirrored) for scale in self._scales for mirrored in ([False, True] if self._flip else [False])]
        if len(looks) == 1:
            return self._look(images, *looks[0])
        total = sum(self._look(images, *look).softmax(dim=1) for look in looks)
        return (total / len(looks)).clamp(min=torch.finfo(total.dtype).tiny).log()  # of what no look believes, not -inf

    def _look(self, images: Tensor, scale: float, mirrored: bool) -> Tensor:
        size = images.shape[-2:]
        scaled = _resize(images, scaled_size(size, self._short_side, self._long_side, scale))
        logits = self.network(scaled.flip(-1)).flip(-1) if mirrored else self.network(scaled)
        return _resize(logits, size)


def _resize(values: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    shrinks = size[0] < values.shape[-2]
    return F.interpolate(values, size=tuple(size), mode="bilinear", align_corners=False, antialias=shrinks)


def build_predictor(config: CfgNode, network: nn.Module) -> nn.Module:
    """The configured way to look at validation images, around a network."""
    test = config.TEST
    look = SlidingWindow(network, test.WINDOW, test.STRIDE) if test.SLIDING_WINDOW else network
    scales, flip = (test.SCALES, test.FLIP) if test.MULTI_SCALE else ((1.0,), False)
    return AtScales(look, config.DATA.SHORT_SIDE, config.DATA.LONG_SIDE, scales, flip)
