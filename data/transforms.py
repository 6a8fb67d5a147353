"""Train and evaluation transforms from the configuration, on timm's `create_transform`."""

from collections.abc import Callable

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from yacs.config import CfgNode

from utils.errors import UserError

Transform = Callable[[Image.Image], Tensor]

_EVAL_CROP = 224 / 256  # the short side is resized to 256 for a crop of 224, and in proportion for other sizes


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
    """Random crop, flip, automatic augmentation or colour jitter, normalisation, random erasing.

    Raises:
        UserError: If timm does not know the automatic augmentation.
    """
    aug = config.AUG
    try:
        return create_transform(
            config.DATA.IMG_SIZE,
            is_training=True,
            scale=tuple(aug.SCALE),
            ratio=tuple(aug.RATIO),
            hflip=aug.HFLIP,
            color_jitter=aug.COLOR_JITTER if aug.COLOR_JITTER > 0 else None,
            auto_augment=None if aug.AUTO_AUGMENT == "none" else aug.AUTO_AUGMENT,
            interpolation=config.DATA.INTERPOLATION,
            mean=tuple(config.DATA.MEAN),
            std=tuple(config.DATA.STD),
            re_prob=aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"AUG.AUTO_AUGMENT is {aug.AUTO_AUGMENT!r}, which timm does not know ({error!r}): "
            "write it as rand-m9-mstd0.5-inc1, augmix-m3-w3, original, or none"
        ) from None


def eval_transform(config: CfgNode) -> Transform:
    """Resize and centre crop, or without TEST.CROP the whole image squashed into the square; normalisation."""
    crop = (
        {"crop_pct": _EVAL_CROP, "crop_mode": "center"}
        if config.TEST.CROP
        else {"crop_pct": 1.0, "crop_mode": "squash"}
    )
    return create_transform(
        config.DATA.IMG_SIZE,
        is_training=False,
        interpolation=config.DATA.INTERPOLATION,
        mean=tuple(config.DATA.MEAN),
        std=tuple(config.DATA.STD),
        **crop,
    )
