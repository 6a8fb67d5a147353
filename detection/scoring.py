"""Scores the weights that a configuration names; shared by detection/test.py and `detection/train.py --eval`."""

from dataclasses import dataclass
from typing import Any

from pycocotools.coco import COCO
from yacs.config import CfgNode

from data.datasets import map_classes
from detection.data import build_eval_data
from detection.metrics import BoxScore, DetectionSums
from detection.model import build_detector
from utils.dist import World, together
from utils.precision import Precision, memory_format
from utils.scoring import Weights, log_matched, score_timed


@dataclass(frozen=True)
class ScoredDetections:
    """What a detector found and reached.

    Attributes:
        score: Over all ranks.
        results: What was found by all ranks, in the form of COCO's results.
        coco: The truth.
        images_per_s: Images per second, over all ranks, including loading and COCO's scoring.
    """

    score: BoxScore
    results: list[dict[str, Any]]
    coco: COCO
    images_per_s: float


def score_weights(config: CfgNode, world: World, precision: Precision, weights: Weights) -> ScoredDetections:
    """Scores weights on the validation data, every image once.

    Args:
        config: The configuration.
        world: This process among all.
        precision: How to compute.
        weights: The weights.

    Raises:
        UserError: If weights, data and configuration do not fit together.
    """
    with together():
        data = build_eval_data(config, world)
        found = data.classes or []
        classes = weights.classes or found
        map_classes(found, classes, len(classes))  # refuses those that the network does not know
        network = build_detector(config, len(classes))
        weights.load_into(network)
        network.to(world.device, memory_format=memory_format(config))
        log_matched(found, classes)
    sums = DetectionSums(data.coco, classes, data.with_masks, data.is_main)
    score, images_per_s = score_timed(network, data, world, precision, sums)
    return ScoredDetections(score, sums.results, data.coco, images_per_s)
