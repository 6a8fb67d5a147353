"""A small tree of images with label maps, and a small configuration of segmentation."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from yacs.config import CfgNode

from segmentation.config import default_config
from utils.config import merge

CLASSES = ["ground", "red", "blue"]
_COLOURS = np.array([(90, 150, 90), (220, 60, 50), (50, 80, 220)])
TINY: dict[str, Any] = {
    "DATA": {"BATCH_SIZE": 4, "IMG_SIZE": 48, "SHORT_SIDE": 48, "LONG_SIDE": 96, "NUM_WORKERS": 0},
    "MODEL": {
        "NAME": "tiny",
        "GMA": {
            "NUM_CLASSES": 0,
            "EMBEDDING_DIMS": [40, 40, 40, 40],
            "SERIAL_DEPTHS": [1, 1, 1, 1],
            "MLP_RATIOS": [2, 2, 2, 2],
            "DROP_PATH_RATE": 0.2,
        },
        "DECODER": {"CHANNELS": 32, "AUX_CHANNELS": 8},
    },
    "TRAIN": {"EPOCHS": 3, "EPOCH_UPDATES": 3, "WARMUP_UPDATES": 0, "BASE_LR": 3e-3, "LR_BATCH": 4, "EMA_DECAY": 0.5},
    "TEST": {"SCALES": [0.5, 1.0], "WINDOW": 32, "STRIDE": 20},
    "DEVICE": "cpu",
    "KEEP": 9,
    "PRINT_FREQ": 1,
}

FPN = {"MODEL__DECODER__NAME": "fpn", "MODEL__DECODER__CHANNELS": 128}  # for `tiny`


def tiny(**values: Any) -> CfgNode:
    """The small configuration with some keys set; `__` stands for the dot of a dotted name."""
    config = default_config()
    merge(config, TINY, "the tests")
    for key, value in values.items():
        nested = value
        for part in reversed(key.split("__")):
            nested = {part: nested}
        merge(config, nested, "the tests")
    return config


def pair(number: int, width: int = 56, height: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """An image of noisy rectangles and its label map: 0 along the edges, 1 the ground, 2 and 3 the rectangles."""
    generator = np.random.default_rng(number)
    labels = np.ones((height, width), np.uint8)
    for label in (2, 3):
        top, left = generator.integers(height // 2), generator.integers(width // 2)
        labels[top : top + height // 2, left : left + width // 2] = label
    pixels = _COLOURS[labels - 1] + generator.normal(0, 10, (height, width, 3))
    labels[:2] = labels[:, :2] = 0
    return pixels.clip(0, 255).astype(np.uint8), labels


def write_pairs(root: Path, split: str, sizes: list[tuple[int, int]], seed: int) -> None:
    """Writes images of the sizes (width, height) with their label maps."""
    images, maps = root / "images" / split, root / "annotations" / split
    for folder in (images, maps):
        folder.mkdir(parents=True)
    for number, (width, height) in enumerate(sizes):
        pixels, labels = pair(seed + number, width, height)
        Image.fromarray(pixels).save(images / f"{number:02d}.png")
        Image.fromarray(labels).save(maps / f"{number:02d}.png")


def write_tree(root: Path) -> None:
    """Writes ten training images and five validation images of several sizes."""
    write_pairs(root, "training", [(56, 48), (48, 70)] * 5, seed=0)
    write_pairs(root, "validation", [(56, 48), (49, 65), (64, 64), (97, 33), (48, 48)], seed=100)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
