"""The ways of loading training images that are compared, each cut into stages.

As the published code loads (PIL, timm's transforms down to normalised and erased floats, torch's collating), and as
DATA.LOADING exact and fast do, which hand over 8-bit pixels.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch.utils.data import default_collate
from torchvision.transforms import Compose
from yacs.config import CfgNode

from data.build import collate
from data.transforms import Transform, image_mode, train_settings, train_transform
from utils.config import check

STAGES = ("seed", "read", "decode", "crop and resize", "augment", "to tensor", "collate")


@dataclass(frozen=True)
class Way:
    """A way of loading: what each stage makes of what the one before it gave, and how samples become a batch."""

    stages: dict[str, Callable[[Any], Any]]
    collate: Callable[[list[Any]], Any]
    is_seeded: bool


def loading_ways(config: CfgNode) -> dict[str, Way]:
    """The ways of loading by name, with the augmentation of a configuration.

    Raises:
        UserError: If DATA.LOADING fast cannot do it.
    """
    aug = config.AUG
    published = create_transform(
        **train_settings(config),
        std=tuple(config.DATA.STD),
        re_prob=aug.REPROB,
        re_mode=aug.REMODE,
        re_count=aug.RECOUNT,
    ).transforms
    ends_at = next(place for place, step in enumerate(published) if type(step).__name__ == "MaybeToTensor")
    ways = {
        "published": Way(
            {
                "read": _read,
                "decode": partial(_convert, image_mode(config)),
                "crop and resize": published[0],
                "augment": Compose(published[1:ends_at]),
                "to tensor": Compose(published[ends_at:]),
            },
            default_collate,
            is_seeded=False,
        )
    }
    for name in ("exact", "fast"):
        config = config.clone()
        config.DATA.LOADING = name
        check(config)
        transform = train_transform(config)
        first, *others, last = transform.augment.transforms
        stages = {
            "read": _read,
            "decode": partial(_decode, transform),
            "crop and resize": first,
            "augment": Compose(others),
            "to tensor": last,
        }
        ways[name] = Way(stages, collate, is_seeded=True)
    return ways


def _read(path: str) -> io.BytesIO:
    return io.BytesIO(Path(path).read_bytes())


def _convert(mode: str, file: io.BytesIO) -> Image.Image:
    return Image.open(file).convert(mode)


def _decode(transform: Transform, file: io.BytesIO) -> Image.Image:
    return transform.decode(Image.open(file))
