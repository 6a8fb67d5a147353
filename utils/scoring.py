"""Scores the weights that a configuration names; shared by test.py and `train.py --eval`."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from data.build import EvalData, build_eval_data, check_readers
from models.build import build_model, load_weights
from models.fuse import fuse
from utils import checkpoint
from utils.config import changes_answers, differences, task_of
from utils.dist import World, together
from utils.engine import evaluate
from utils.errors import UserError, listing
from utils.metrics import Score, ScoreSums, Sums, TaskScore
from utils.precision import Precision, memory_format
from utils.seeding import number_for, seed_everything
from utils.trained import weights_name

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Weights to score.

    Attributes:
        kind: 'model' for trained ones, 'ema' for their moving average, 'random' for fresh ones.
        source: Their file; 'random' for fresh ones.
        tensors: By name; empty for fresh ones.
        classes: Class names by number, where their checkpoint tells.
    """

    kind: str
    source: str
    tensors: dict[str, torch.Tensor]
    classes: list[str] | None

    def load_into(self, network: nn.Module) -> None:
        """Gives them to a network, which is left as it was made where they are fresh.

        Raises:
            UserError: If they are of another network.
        """
        if self.kind != "random":
            load_weights(network, self.tensors, self.source)


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


def read_weights(config: CfgNode, which: str = "auto") -> Weights:
    """The weights to score; every rank must call, and make its network next.

    Args:
        config: The configuration, which names a checkpoint; fresh weights follow its SEED, as training's do.
        which: 'model', 'ema' or 'auto' as in `weights_name`, or 'random' for fresh weights.

    Raises:
        UserError: If the configuration names no file, or two, or the file cannot be read, holds no such weights or is
            of another task.
    """
    with together():
        if which == "random":
            seed_everything(number_for(config.SEED, "weights"))
            return Weights(which, which, {}, None)
        source = weights_file(config)
        state = checkpoint.load_for_task(source, task_of(config))
        is_ours = "checksum" in state  # others' checkpoints may call anything a configuration
        changes = differences(config, state["config"]) if is_ours and state.get("config") else {}
        if told := [change for key, change in changes.items() if changes_answers(key)]:
            _log.warning("%s was trained with other settings: %s", source, listing(told, 20))
        kind = weights_name(state, source, which)
        _log.info("scoring %s of %s", "the moving average" if kind == "ema" else "the weights", source)
        return Weights(kind, source, state[kind], state.get("classes"))


def score_weights(
    config: CfgNode,
    world: World,
    precision: Precision,
    weights: Weights,
    fused: bool = False,
    sums: ScoreSums | None = None,
) -> Scored:
    """Scores weights on the validation data, every image once.

    Args:
        config: The configuration.
        world: This process among all.
        precision: How to compute.
        weights: The weights.
        fused: Whether to rewrite the network for inference first.
        sums: Adds up the score, where more is wanted of it.

    Raises:
        UserError: If weights, data and configuration do not fit together.
    """
    with together():
        classes = weights.classes
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
        weights.load_into(network)
        network = fuse(network) if fused else network
        network.to(world.device, memory_format=memory_format(config))
        log_matched(eval_data.classes, classes)
    check_readers(eval_data)
    score, images_per_s = score_timed(network, eval_data, world, precision, sums)
    return Scored(score, images_per_s, network.num_classes, classes or eval_data.classes, eval_data)


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


def circumstances(weights: Weights, world: World, precision: Precision, images_per_s: float) -> dict[str, Any]:
    """How a score came about, as --json tells it beside the score."""
    return {
        "images_per_s": images_per_s,
        "ranks": world.size,
        "precision": precision.name,
        "weights": weights.source,
        "ema": weights.kind == "ema",
    }
