"""Scores the weights that a configuration names; shared by segmentation's test.py and `train.py --eval`."""

from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from data.build import EvalData
from data.datasets import check_same_classes
from segmentation.data import build_eval_data
from segmentation.inference import build_predictor
from segmentation.metrics import SegmentationScore, SegmentationSums
from segmentation.model import build_segmenter
from segmentation.pictures import PictureSums
from utils.dist import World, together
from utils.metrics import Sums
from utils.precision import Precision, memory_format
from utils.scoring import Weights, score_timed


@dataclass(frozen=True)
class ScoredSegmentation:
    """What a segmenter reached.

    Attributes:
        score: Over all ranks.
        data: What was scored on.
        images_per_s: Images per second, over all ranks, including loading.
    """

    score: SegmentationScore
    data: EvalData
    images_per_s: float


def score_weights(
    config: CfgNode,
    world: World,
    precision: Precision,
    weights: Weights,
    pictures: Path | None = None,
    compared: int = 24,
) -> ScoredSegmentation:
    """Scores weights on the validation data, every image once and at its own size.

    Args:
        config: The configuration.
        world: This process among all.
        precision: How to compute.
        weights: The weights.
        pictures: A folder to draw all answers in, as `PictureSums` does; None to draw nothing.
        compared: As `PictureSums` takes it.

    Raises:
        UserError: If weights, data and configuration do not fit together, or a picture cannot be written.
    """
    with together():
        data = build_eval_data(config, world)
        classes = data.classes or []
        check_same_classes(weights.classes, classes, ("the checkpoint", "the data"), "use the same classes.txt")
        network = build_segmenter(config, len(classes))
        weights.load_into(network)
    sums: Sums = SegmentationSums(len(classes), world.device)
    if pictures:
        order, reduce = iter(data.loader.sampler), config.DATA.REDUCE_ZERO_LABEL
        sums = PictureSums(sums, data.source, order, pictures, compared, classes, reduce)
    predictor = build_predictor(config, network.to(world.device, memory_format=memory_format(config)))
    score, images_per_s = score_timed(predictor, data, world, precision, sums)
    return ScoredSegmentation(score, data, images_per_s)
