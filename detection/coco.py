"""COCO's annotation files: read, checked, and made whole where they leave out what COCO's own scoring needs."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from data.datasets import repeated
from utils.errors import UserError, listing, reason

_TEXT, _NUMBER, _EITHER, _LIST = (str,), (int, float), (int, float, str), (list,)
_WORDS = {_TEXT: "text", _NUMBER: "a number", _EITHER: "a number or text", _LIST: "[x, y, width, height]"}
# What entries have, and of which kind.
_KEYS = {
    "images": {"id": _EITHER, "file_name": _TEXT, "width": _NUMBER, "height": _NUMBER},
    "categories": {"id": _EITHER, "name": _EITHER},
    "annotations": {"image_id": _EITHER, "category_id": _EITHER, "bbox": _LIST, "area": _NUMBER, "iscrowd": _NUMBER},
}
_OPTIONAL = ("area", "iscrowd")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Within it nothing is printed: pycocotools tells of every step."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def read_coco(path: Path) -> COCO:
    """Reads annotations; they get ids from 1 on, and where they have none their box's area and 'iscrowd' 0.

    What is null, or no number such as NaN, is as good as missing. Sides of images become whole numbers, as
    pycocotools draws masks of no others.

    Raises:
        UserError: If the file is missing or malformed, or something in it refers to what is not there.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=lambda _: None)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): name another --data-path, or set DATA.TRAIN_ANNOTATIONS and "
            "DATA.VAL_ANNOTATIONS"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({reason(error)}): name a file of COCO's annotations") from None
    _check(content, path)
    for image in content["images"]:
        image["width"], image["height"] = int(image["width"]), int(image["height"])
    for number, annotation in enumerate(content["annotations"], 1):
        annotation["id"] = number  # pycocotools takes 0 for no annotation
        for key, value in (("iscrowd", 0), ("area", annotation["bbox"][2] * annotation["bbox"][3])):
            if annotation.get(key) is None:
                annotation[key] = value
    return as_coco(content)


def as_coco(content: dict[str, Any]) -> COCO:
    """pycocotools' form of annotations."""
    coco = COCO()
    coco.dataset = content
    with silence():
        coco.createIndex()
    return coco


def _check(content: Any, path: Path) -> None:
    for part, keys in _KEYS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{path} holds no list of {part}: name a file of COCO's annotations")
        for number, entry in enumerate(entries):
            for key, kind in keys.items():
                value = entry.get(key) if isinstance(entry, dict) else None
                if value is None and key not in _OPTIONAL:
                    raise UserError(f"{path}: {part}[{number}] has no {key}: add that")
                if value is not None and not isinstance(value, kind):
                    raise UserError(f"{path}: {part}[{number}] has {key} {value!r}: give {_WORDS[kind]}")
    known = {}
    for part in ("images", "categories"):
        ids = [entry["id"] for entry in content[part]]
        known[part] = set(ids)
        if not ids or len(known[part]) < len(ids):
            raise UserError(f"{path} has {len(ids)} {part} of {len(known[part])} ids: give each an id of its own")
    names = [str(entry["name"]) for entry in content["categories"]]
    if twice := repeated(names):
        raise UserError(f"{path} has several categories of the name {listing(twice)}: give each its own")
    for number, annotation in enumerate(content["annotations"]):
        for key, part in (("image_id", "images"), ("category_id", "categories")):
            if annotation[key] not in known[part]:
                raise UserError(f"{path}: annotations[{number}] has {key} {annotation[key]!r}, of none of the {part}")
        box = annotation["bbox"]
        if len(box) != 4 or not all(isinstance(side, _NUMBER) for side in box):
            raise UserError(f"{path}: annotations[{number}] has bbox {box!r}: give {_WORDS[_LIST]}")


def check_masks(coco: COCO, path: Path) -> None:
    """Refuses annotations without masks, and polygons that pycocotools cannot draw.

    Raises:
        UserError: If there is one.
    """
    for number, annotation in enumerate(coco.dataset["annotations"]):
        segmentation = annotation.get("segmentation")
        if not segmentation:
            raise UserError(
                f"{path}: annotations[{number}] has no segmentation, which mask_rcnn needs: "
                "set MODEL.DETECTOR.NAME to faster_rcnn or retinanet"
            )
        if isinstance(segmentation, list) and not _can_be_drawn(segmentation):
            raise UserError(
                f"{path}: annotations[{number}] has a segmentation that is no list of polygons of 3 points or more: "
                "give [[x, y, x, y, x, y, ...], ...], or remove the annotation"
            )


def _can_be_drawn(polygons: list[Any]) -> bool:
    """Whether polygons are whole, and the first, which pycocotools tells from a box by its length, has three points."""
    whole = all(isinstance(polygon, list) and None not in polygon for polygon in polygons)
    return whole and len(polygons[0]) >= 6


def categories(coco: COCO) -> dict[Any, str]:
    """The categories' names by id, in the order of the ids, in which classes are numbered from 0."""
    return {category: str(coco.cats[category]["name"]) for category in sorted(coco.cats)}


def decode_mask(segmentation: Any, width: int, height: int) -> NDArray[np.uint8]:
    """COCO's polygons, or run lengths as numbers or as text -> [height, width] of 0 and 1."""
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(segmentation)


def encode_mask(mask: NDArray[np.uint8]) -> dict[str, Any]:
    """[height, width] of 0 and 1 -> run lengths as text, which JSON can hold."""
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}
