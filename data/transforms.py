"""Train and evaluation transforms from the configuration, on timm's `create_transform`.

They end in 8-bit pixels; `data/finish.py` does the rest to whole batches.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import Compose
from yacs.config import CfgNode

from data.decoding import as_mode
from data.fast import FastCut, FastResize
from utils.errors import UserError, listing

_EVAL_CROP = 224 / 256  # the short side is resized to 256 for a crop of 224, and in proportion for other sizes


@dataclass(frozen=True)
class Transform:
    """An image as a source opens it -> 8-bit pixels [C, H, W], which lie as [H, W, C] in memory.

    Attributes:
        decode: Reads the whole file; raises an error of any kind where it is broken.
        augment: What is done to the decoded image.
    """

    decode: Callable[[Image.Image], Image.Image]
    augment: Callable[[Image.Image], Tensor]


def image_mode(config: CfgNode) -> str:
    """PIL's mode of the images that the network takes.

    Raises:
        UserError: If no mode has that many channels.
    """
    modes = {1: "L", 3: "RGB"}
    if config.MODEL.GMA.IN_DIM not in modes:
        raise UserError(f"MODEL.GMA.IN_DIM is {config.MODEL.GMA.IN_DIM}: image files give 1 (grey) or 3 (RGB) channels")
    return modes[config.MODEL.GMA.IN_DIM]


def train_transform(config: CfgNode) -> Transform:
    """Random crop, flip, automatic augmentation or colour jitter, decoded and cropped as DATA.LOADING says.

    Raises:
        UserError: If timm does not know the automatic augmentation.
    """
    mode, name = image_mode(config), config.AUG.AUTO_AUGMENT
    try:
        if ignored := [part for part in name.split("-")[1:] if not re.search(r"\d", part) and not part.startswith("t")]:
            raise ValueError(listing(ignored))  # which timm passes over
        transform = create_transform(**train_settings(config), normalize=False)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"AUG.AUTO_AUGMENT is {name!r}, which timm does not know ({error!r}): "
            "write it as rand-m9-mstd0.5-inc1, augmix-m3-w3, original, 3a, or none"
        ) from None
    if config.DATA.LOADING == "exact":
        return Transform(partial(as_mode, mode=mode), transform)
    crop, *others = transform.transforms
    return Transform(FastCut(crop, mode), Compose([FastResize(crop), *others]))


def train_settings(config: CfgNode) -> dict[str, Any]:
    """The configured crops, flips and augmentations of training, as timm's `create_transform` takes them."""
    aug = config.AUG
    return {
        "input_size": config.DATA.IMG_SIZE,
        "is_training": True,
        "scale": tuple(aug.SCALE),
        "ratio": tuple(aug.RATIO),
        "hflip": aug.HFLIP,
        "color_jitter": aug.COLOR_JITTER if aug.COLOR_JITTER > 0 else None,
        "auto_augment": None if aug.AUTO_AUGMENT == "none" else aug.AUTO_AUGMENT,
        "interpolation": config.DATA.INTERPOLATION,
        "mean": tuple(config.DATA.MEAN),
    }


def eval_transform(config: CfgNode) -> Transform:
    """Resize and centre crop, or without TEST.CROP the whole image squashed into the square."""
    transform = create_transform(**eval_settings(config), normalize=False)
    return Transform(partial(as_mode, mode=image_mode(config)), transform)


def eval_settings(config: CfgNode) -> dict[str, Any]:
    """The configured resizing and cropping of evaluation, as timm's `create_transform` takes them."""
    return {
        "input_size": config.DATA.IMG_SIZE,
        "is_training": False,
        "interpolation": config.DATA.INTERPOLATION,
        "crop_pct": _EVAL_CROP if config.TEST.CROP else 1.0,
        "crop_mode": "center" if config.TEST.CROP else "squash",
    }
