"""What is found by all ranks -> COCO's average precision, computed once."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from detection.batch import Objects
from detection.coco import as_coco, categories, encode_mask, silence
from utils.dist import gather_objects

_OBJECT = 0.5  # least probability of an object's pixels
# What COCOeval sums up, by its place there, and what to call it.
STATS = {
    "ap": (0, "AP"),  # mean over overlaps from 0.5 to 0.95
    "ap50": (1, "AP50"),
    "ap75": (2, "AP75"),
    "ap_small": (3, "APs"),  # objects of up to 32 x 32 pixels
    "ap_medium": (4, "APm"),
    "ap_large": (5, "APl"),  # of more than 96 x 96
    "ar": (8, "AR"),  # mean recall, of at most 100 in an image
}
_FOLLOWED = ("ap", "ap50", "ap75")  # in training


def _measures(kind: str) -> dict[str, str]:
    return {f"{kind}_{name}": f"{kind} {STATS[name][1]}" for name in _FOLLOWED}


@dataclass(frozen=True, kw_only=True)
class BoxScore:
    """What a detector reached on a data set, in percent; not a number where no such object is to be found.

    Attributes:
        measures: As in `TaskScore`.
        images: Number of images, each counted once.
        loss: None is computed.
        box_ap_of_classes: Average precision by category, in the order of their ids.
    """

    measures: ClassVar[dict[str, str]] = _measures("box")
    images: int
    loss: float = math.nan
    box_ap: float
    box_ap50: float
    box_ap75: float
    box_ap_small: float
    box_ap_medium: float
    box_ap_large: float
    box_ar: float
    box_ap_of_classes: list[float]


@dataclass(frozen=True, kw_only=True)
class MaskScore(BoxScore):
    """As `BoxScore`, by the overlap of masks too.

    Attributes:
        mask_ap_of_classes: Average precision by category, in the order of their ids.
    """

    measures: ClassVar[dict[str, str]] = _measures("box") | _measures("mask")
    mask_ap: float
    mask_ap50: float
    mask_ap75: float
    mask_ap_small: float
    mask_ap_medium: float
    mask_ap_large: float
    mask_ar: float
    mask_ap_of_classes: list[float]


class DetectionSums:
    """Collects what is found, in the form of COCO's results, and scores all of it once.

    Args:
        coco: The truth.
        classes: The network's classes by number.
        with_masks: Whether masks are scored.
        is_main: Whether this is the rank that scores.
    """

    def __init__(self, coco: COCO, classes: list[str], with_masks: bool, is_main: bool) -> None:
        ids = {name: category for category, name in categories(coco).items()}
        self._coco, self._with_masks, self._is_main = coco, with_masks, is_main
        self._images = [image["id"] for image in coco.dataset["images"]]
        self._categories = [ids.get(name) for name in classes]
        self._seen, self._found = 0, []
        self.results: list[dict[str, Any]] = []

    def add(self, outputs: list[Objects], targets: Tensor) -> None:
        """Adds a batch: what is found in each image, and the images' numbers in the data set [B]."""
        for objects, number in zip(outputs, targets.tolist(), strict=True):
            self._seen += 1
            self._found += self._as_results(self._images[number], objects)

    def _as_results(self, image: Any, objects: Objects) -> list[dict[str, Any]]:
        boxes = objects["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        masks = (objects["masks"][:, 0] >= _OBJECT).byte().cpu().numpy() if self._with_masks else None
        results = []
        rows = zip(boxes.tolist(), objects["labels"].tolist(), objects["scores"].tolist(), strict=True)
        for number, (box, label, score) in enumerate(rows):
            if (category := self._categories[label]) is not None:  # else the data has no such class
                result = {"image_id": image, "category_id": category, "bbox": box, "score": score}
                results.append(result if masks is None else {**result, "segmentation": encode_mask(masks[number])})
        return results

    def total(self) -> BoxScore:
        """The score over all ranks; every rank must ask. The `results` are all ranks' from then on."""
        of_ranks = gather_objects((self._seen, self._found))
        self.results = [result for _, found in of_ranks for result in found]
        images = sum(seen for seen, _ in of_ranks)
        own = score(self._coco, self.results, images, self._with_masks) if self._is_main else None
        return gather_objects(own)[0]


def score(coco: COCO, results: list[dict[str, Any]], images: int, with_masks: bool) -> BoxScore:
    """COCO's score of results.

    Args:
        coco: The truth.
        results: What was found, in the form of COCO's results.
        images: In how many images.
        with_masks: Whether masks are scored.
    """
    values = _precision(coco, results, "box", "bbox")
    if with_masks:
        return MaskScore(images=images, **values, **_precision(coco, results, "mask", "segmentation"))
    return BoxScore(images=images, **values)


def _precision(coco: COCO, results: list[dict[str, Any]], kind: str, key: str) -> dict[str, Any]:
    """COCO's measures of results by the overlap of what they have under a key, named for `BoxScore` and `MaskScore`.

    Masks are given without boxes, whose areas pycocotools would take for theirs.
    """
    wanted = ("image_id", "category_id", "score", key)
    found = [{name: result[name] for name in wanted} for result in results]
    with silence():
        loaded = coco.loadRes(found) if found else as_coco({**coco.dataset, "annotations": []})
        evaluation = COCOeval(coco, loaded, "bbox" if key == "bbox" else "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    of_classes = evaluation.eval["precision"][:, :, :, 0, -1]  # [overlaps, recalls, categories]
    values: dict[str, Any] = {f"{kind}_{name}": _percent(evaluation.stats[place]) for name, (place, _) in STATS.items()}
    return {
        **values,
        f"{kind}_ap_of_classes": [_percent(of_class.mean()) for of_class in np.moveaxis(of_classes, -1, 0)],
    }


def _percent(share: float) -> float:
    """pycocotools gives -1 where there is nothing to find."""
    return 100 * float(share) if share >= 0 else math.nan
