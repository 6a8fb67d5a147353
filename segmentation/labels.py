"""Label maps: what their numbers mean, and how they are read and written."""

import numpy as np
from PIL import Image

from utils.errors import UserError

IGNORE = 255  # in class maps: pixels without a class
_STRETCHED = ("L;2", "L;4")  # PIL's names of what it multiplies by 85 and 17
MOST_CLASSES = 254  # that 8-bit label maps can tell apart, beside 0 and 255


def to_classes(label_map: Image.Image, num_classes: int, reduce_zero_label: bool) -> np.ndarray:
    """Decodes a label map into class numbers from 0, IGNORE where a pixel has none.

    Args:
        label_map: Grey or palette, 8 bits.
        num_classes: How many classes there are.
        reduce_zero_label: Whether label 0 means none, and label n the class n - 1; else label n means the class n.
            Label 255 means none either way.

    Returns:
        [H, W], uint8.

    Raises:
        UserError: If it is no label map, or has labels beyond the classes.
    """
    if label_map.mode not in ("L", "P"):
        raise UserError(f"its label map is {label_map.mode}, not 8-bit grey (L) or palette (P)")
    if any(tile[3] in _STRETCHED for tile in getattr(label_map, "tile", [])):
        raise UserError("its label map is grey of 2 or 4 bits, which is read with other labels: write it with 8 bits")
    labels = np.asarray(label_map)
    classes = np.where(labels == 0, IGNORE, labels - (labels != IGNORE)) if reduce_zero_label else labels
    classes = classes.astype(np.uint8)
    largest = int(classes.max(initial=0, where=classes != IGNORE))
    if largest >= num_classes:
        raise UserError(f"its label map has label {largest + reduce_zero_label}, beyond the {num_classes} classes")
    return classes


def to_label_map(classes: np.ndarray, reduce_zero_label: bool) -> np.ndarray:
    """The way back: class numbers [H, W], uint8, as the labels that `to_classes` reads."""
    if not reduce_zero_label:
        return classes
    return np.where(classes == IGNORE, 0, classes + 1).astype(np.uint8)
