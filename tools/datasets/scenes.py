"""Compose scenes of digits: scaled, turned and overlapping on textured grounds, with the mask of each.

A scene is a function of its digits and of one number, so the same scenes come out every time.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from utils.seeding import number_for

SIZE = 128  # pixels on a side
CLASSES = ("background", *map(str, range(10)))  # their labels in the maps are 1 to 11
UNCERTAIN = 0  # the label of pixels at the edge of a digit's ink, which ADE20K leaves out of the score

_CLASS_LINES = "".join(f"{name}\n" for name in CLASSES)
_SEED = 0
_ADE_SPLITS = {"train": "training", "val": "validation"}
_COCO_SPLITS = {"train": "train2017", "val": "val2017"}
_COUNT_SHARES = (0.04, 0.20, 0.28, 0.26, 0.14, 0.08)  # of scenes for which none, 1, .. 5 digits are tried
_SIDES = (48, 80)  # pixels of a digit's square
_TURN = 12.0  # degrees, at most; 6 and 9 stay apart
_SLANT = 0.15  # by which the top may lean against the bottom, as a share of the height
_LEAST_INK = (0.14, 0.28)  # of an enlarged scan, where ink begins: thick or thin strokes
_EDGE = 0.14  # more of it, and there is nothing but ink
_FAINT = 0.4  # brightness of the faintest ink, as a share of its colour's
_CERTAIN = (0.25, 0.75)  # share of ink up to which a pixel is ground, and from which it is the digit
_LEAST_VISIBLE = 0.9  # of each digit's mask
_PLACES = 8  # that are tried for a digit
_SHADE = 0.4  # share by which light and shadow differ
_EFFORT = 1  # of 9, that PNG spends on small files; noise does not get much smaller with more
_COLOURS = 12  # that are tried for a digit's ink
_GROUND = 130  # of 255: its brightest colours
_INKS = (110, 255)  # their darkest and brightest colours

Plane = NDArray[np.float32]  # [SIZE, SIZE]
Pixels = NDArray[np.float32]  # [SIZE, SIZE, 3], 0 to 255
Colours = NDArray[np.float32]  # [N, 3]
Layer = NDArray[np.float32]  # [2, H, W]: the share of ink of each pixel, and how bright it is
Mask = NDArray[np.bool_]  # [SIZE, SIZE]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Digits:
    """Scans to compose scenes of.

    Attributes:
        images: [N, 8, 8], ink is 255.
        labels: [N], 0 to 9.
        numbers: [N], the scans' numbers among all.
    """

    images: Bytes
    labels: NDArray[np.int64]
    numbers: NDArray[np.int64]


@dataclass(frozen=True)
class Placed:
    """A digit in a scene.

    Attributes:
        label: 0 to 9.
        number: The scan's number.
        mask: What is seen of it.
    """

    label: int
    number: int
    mask: Mask


@dataclass(frozen=True)
class Scene:
    """A composed picture.

    Attributes:
        image: [SIZE, SIZE, 3].
        labels: [SIZE, SIZE]: 1 is the ground, 2 to 11 are the digits, 0 is an uncertain pixel at an edge.
        digits: Those in it, from the lowest to the topmost.
    """

    image: Bytes
    labels: Bytes
    digits: list[Placed]


def compose(digits: Digits, generator: Generator) -> Scene:
    """Composes a scene of some of the digits; one that would hide too much of others is left out."""
    pixels, colours = _ground(generator)
    chosen = generator.choice(len(digits.labels), generator.choice(len(_COUNT_SHARES), p=_COUNT_SHARES), replace=False)
    layers, placed = [], []
    for index in chosen:
        stamp = _stamp(digits.images[index], generator)
        if (layer := _place(stamp, layers, generator)) is not None:
            layers.append(layer)
            placed.append(index)
    labels = np.full((SIZE, SIZE), 1, np.uint8)
    for index, (ink, shade) in zip(placed, layers, strict=True):
        colours = np.vstack([colours, _colour(colours, generator)])
        pixels += ink[..., None] * (colours[-1] * shade[..., None] - pixels)
        labels[ink > _CERTAIN[0]] = UNCERTAIN
        labels[ink >= _CERTAIN[1]] = digits.labels[index] + 2
    pixels *= 1 + _SHADE * (_noise(generator)[..., None] - 0.5)
    pixels += generator.uniform(1, 5) * generator.standard_normal(pixels.shape, np.float32)
    return Scene(
        np.rint(pixels).clip(0, 255).astype(np.uint8),
        labels,
        [
            Placed(int(digits.labels[index]), int(digits.numbers[index]), mask)
            for index, mask in zip(placed, _visible(layers), strict=True)
        ],
    )


def _stamp(scan: Bytes, generator: Generator) -> Layer:
    """A scan enlarged, slanted and turned, cut to where there is ink."""
    side = int(generator.integers(*_SIDES, endpoint=True))
    width = round(side * generator.uniform(0.8, 1.1))
    margin = np.pad(scan, 1)  # so that ink ends softly at the scan's border
    large = Image.fromarray(margin).resize((width * 10 // 8, side * 10 // 8), Image.Resampling.BICUBIC)
    slant, room = generator.uniform(-_SLANT, _SLANT), round(_SLANT * large.height)
    slanted = large.transform(
        (large.width + room, large.height),
        Image.Transform.AFFINE,
        (1, slant, -(room + slant * large.height) / 2, 0, 1, 0),
        Image.Resampling.BICUBIC,
    )
    turned = slanted.rotate(generator.uniform(-_TURN, _TURN), Image.Resampling.BICUBIC, expand=True)
    grey = np.asarray(turned, np.float32) / 255
    least = np.float32(generator.uniform(*_LEAST_INK))
    full = least + np.float32(_EDGE)
    ink = ((grey - least) / (full - least)).clip(0, 1)
    shade = _FAINT + (1 - _FAINT) * ((grey - full) / (1 - full)).clip(0, 1)
    rows, columns = np.nonzero(ink.any(1))[0], np.nonzero(ink.any(0))[0]
    return np.stack([ink, shade])[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(stamp: Layer, below: list[Layer], generator: Generator) -> Layer | None:
    """A layer with the stamp at a random place that hides little of the digits below; None if no try finds one."""
    height, width = stamp.shape[1:]
    sizes = [(ink > 0.5).sum() for ink, _ in below]
    for _ in range(_PLACES):
        top, left = generator.integers(SIZE - height + 1), generator.integers(SIZE - width + 1)
        layer = np.zeros((2, SIZE, SIZE), np.float32)
        layer[:, top : top + height, left : left + width] = stamp
        seen = _visible([*below, layer])
        if all(mask.sum() >= _LEAST_VISIBLE * size for mask, size in zip(seen, sizes, strict=False)):
            return layer
    return None


def _visible(layers: list[Layer]) -> list[Mask]:
    """What is seen of each digit, from the lowest to the topmost."""
    masks, hidden = [], np.zeros((SIZE, SIZE), bool)
    for ink, _ in reversed(layers):
        whole = ink > 0.5
        masks.append(whole & ~hidden)
        hidden |= whole
    return masks[::-1]


def _ground(generator: Generator) -> tuple[Pixels, Colours]:
    """A textured ground [SIZE, SIZE, 3] between two colours, and those two [2, 3]."""
    colours = _GROUND * generator.random((2, 3), np.float32)
    colours[1] = (colours[0] + generator.uniform(-90, 90, 3)).clip(0, _GROUND)
    texture = sum(
        weight * part
        for weight, part in zip(
            generator.dirichlet([0.4, 0.5, 0.8]).astype(np.float32),
            (_gradient(generator), _grating(generator), _noise(generator)),
            strict=True,
        )
    )
    texture = (texture - texture.min()) / np.ptp(texture)
    return colours[0] + texture[..., None] * (colours[1] - colours[0]), colours


def _across(generator: Generator) -> Plane:
    """The distance of each pixel along a random direction; the scene is 1 wide."""
    angle = generator.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32) / SIZE
    return np.float32(np.cos(angle)) * columns + np.float32(np.sin(angle)) * rows


def _gradient(generator: Generator) -> Plane:
    distance = _across(generator)
    return (distance - distance.min()) / np.ptp(distance)


def _grating(generator: Generator) -> Plane:
    return 0.5 + 0.5 * np.sin(2 * np.pi * (generator.uniform(2, 16) * _across(generator) + generator.uniform()))


def _noise(generator: Generator) -> Plane:
    """Noise of several scales, each half as strong as the next coarser one."""
    total = np.zeros((SIZE, SIZE), np.float32)
    for power in range(int(generator.integers(1, 4)), 7):
        coarse = Image.fromarray(generator.random((2**power, 2**power), np.float32))
        total += np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 2**power
    return (total - total.min()) / np.ptp(total)


def _colour(others: Colours, generator: Generator) -> Colours:
    """The one of a few random bright colours that is most unlike all others."""
    tried = _INKS[0] + (_INKS[1] - _INKS[0]) * generator.random((_COLOURS, 3), np.float32)
    return tried[np.linalg.norm(tried[:, None] - others, axis=2).min(1).argmax()]


def are_scenes(root: Path) -> bool:
    """Whether a folder holds what `write_scenes` writes and nothing else, rather than data sets of the same names."""
    lists, classes = (root / "coco" / "annotations").glob("*"), root / "ade" / "classes.txt"
    return (
        {path.name for path in root.iterdir()} == {"ade", "coco"}
        and {path.name for path in lists} == {f"instances_{split}.json" for split in _COCO_SPLITS.values()}
        and classes.is_file()
        and classes.read_bytes() == _CLASS_LINES.encode()
    )


def write_scenes(root: Path, split: str, count: int, digits: Digits) -> int:
    """Writes a split of scenes as root/ade and root/coco, whose images are the same files.

    Args:
        root: Where to.
        split: 'train' or 'val'.
        count: How many.
        digits: What to compose them of.

    Returns:
        The number of digits in them.
    """
    images, maps = (root / "ade" / kind / _ADE_SPLITS[split] for kind in ("images", "annotations"))
    linked, lists = root / "coco" / _COCO_SPLITS[split], root / "coco" / "annotations"
    for folder in (images, maps, linked, lists):
        folder.mkdir(parents=True, exist_ok=True)
    entries, annotations = [], []
    for number in tqdm(range(1, count + 1), f"{split} scenes", disable=None):
        scene = compose(digits, np.random.default_rng(number_for(_SEED, f"scene of {split}", number)))
        name = f"{number:05d}.png"
        Image.fromarray(scene.image).save(images / name, compress_level=_EFFORT)
        Image.fromarray(scene.labels).save(maps / name, compress_level=_EFFORT)
        (linked / name).hardlink_to(images / name)
        entries.append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
        for digit in scene.digits:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **_annotation(digit)})
    (root / "ade" / "classes.txt").write_text(_CLASS_LINES)
    instances = {
        "info": {"description": "Scenes of scikit-learn's handwritten digits; 'digit' is the number of the scan"},
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)],
    }
    (lists / f"instances_{_COCO_SPLITS[split]}.json").write_text(json.dumps(instances))
    return len(annotations)


def _annotation(digit: Placed) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(digit.mask, np.uint8))
    return {
        "category_id": digit.label + 1,
        "bbox": coco_mask.toBbox(encoded).tolist(),
        "area": int(coco_mask.area(encoded)),
        "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
        "iscrowd": 0,
        "digit": digit.number,
    }
