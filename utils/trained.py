"""A trained classifier from its checkpoint alone: the network, its configuration, and what its classes are called."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from data.names import class_labels
from models.build import build_model, load_weights
from models.groupmixformer import GroupMixFormer
from utils import checkpoint
from utils.cli import Parser
from utils.config import check, default_config, load_config, merge
from utils.errors import UserError


@dataclass(frozen=True)
class Trained:
    """A trained classifier.

    Attributes:
        network: In evaluation mode, on the CPU.
        config: What it was trained with; `eval_transform` and `Finish` make its input from images by it.
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
    parser.add_argument(
        "--weights",
        choices=["auto", "model", "ema"],
        default="auto",
        help="the trained weights, or their moving average; auto takes the one that its best epoch was chosen by",
    )


def trained_from(arguments: argparse.Namespace) -> Trained:
    """The classifier that the flags of `add_trained_arguments` name."""
    return load_trained(arguments.checkpoint, arguments.cfg, arguments.weights)


def load_trained(source: Path, cfg: Path | None = None, weights: str = "auto") -> Trained:
    """Reads a classifier.

    Args:
        source: A checkpoint.
        cfg: A configuration that takes the place of the checkpoint's own.
        weights: 'model', 'ema', or 'auto' for the one that the run's best epoch was chosen by.

    Raises:
        UserError: If the checkpoint cannot be read, holds no configuration where none is given, or does not fit it.
    """
    state = checkpoint.load(source)
    config = _config_of(state, source) if cfg is None else load_config(cfg)
    check(config)
    classes = state.get("classes")
    num_classes = len(classes) if classes else config.MODEL.GMA.NUM_CLASSES
    if not num_classes:
        raise UserError(f"{source} does not tell its number of classes: set MODEL.GMA.NUM_CLASSES in a --cfg")
    is_ema = weights == "ema" or (weights == "auto" and (state.get("best") or {}).get("of") == "ema")
    if is_ema and not state.get("ema"):
        raise UserError(f"{source} holds no moving average: use --weights model")
    network = build_model(config, num_classes)
    load_weights(network, state["ema" if is_ema else "model"], str(source))
    labels = class_labels(classes, num_classes)
    return Trained(network.eval(), config, classes, labels, state, source, is_ema)


def _config_of(state: dict[str, Any], source: Path) -> CfgNode:
    """The configuration that a checkpoint was trained with.

    Raises:
        UserError: If it holds none that this code knows.
    """
    saved = state.get("config")
    if not isinstance(saved, str):
        raise UserError(f"{source} holds no configuration: name the one it was trained with by --cfg")
    config = default_config()
    merge(config, yaml.safe_load(saved), f"the configuration in {source}")
    return config
