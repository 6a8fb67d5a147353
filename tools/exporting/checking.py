"""Whether an exported file answers as the network does."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tools.exporting.capture import SMALLEST
from utils.errors import UserError

# Normalised images [B, C, H, W] -> logits [B, classes], by the runtime of an exported file.
Run = Callable[[Tensor], Tensor]

# By precision: the largest difference of logits over the largest logit.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "int8": 2e-1}


def sizes_to_check(size: int) -> list[tuple[int, int, int]]:
    """Batch, height and width of three inputs: the usual one, the smallest wide one, and an odd one."""
    return [(1, size, size), (2, SMALLEST, SMALLEST + 16), (3, size + 5 | 1, max(size * 2 // 3, SMALLEST) | 1)]


def check_answers(run: Run, network: nn.Module, in_chans: int, size: int, tolerance: float) -> float:
    """Compares a file's answers with the network's, on noise of three sizes and numbers of images, in both layouts.

    Args:
        run: Runs the file.
        network: The float32 network, neither fused nor rounded.
        in_chans: Channels of its images.
        size: Their usual height and width.
        tolerance: How far apart they may be: the largest difference of logits over the largest logit.

    Returns:
        How far apart they are.

    Raises:
        UserError: If they are further apart.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch, height, width in sizes_to_check(size):
        images = torch.randn(batch, in_chans, height, width, generator=generator)
        if batch > 1:  # as loaders give them
            images = images.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            wanted, given = network(images), run(images)
        where = f"on {batch} image(s) of {height} x {width}"
        if given.shape != wanted.shape:
            raise UserError(f"the exported file gives {list(given.shape)} {where}, not {list(wanted.shape)}: removed")
        difference = ((given - wanted).abs().max() / wanted.abs().max()).item()
        if not difference <= tolerance:  # nor a NaN
            raise UserError(
                f"the exported file's logits are {difference:.2g} of the largest one off {where}, and {tolerance:g} is "
                "allowed: it was removed; try another --precision, or --no-fuse"
            )
        worst = max(worst, difference)
    return worst
