"""Small COCO-format data sets and configurations of detectors that several tests share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from yacs.config import CfgNode

from detection.config import default_config
from utils.config import merge, merge_options

CATEGORIES = {2: "square", 5: "disc", 90: "bar"}  # with gaps between their ids
COLOURS = {2: (220, 60, 50), 5: (60, 180, 90), 90: (70, 90, 220)}
SIZES = ((64, 48), (48, 64), (56, 56))  # width and height

TINY = """\
DATA:
  BATCH_SIZE: 2
  SHORT_SIDES: [32, 48]
  LONG_SIDE: 64
  NUM_WORKERS: 0
MODEL:
  NAME: tiny
  FREEZE_STATISTICS: False
  GMA:
    EMBEDDING_DIMS: [40, 40, 40, 40]
    SERIAL_DEPTHS: [1, 1, 1, 1]
    MLP_RATIOS: [1, 1, 1, 1]
    DROP_PATH_RATE: 0.2
  DETECTOR:
    FPN_CHANNELS: 16
    ANCHOR_SIZES: [8, 16, 24, 32, 48]
    HEAD_WIDTH: 32
    PROPOSALS: 20
    RPN_SAMPLES: 16
    BOX_SAMPLES: 8
TRAIN:
  EPOCHS: 2
  WARMUP_UPDATES: 2
  SAVE_UPDATES: 2
  BASE_LR: 1.0e-3
  LR_BATCH: 2
  EMA_DECAY: 0.5
  LR_SCHEDULER:
    MILESTONES: [1]
AUG:
  COLOR_JITTER: 0.2
DEVICE: cpu
KEEP: 9
PRINT_FREQ: 1
"""


def configured(*options: Any, data: Path | str = "") -> CfgNode:
    """The configuration of a tiny detector, with keys overridden as --opts does it."""
    config = default_config()
    merge(config, yaml.safe_load(TINY), "the tests")
    merge_options(config, [str(word) for word in options])
    config.DATA.DATA_PATH = str(data)
    return config


def shape(category: int, width: int, height: int, generator: np.random.Generator) -> np.ndarray:
    """The mask [H, W] of a random object."""
    side = int(generator.integers(12, 28))
    x, y = generator.uniform(side / 2, width - side / 2), generator.uniform(side / 2, height - side / 2)
    rows, columns = np.mgrid[:height, :width] + 0.5
    if category == 5:
        return ((columns - x) ** 2 + (rows - y) ** 2 <= side**2 / 4).astype(np.uint8)
    flat = 3 if category == 90 else 1
    return ((abs(columns - x) <= side / 2) & (abs(rows - y) <= side / 2 / flat)).astype(np.uint8)


def write_coco(
    root: Path, split: str, images: int, seed: int, edit: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Writes root/<split>/*.png and root/annotations/instances_<split>.json: every fourth image has no object."""
    generator = np.random.default_rng(seed)
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    for number in range(images):
        width, height = SIZES[number % len(SIZES)]
        pixels = generator.integers(90, 130, (height, width, 3)).astype(np.uint8)
        name, identity = f"{number:03d}.png", 1000 + 7 * number
        content["images"].append({"id": identity, "file_name": name, "width": width, "height": height})
        for _ in range(0 if number % 4 == 3 else 1 + number % 3):
            category = int(generator.choice(list(CATEGORIES)))
            mask = shape(category, width, height, generator)
            pixels[mask > 0] = COLOURS[category]
            encoded = coco_mask.encode(np.asfortranarray(mask))
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),  # from 0 on, which pycocotools would take for no match
                    "image_id": identity,
                    "category_id": category,
                    "bbox": coco_mask.toBbox(encoded).tolist(),
                    "area": int(coco_mask.area(encoded)),
                    "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(root / split / name)
    if edit:
        edit(content)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def add_crowd(content: dict[str, Any]) -> None:
    """Makes a crowd of the left half of the first image."""
    image = content["images"][0]
    width, height = image["width"], image["height"]
    half = np.zeros((height, width), np.uint8)
    half[:, : width // 2] = 1
    runs = [0, height * (width // 2), height * (width - width // 2)]  # column by column: of 0, of 1, of 0
    content["annotations"].append(
        {
            "id": len(content["annotations"]),
            "image_id": image["id"],
            "category_id": 5,
            "bbox": [0, 0, width // 2, height],
            "area": int(half.sum()),
            "segmentation": {"size": [height, width], "counts": runs},
            "iscrowd": 1,
        }
    )
