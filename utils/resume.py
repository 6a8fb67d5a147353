"""What a run starts from, and what it writes to be gone on with."""

import logging
import platform
from pathlib import Path
from typing import Any

import timm
import torch
from yacs.config import CfgNode

from models.build import load_pretrained, load_weights
from models.groupmixformer import GroupMixFormer
from utils import checkpoint
from utils.config import differences
from utils.engine import Training
from utils.errors import UserError, listing

_log = logging.getLogger(__name__)

# Keys that may differ between a run and what goes on with it: where things lie, and how often they are written.
_FREE_KEYS = frozenset(
    {"DATA.DATA_PATH", "DATA.NUM_WORKERS", "DATA.PIN_MEMORY", "MODEL.RESUME", "TRAIN.AUTO_RESUME", "DEVICE"}
    | {"OUTPUT", "TAG", "SAVE_FREQ", "KEEP", "PRINT_FREQ", "EVAL_MODE", "THROUGHPUT_MODE"}
)


def find_state(config: CfgNode, folder: Path) -> dict[str, Any] | None:
    """The checkpoint to go on from: --resume, else the folder's last one unless TRAIN.AUTO_RESUME is off.

    Raises:
        UserError: If the folder holds another run, or the checkpoint is not one of a run.
    """
    last = folder / checkpoint.LAST
    if not config.MODEL.RESUME and last.is_file() and not config.TRAIN.AUTO_RESUME:
        raise UserError(f"{folder} holds a run already: choose another --tag, or leave TRAIN.AUTO_RESUME on")
    path = config.MODEL.RESUME or (last if last.is_file() else None)
    if not path:
        return None
    state = checkpoint.load(path)
    if "progress" not in state:
        raise UserError(f"{path} holds weights but no run to go on with: start from it with --pretrained")
    foreign = [change for change in _changes(config, state) if change.startswith("MODEL.")]
    if foreign and not config.MODEL.RESUME:
        raise UserError(
            f"{folder} holds a run with other settings ({listing(foreign)}): choose another --tag, "
            f"or go on with --resume {path}"
        )
    return state


def _changes(config: CfgNode, state: dict[str, Any]) -> list[str]:
    return [change for change in differences(config, state["config"]) if change.split(":")[0] not in _FREE_KEYS]


def start_from_pretrained(config: CfgNode, network: GroupMixFormer) -> None:
    """Loads the weights that --pretrained names, if it does, and says what of them does not fit.

    Raises:
        UserError: If they are of another network.
    """
    if path := config.MODEL.PRETRAINED:
        for sentence in load_pretrained(network, checkpoint.load(path)["model"], path):
            _log.warning(sentence)


def restore(state: dict[str, Any], training: Training, config: CfgNode) -> None:
    """Loads a checkpoint of a run into what trains it, and says which settings changed.

    Raises:
        UserError: If the checkpoint is of another network, optimizer, or length of an epoch.
    """
    if changes := _changes(config, state):
        _log.warning(f"settings differ from those it was trained with: {listing(changes, 20)}")
    updates = state["progress"]["updates_per_epoch"]
    if updates != training.steps.updates_per_epoch:
        raise UserError(
            f"the checkpoint has {updates} updates an epoch and this run {training.steps.updates_per_epoch}: "
            "use the same data, batch size, accumulation and number of ranks"
        )
    load_weights(training.network, state["model"], "the checkpoint")
    settings = [{key: group[key] for key in group if key != "params"} for group in training.optimizer.param_groups]
    try:
        training.optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise UserError(f"the checkpoint's optimizer does not fit ({error}): use its run's configuration") from None
    for group, configured in zip(training.optimizer.param_groups, settings, strict=True):
        group.update(configured)  # weight decay and the like are this run's, not the checkpoint's
    if training.scaler.is_enabled() and state["scaler"]:
        training.scaler.load_state_dict(state["scaler"])
    if training.ema:
        load_weights(training.ema.module, state["ema"] or state["model"], "the checkpoint's moving average")


def state_of(
    training: Training, epoch: int, best: dict[str, Any], config: CfgNode, classes: list[str] | None
) -> dict[str, Any]:
    """A checkpoint after a number of epochs: tensors and plain types only."""
    return {
        "model": training.network.state_dict(),
        "ema": training.ema.module.state_dict() if training.ema else None,
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "progress": {
            "epoch": epoch,
            "update": epoch * training.steps.updates_per_epoch,
            "updates_per_epoch": training.steps.updates_per_epoch,
        },
        "best": best,
        "config": config.dump(),
        "classes": classes,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "timm": timm.__version__},
    }
