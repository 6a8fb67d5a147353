"""The size at which an image is looked at, in training and in evaluation."""

from collections.abc import Sequence


def scaled_size(size: Sequence[int], short_side: int, long_side: int, factor: float = 1.0) -> list[int]:
    """Height and width of an image that is scaled to its sides, times a factor.

    Args:
        size: Its height and width.
        short_side: Pixels, that its short side becomes at factor 1; 0 to leave it as it is.
        long_side: Pixels, that its long side becomes at most at factor 1, where the short side has to give way.
        factor: Above 0.
    """
    ratio = factor * (min(short_side / min(size), long_side / max(size)) if short_side else 1.0)
    return [max(round(side * ratio), 1) for side in size]
