"""Scores the weights that a configuration names; shared by segmentation's test.py and `train.py --eval`."""

from collections.abc import Callable

from yacs.config import CfgNode

from data.build import EvalData
from segmentation.data import build_eval_data
from segmentation.inference import build_predictor
from segmentation.metrics import SegmentationScore
from segmentation.model import build_segmenter
from segmentation.task import build_sums
from utils.dist import World, together
from utils.errors import UserError, listing
from utils.metrics import Sums
from utils.precision import Precision, memory_format
from utils.scoring import Weights, score_timed


def score_weights(
    config: CfgNode,
    world: World,
    precision: Precision,
    weights: Weights,
    watch: Callable[[Sums, EvalData], Sums] = lambda sums, _data: sums,
) -> tuple[SegmentationScore, EvalData, float]:
    """Scores weights on the validation data, every image once and at its own size.

    Args:
        config: The configuration.
        world: This process among all.
        precision: How to compute.
        weights: The weights.
        watch: Puts something that sees all answers in the place of what adds up the score, which it must pass them to.

    Returns:
        The score, what was scored on, and images per second including loading.

    Raises:
        UserError: If weights, data and configuration do not fit together.
    """
    with together():
        data = build_eval_data(config, world)
        classes = data.classes or []
        _check_classes(weights.classes, classes)
        network = build_segmenter(config, len(classes))
        weights.load_into(network)
        sums = watch(build_sums(data, world.device), data)
    predictor = build_predictor(config, network.to(world.device, memory_format=memory_format(config)))
    score, images_per_s = score_timed(predictor, data, world, precision, sums)
    return score, data, images_per_s


def _check_classes(known: list[str] | None, classes: list[str]) -> None:
    """Refuses data of other classes than a checkpoint's.

    Raises:
        UserError: If they differ in number or in a name.
    """
    if known is None or known == classes:
        return
    if len(known) != len(classes):
        raise UserError(f"the checkpoint has {len(known)} classes, the data {len(classes)}: score it on its own data")
    other = [f"{mine} and {theirs}" for mine, theirs in zip(known, classes, strict=True) if mine != theirs]
    raise UserError(f"classes of the checkpoint and of the data differ ({listing(other)}): use the same classes.txt")
