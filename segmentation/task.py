"""The task of segmenting images."""

from yacs.config import CfgNode

from data.build import EvalData, TrainData
from data.finish import Normalize
from models.build import compile_blocks
from segmentation.data import build_eval_data, build_train_data
from segmentation.inference import build_predictor
from segmentation.loss import SegmentationLoss
from segmentation.metrics import SegmentationScore, SegmentationSums
from segmentation.model import build_segmenter, load_to_start
from utils.dist import World
from utils.errors import UserError
from utils.task import Task


def segmentation() -> Task:
    """To segment images."""
    return Task(
        measures=SegmentationScore.measures,
        open_data=_open_data,
        build_network=lambda config, data: build_segmenter(config, len(data.classes or [])),
        load_to_start=load_to_start,
        build_loss=lambda config: SegmentationLoss(config.MODEL.DECODER.AUX_WEIGHT),
        build_finish=Normalize,
        build_predictor=build_predictor,
        build_sums=lambda data, device: SegmentationSums(len(data.classes or []), device),
        compile=lambda segmenter: compile_blocks(segmenter.backbone),
    )


def _open_data(config: CfgNode, world: World) -> tuple[TrainData, EvalData]:
    if config.DETERMINISTIC and config.MODEL.DECODER.NAME == "upernet" and world.device.type == "cuda":
        raise UserError(
            "DETERMINISTIC does not fit upernet, as torch's adaptive pooling has no deterministic backward pass on "
            "GPUs: use MODEL.DECODER.NAME fpn, or leave DETERMINISTIC off"
        )
    is_synchronised = config.TRAIN.SYNC_BN and world.device.type == "cuda" and world.size > 1
    if config.MODEL.DECODER.NAME == "upernet" and config.DATA.BATCH_SIZE < 2 and not is_synchronised:
        raise UserError(
            "DATA.BATCH_SIZE 1 does not fit upernet, whose pooling to one pixel leaves its batch norm nothing to "
            "normalise: use 2 or more, TRAIN.SYNC_BN on several GPUs, or MODEL.DECODER.NAME fpn"
        )
    return build_train_data(config, world), build_eval_data(config, world)
