"""The task of detecting objects."""

import logging

from yacs.config import CfgNode

from data.build import TrainData
from data.datasets import check_same_classes
from detection.batch import finish
from detection.data import CocoEvalData, build_eval_data, build_train_data, has_masks
from detection.metrics import BoxScore, DetectionSums, MaskScore
from detection.model import Detector, SumOfLosses, build_detector, load_to_start
from utils.dist import World
from utils.task import Task

_log = logging.getLogger(__name__)


def detection(config: CfgNode) -> Task:
    """To detect objects with the configured detector."""
    return Task(
        measures=(MaskScore if has_masks(config) else BoxScore).measures,
        open_data=_open_data,
        build_network=_build_network,
        load_to_start=load_to_start,
        build_loss=lambda _config: SumOfLosses(),
        build_finish=lambda _config, _device: finish,
        build_sums=lambda data, _device: DetectionSums(data.coco, data.classes or [], data.with_masks, data.is_main),
        one_size=False,
    )


def _open_data(config: CfgNode, world: World) -> tuple[TrainData, CocoEvalData]:
    train_data, eval_data = build_train_data(config, world), build_eval_data(config, world)
    check_same_classes(train_data.classes, eval_data.classes, advice="give both files the same categories")
    return train_data, eval_data


def _build_network(config: CfgNode, data: TrainData) -> Detector:
    if config.MODEL.FREEZE_STATISTICS and not (config.MODEL.PRETRAINED or config.MODEL.RESUME):
        _log.warning(
            "MODEL.FREEZE_STATISTICS keeps the batch norms' statistics as they are, and fresh weights have none: "
            "name weights by --pretrained, or set it to False"
        )
    return build_detector(config, len(data.classes or []))
