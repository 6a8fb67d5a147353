"""Scores the weights that a configuration names; shared by test.py and `train.py --eval`."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from data.build import EvalData, build_eval_data
from models.build import build_model, load_weights
from models.fuse import fuse
from utils import checkpoint
from utils.config import KEYS_OF_ANSWERS, differences, task_of
from utils.dist import World, together
from utils.engine import evaluate
from utils.errors import UserError, listing
from utils.metrics import Score, ScoreSums, Sums, TaskScore
from utils.precision import Precision, memory_format
from utils.seeding import number_for, seed_everything
from utils.trained import chosen_by_ema

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """What scoring weights gave.

    Attributes:
        score: The score.
        images_per_s: Images per second including loading.
        num_classes: The network's.
        classes: Their names by number, where the checkpoint or the data tells.
        data: What was scored on.
    """

    score: Score
    images_per_s: float
    num_classes: int
    classes: list[str] | None
    data: EvalData


def weights_file(config: CfgNode) -> str:
    """The file that the configuration says to score.

    Raises:
        UserError: If it names none, or two.
    """
    resume, pretrained = config.MODEL.RESUME, config.MODEL.PRETRAINED
    if resume and pretrained:
        raise UserError("--resume and --pretrained both name weights to score: give one")
    if not (resume or pretrained):
        best = Path(config.OUTPUT) / config.MODEL.NAME / config.TAG / checkpoint.BEST
        hint = f"--resume {best}" if best.is_file() else "--pretrained FILE or --resume FILE"
        raise UserError(
            f"no weights to score: add {hint}; test.py --random-weights scores a network that knows nothing"
        )
    return resume or pretrained


def score_weights(
    config: CfgNode,
    world: World,
    precision: Precision,
    use_ema: bool = False,
    random_weights: bool = False,
    fused: bool = False,
    sums: ScoreSums | None = None,
) -> Scored:
    """Scores weights on the validation data, every image once.

    Args:
        config: The configuration.
        world: This process among all.
        precision: How to compute.
        use_ema: Whether to take the moving average out of the checkpoint.
        random_weights: Whether to score fresh weights instead of a checkpoint's.
        fused: Whether to rewrite the network for inference first.
        sums: Adds up the score, where more is wanted of it.

    Raises:
        UserError: If weights, data and configuration do not fit together.
    """
    with together():
        source, state = read_weights(config, random_weights)
        classes = state.get("classes")
        num_classes = config.MODEL.GMA.NUM_CLASSES or (len(classes) if classes else 0)
        if classes and num_classes != len(classes):
            raise UserError(
                f"the checkpoint has {len(classes)} classes but MODEL.GMA.NUM_CLASSES is {num_classes}: "
                f"add --opts MODEL.GMA.NUM_CLASSES {len(classes)}"
            )
        eval_data = build_eval_data(config, world, classes, num_classes or None)
        if not num_classes and not eval_data.classes:
            raise UserError(
                "neither the checkpoint nor the data tells the number of classes: set MODEL.GMA.NUM_CLASSES"
            )
        network = build_model(config, num_classes or len(eval_data.classes or []))
        if source:
            load_weights(network, choose_weights(state, use_ema, source), source)
        network = fuse(network) if fused else network
        network.to(world.device, memory_format=memory_format(config))
        log_matched(eval_data.classes, classes)
    score, images_per_s = score_timed(network, eval_data, world, precision, sums)
    return Scored(score, images_per_s, network.num_classes, classes or eval_data.classes, eval_data)


def read_weights(config: CfgNode, random_weights: bool) -> tuple[str | None, dict[str, Any]]:
    """The file that the configuration says to score, and its checkpoint; None and nothing for fresh weights.

    Fresh weights are made next, and follow SEED as those do that training starts from.

    Raises:
        UserError: If the configuration names no file, or two, or the file cannot be read or is of another task.
    """
    if random_weights:
        seed_everything(number_for(config.SEED, "weights"))
        return None, {}
    source = weights_file(config)
    _log.info("scoring %s", source)
    state = checkpoint.load_of(source, task_of(config))
    is_ours = "checksum" in state  # others' checkpoints may call anything a configuration
    changes = differences(config, state["config"]) if is_ours and state.get("config") else {}
    if told := [change for key, change in changes.items() if key in KEYS_OF_ANSWERS]:
        _log.warning("%s was trained with other settings: %s", source, listing(told, 20))
    return source, state


def log_matched(found: list[str] | None, known: list[str] | None) -> None:
    """Says how many of a checkpoint's classes are in the data, where both are known and they differ."""
    if found and known and found != known:
        _log.info("%d of the checkpoint's %d classes are in the data; matched by name", len(found), len(known))


def score_timed(
    network: nn.Module, data: EvalData, world: World, precision: Precision, sums: Sums | None = None
) -> tuple[TaskScore, float]:
    """A network's score on validation data, as `evaluate` gives it, and images per second including loading."""
    start = time.perf_counter()
    score = evaluate(network, data, world, precision, sums)
    return score, score.images / (time.perf_counter() - start)


def circumstances(
    config: CfgNode, world: World, precision: Precision, use_ema: bool, images_per_s: float
) -> dict[str, Any]:
    """How a score came about, as --json tells it beside the score."""
    return {
        "images_per_s": images_per_s,
        "ranks": world.size,
        "precision": precision.name,
        "weights": config.MODEL.RESUME or config.MODEL.PRETRAINED or "random",
        "ema": use_ema,
    }


def choose_weights(state: dict[str, Any], use_ema: bool, source: str) -> dict[str, torch.Tensor]:
    """A checkpoint's weights, or their moving average; says where its best epoch was chosen by the other.

    Raises:
        UserError: If it holds no moving average.
    """
    if not use_ema:
        if state.get("ema") and chosen_by_ema(state):
            _log.info("scoring the trained weights; the best epoch was that of their moving average (test.py --ema)")
        return state["model"]
    if not state.get("ema"):
        raise UserError(f"{source} holds no moving average: leave --ema out")
    return state["ema"]
