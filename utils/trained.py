"""A trained classifier from its checkpoint alone: the network, its configuration, and what its classes are called."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from data.names import class_labels
from models.build import build_model, load_weights
from models.groupmixformer import GroupMixFormer
from utils import checkpoint
from utils.cli import Parser, add_weights_choice
from utils.config import check_to_score, default_config, load_config, merge
from utils.errors import UserError


@dataclass(frozen=True)
class Trained:
    """A trained classifier.

    Attributes:
        network: In evaluation mode, on the CPU.
        config: What it was trained with; `eval_transform` and `Normalize` make its input from images by it.
        classes: Class names by number, as folders are called, or None where the checkpoint does not tell.
        labels: What people call each class, by number.
        state: The whole checkpoint.
        source: The file.
        is_ema: Whether the weights are the moving average.
    """

    network: GroupMixFormer
    config: CfgNode
    classes: list[str] | None
    labels: list[str]
    state: dict[str, Any]
    source: Path
    is_ema: bool


def add_trained_arguments(parser: Parser) -> None:
    """The flags that `trained_from` reads."""
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help="a .pth or .safetensors file")
    parser.add_argument(
        "--cfg", type=Path, metavar="FILE", help="its configuration, where the checkpoint holds none: published weights"
    )
    add_weights_choice(parser)


def trained_from(arguments: argparse.Namespace) -> Trained:
    """The classifier that the flags of `add_trained_arguments` name."""
    return load_trained(arguments.checkpoint, arguments.cfg, arguments.weights)


def load_trained(source: Path, cfg: Path | None = None, weights: str = "auto") -> Trained:
    """Reads a classifier.

    Args:
        source: A checkpoint.
        cfg: A configuration that takes the place of the checkpoint's own.
        weights: 'model', 'ema', or 'auto' for the one by which the run's best epoch was the best.

    Raises:
        UserError: If the checkpoint cannot be read, holds no configuration or weights as are asked for, or does not
            fit the configuration.
    """
    state = checkpoint.load_for_task(source, "classification")
    config = saved_config(state, source) if cfg is None else load_config(cfg)
    try:
        check_to_score(config)
    except UserError as error:
        raise UserError(f"{cfg or f'the configuration in {source}'}: {error}") from None
    classes = state.get("classes") or None
    num_classes = len(classes) if classes else config.MODEL.GMA.NUM_CLASSES
    if not num_classes:
        raise UserError(f"{source} does not tell its number of classes: set MODEL.GMA.NUM_CLASSES in a --cfg")
    name = weights_name(state, source, weights)
    network = build_model(config, num_classes)
    load_weights(network, state[name], str(source))
    labels = class_labels(classes, num_classes)
    return Trained(network.eval(), config, classes, labels, state, source, is_ema=name == "ema")


def weights_name(state: Mapping[str, Any], source: str | Path, which: str) -> str:
    """The key of a checkpoint under which the weights lie that are asked for: 'model' or 'ema'.

    Args:
        state: The checkpoint.
        source: Its file, for errors.
        which: 'model', 'ema', or 'auto' for the moving average where the run's best epoch was chosen by that.

    Raises:
        UserError: If the moving average is asked for and there is none.
    """
    best = state.get("best")
    if which == "auto":
        return "ema" if state.get("ema") and isinstance(best, Mapping) and best.get("of") == "ema" else "model"
    if which == "ema" and not state.get("ema"):
        raise UserError(f"{source} holds no moving average: use --weights model")
    return which


def saved_config(state: Mapping[str, Any], source: Path) -> CfgNode:
    """The configuration that a checkpoint was trained with; keys that are newer than it have their defaults.

    Args:
        state: The checkpoint.
        source: Its file, for errors.

    Raises:
        UserError: If it holds none that this code knows, or one of another task.
    """
    if not isinstance(state.get("config"), str):
        raise UserError(f"{source} holds no configuration: name the one it was trained with by --cfg")
    place, values = f"the configuration in {source}", checkpoint.saved_values(state)
    if not values:
        raise UserError(f"{place} cannot be read: name the one it was trained with by --cfg")
    config = default_config()
    merge(config, values, place)
    return config
