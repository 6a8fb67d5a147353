"""Image files -> what the network sees of them."""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from yacs.config import CfgNode

from data.finish import Normalize
from data.transforms import Transform, eval_transform
from utils.cli import Parser
from utils.errors import UserError, reason

OWN_SIZE = 0  # stands for the size that an image has


def add_size_argument(parser: Parser) -> None:
    """Adds --size, as `Inputs` takes it."""
    parser.add_argument(
        "--size",
        type=_size,
        metavar="N",
        help="resize and crop images to N x N, or 'own' for whole images as large as they are (default: as the "
        "checkpoint is evaluated)",
    )


def _size(text: str) -> int:
    if text == "own":
        return OWN_SIZE
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor 'own'")
    return int(text)


class Inputs:
    """Reads images as an evaluation does.

    Args:
        config: Of the network.
        size: Height and width to resize and crop to, `OWN_SIZE` for each image's own, None for the configuration's.
        device: Where the network is.
    """

    def __init__(self, config: CfgNode, size: int | None, device: torch.device) -> None:
        config = config.clone()
        config.DATA.IMG_SIZE = size or config.DATA.IMG_SIZE
        transform = eval_transform(config)
        self._transform = Transform(transform.decode, pil_to_tensor) if size == OWN_SIZE else transform
        self._finish, self._device = Normalize(config, device), device

    def read(self, path: Path) -> Tensor:
        """What the network sees of a file, in 8-bit pixels [C, H, W].

        Raises:
            UserError: If it is no image, or a broken one.
        """
        try:
            with Image.open(path) as image:
                return self._transform.augment(self._transform.decode(image))
        except Exception as error:  # decoders raise errors of every kind at garbage
            cause = getattr(error, "strerror", None) or reason(error)
            raise UserError(f"{path} cannot be read as an image ({cause}): name another") from None

    def batch(self, pixels: Tensor) -> Tensor:
        """The network's input, [1, C, H, W], from the 8-bit pixels of an image."""
        return self._finish(pixels[None].to(self._device))
