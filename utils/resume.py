"""What a run starts from, and what it writes to be gone on with."""

import itertools
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from models.build import load_weights
from utils import checkpoint
from utils.config import accumulation_steps, check_task, differences, task_of
from utils.dist import World, gather_objects, together
from utils.engine import Training
from utils.errors import UserError, listing
from utils.trained import weights_name

_log = logging.getLogger(__name__)

# Keys that may differ between a run and what goes on with it: where things lie, how often they are written, and what
# to do when something goes wrong.
_FREE_KEYS = frozenset(
    {"DATA.DATA_PATH", "DATA.NUM_WORKERS", "DATA.PIN_MEMORY", "DATA.ON_ERROR", "DATA.MAX_BROKEN", "MODEL.RESUME"}
    | {"TRAIN.AUTO_RESUME", "TRAIN.ALLOW_CHANGES", "TRAIN.ELASTIC", "TRAIN.SAVE_UPDATES", "TRAIN.SAVE_MINUTES"}
    | {"TRAIN.ON_NONFINITE", "TRAIN.MAX_LEFT_OUT", "DEVICE", "RANK_TIMEOUT", "OUTPUT", "TAG", "SAVE_FREQ", "KEEP"}
    | {"WANDB", "PRINT_FREQ", "EVAL_MODE", "THROUGHPUT_MODE"}
)
_KEYS_OF_THE_BATCH = frozenset({"DATA.BATCH_SIZE", "TRAIN.ACCUMULATION_STEPS"})


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from.

    Attributes:
        path: Its file.
        state: Its content.
        is_named: Whether it was named by --resume, and is not just the newest one.
    """

    path: Path
    state: dict[str, Any]
    is_named: bool = False


def find_state(config: CfgNode, folder: Path, world: World) -> Found | None:
    """The checkpoint to go on from: --resume, else the folder's newest.

    Where the folder's run was itself started with this --resume, its newest one is meant, unless TRAIN.AUTO_RESUME is
    off: a queue starts the same command again.

    Rank 0 chooses; the others read the same file and must find the same in it. Every rank must ask.

    Raises:
        UserError: If the folder holds another run, its checkpoints are damaged, or --resume is not one of a run.
    """
    found = None
    with together():
        if world.is_main:
            found = _choose(config, folder)
            if found:
                _check_same_run(config, found, world)
    path, checksum = gather_objects((str(found.path), found.state.get("checksum")) if found else ("", None))[0]
    with together():
        if path and not world.is_main:
            found = Found(Path(path), checkpoint.load(path))
            if found.state.get("checksum") != checksum:
                raise UserError(f"ranks read different files as {path}: put --output where all machines see it")
    return found


def _choose(config: CfgNode, folder: Path) -> Found | None:
    if config.MODEL.RESUME:
        return _choose_named(config, folder)
    if not config.TRAIN.AUTO_RESUME and checkpoint.holds_run(folder):
        raise UserError(f"{folder} holds a run already: choose another --tag, or leave TRAIN.AUTO_RESUME on")
    newest = checkpoint.newest(folder)
    return Found(*newest) if newest else None


def _choose_named(config: CfgNode, folder: Path) -> Found:
    named = Path(config.MODEL.RESUME)
    try:
        newest = checkpoint.newest(folder)
    except UserError:  # the named file may be there to replace what is damaged
        newest = None
    if newest:
        began_with_it = "MODEL.RESUME" not in differences(config, newest[1].get("config") or "{}")
        if began_with_it and config.TRAIN.AUTO_RESUME:
            return Found(*newest)
        if not lies_in(folder, named):
            on = ", or leave TRAIN.AUTO_RESUME on" if began_with_it else ""
            raise UserError(f"{folder} holds a run already, which {named} is not of: choose another --tag{on}")
    return Found(named, checkpoint.load(named), is_named=True)


def lies_in(folder: Path, path: Path) -> bool:
    """Whether a file lies in a folder itself."""
    return path.resolve().parent == folder.resolve()


def _check_same_run(config: CfgNode, found: Found, world: World) -> None:
    """Refuses a checkpoint that this run cannot go on with as it is."""
    check_task(checkpoint.saved_values(found.state), found.path, task_of(config))
    progress = found.state.get("progress")
    if not isinstance(progress, dict) or "images_per_update" not in progress:
        raise UserError(f"{found.path} holds weights but no run to go on with: start from it with --pretrained")
    changes = _changes(config, found.state)
    if changes and not config.TRAIN.ALLOW_CHANGES:
        another = "" if config.MODEL.RESUME else "choose another --tag, or "
        elastic = (
            f", or --elastic to keep {progress['images_per_update']} images an update"
            if changes.keys() <= _KEYS_OF_THE_BATCH
            else ""
        )
        raise UserError(
            f"{found.path} is of a run with other settings ({listing(list(changes.values()), 20)}): {another}"
            f"add --allow-changes to go on with these{elastic}"
        )
    if progress["ranks"] != world.size and not config.TRAIN.ELASTIC:
        raise UserError(
            f"{found.path} is of a run on {progress['ranks']} rank(s), and this one has {world.size}: use as many, or "
            f"add --elastic to keep its {progress['images_per_update']} images an update and the order of its samples"
        )


def _changes(config: CfgNode, state: dict[str, Any]) -> dict[str, str]:
    free = set(_FREE_KEYS)
    if config.TRAIN.ELASTIC:
        free |= _KEYS_OF_THE_BATCH
    if config.MODEL.RESUME:
        free.add("MODEL.PRETRAINED")  # whose weights the checkpoint's take the place of
    return {key: change for key, change in differences(config, state["config"]).items() if key not in free}


def check_classes(found: Found, classes: list[str] | None) -> None:
    """Refuses to go on with data of other classes, whose numbers would mean something else from then on.

    Args:
        found: The checkpoint to go on from.
        classes: The data's by number, where it tells.

    Raises:
        UserError: Naming those that differ.
    """
    if other := other_classes(found.state, classes):
        raise UserError(
            f"{found.path} is of a run on other classes ({other}): use its data, or start from its weights with "
            "--pretrained and another --tag"
        )


def tell_of_other_images(found: Found, images: int) -> None:
    """Warns where the training data has another number of images than a run began with, whose order is another, too.

    Args:
        found: The checkpoint to go on from.
        images: The data's.
    """
    before = found.state.get("train_images", images)  # checkpoints did not always tell
    if before != images:
        _log.warning(
            f"{found.path} is of a run on {before} training images, and the data has {images}: "
            "from here on their order is another, within an epoch under way, too"
        )


def other_classes(state: Mapping[str, Any], classes: list[str] | None) -> str:
    """Which classes a checkpoint and data number differently, or nothing where they do not, or one does not tell."""
    known = state.get("classes")
    if not known or not classes or known == classes:
        return ""
    pairs = itertools.zip_longest(known, classes, fillvalue="none")
    return listing([f"{number}: {old} -> {new}" for number, (old, new) in enumerate(pairs) if old != new])


def fit_to_ranks(config: CfgNode, found: Found | None, world: World) -> CfgNode:
    """The configuration with the accumulation that keeps a run's images an update, if that is asked for.

    Raises:
        UserError: If this number of ranks cannot make up an update of as many images.
    """
    if not (found and config.TRAIN.ELASTIC):
        return config
    saved, at_once = found.state["progress"], config.DATA.BATCH_SIZE * world.size
    images = saved["images_per_update"]
    if images % at_once:
        raise UserError(
            f"an update of {images} images cannot be made of steps of {at_once} (DATA.BATCH_SIZE "
            f"{config.DATA.BATCH_SIZE} on {world.size} rank(s)): choose a --batch-size that divides {images}"
        )
    fitted = config.clone()
    fitted.TRAIN.ACCUMULATION_STEPS = images // at_once
    if saved["ranks"] != world.size or differences(fitted, found.state["config"]).keys() & _KEYS_OF_THE_BATCH:
        _log.warning(
            "going on with %d rank(s) instead of %d, in %d step(s) an update: images an update, order and learning "
            "rate stay; erasing, drop path, mixup, batch norms and rounding are no longer those of one whole run",
            world.size, saved["ranks"], images // at_once,
        )  # fmt: skip
    return fitted


def steps_of_epoch(config: CfgNode, found: Found | None, steps: int) -> int:
    """Steps of an epoch on this rank: as many as the data has, or as fill the updates of the run gone on with.

    Args:
        config: The configuration, fitted to the ranks.
        found: The checkpoint to go on from, if any.
        steps: Micro-batches of this rank that the data has.

    Raises:
        UserError: If they do not make up one update.
    """
    if accumulation_steps(config) > steps:
        raise UserError(
            f"TRAIN.ACCUMULATION_STEPS is {accumulation_steps(config)}, but an epoch has {steps} step(s): lower it, or "
            "the batch size"
        )
    if found and config.TRAIN.ELASTIC:  # smaller micro-batches may leave less over at the end of an epoch
        return min(steps, found.state["progress"]["updates_per_epoch"] * accumulation_steps(config))
    return steps


def without_permissions(config: CfgNode) -> CfgNode:
    """The configuration to keep with a run, which --allow-changes and --elastic are no part of."""
    kept = config.clone()
    kept.TRAIN.ALLOW_CHANGES = kept.TRAIN.ELASTIC = False
    return kept


def start_from_pretrained(
    config: CfgNode,
    network: nn.Module,
    classes: list[str] | None,
    load: Callable[[nn.Module, Mapping[str, Tensor], str], list[str]],
) -> None:
    """Loads the weights that --pretrained names, if it does, and says what of them does not fit.

    Of a checkpoint whose best epoch was chosen by the moving average, that is what is loaded.

    Args:
        config: The configuration.
        network: A freshly made network.
        classes: The data's by number, where it tells.
        load: (network, weights, where they are from) -> a sentence for each thing that was not loaded as it is.

    Raises:
        UserError: If they are of another network or task.
    """
    if not (path := config.MODEL.PRETRAINED):
        return
    state = checkpoint.load_for_task(path, task_of(config), "classification")  # which any backbone may start from
    name = weights_name(state, path, "auto")
    _log.info("starting from %s of %s", "the moving average" if name == "ema" else "the weights", path)
    sentences = load(network, state[name], path)
    if not sentences and (other := other_classes(state, classes)):  # the head was loaded, too
        sentences = [f"{path} has as many classes but others ({other}): the head starts from theirs, by number"]
    for sentence in sentences:
        _log.warning(sentence)


def restore(state: dict[str, Any], training: Training, config: CfgNode) -> None:
    """Loads a checkpoint of a run into what trains it, and says which settings changed.

    Raises:
        UserError: If the checkpoint is of another network, optimizer, or length of an epoch.
    """
    if changes := _changes(config, state):
        _log.warning(f"settings differ from those it was trained with: {listing(list(changes.values()), 20)}")
    updates = state["progress"]["updates_per_epoch"]
    if updates != training.steps.updates_per_epoch:
        raise UserError(
            f"the checkpoint has {updates} updates an epoch and this run {training.steps.updates_per_epoch}: "
            "use the same data, batch size, accumulation and number of ranks"
        )
    if "TRAIN.OPTIMIZER.NAME" in changes:
        raise UserError(
            "the checkpoint is of a run with another optimizer (TRAIN.OPTIMIZER.NAME): start from its weights with "
            "--pretrained and another --tag"
        )
    load_weights(training.network, state["model"], "the checkpoint")
    # Weight decay and the like are this run's, not the checkpoint's; the learning rate is the schedule's.
    settings = [
        {key: group[key] for key in group if key not in ("params", "lr")} for group in training.optimizer.param_groups
    ]
    try:
        groups = [
            {**group, **configured}
            for group, configured in zip(state["optimizer"]["param_groups"], settings, strict=True)
        ]
        training.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
    except ValueError as error:
        raise UserError(f"the checkpoint's optimizer does not fit ({error}): use its run's configuration") from None
    _lay_out_as_parameters(training.optimizer)
    if training.scaler.is_enabled() and state["scaler"]:
        training.scaler.load_state_dict(state["scaler"])
    if training.ema:
        load_weights(training.ema.module, state["ema"] or state["model"], "the checkpoint's moving average")
    training.progress.load_state_dict(state["progress"])


def go_back(found: Found, folder: Path) -> dict[str, Any] | None:
    """Leaves a run's folder as it was when the checkpoint that it goes on from was written; only rank 0 must call.

    What is later is removed, or renamed to *.old if that checkpoint was named.

    Args:
        found: That checkpoint.
        folder: The run's.

    Returns:
        The best epoch by then, if the folder has its weights, which best.pth is now.

    Raises:
        UserError: If the folder cannot be written to.
    """
    progress, best = found.state["progress"], found.state["best"]
    checkpoint.remove_after(folder, progress["epoch"], progress["place"], found.is_named)
    if lies_in(folder, found.path) and found.path.name != checkpoint.LAST:
        checkpoint.copy(found.path, folder / checkpoint.LAST)
    return best if checkpoint.restore_best(folder, best, found.is_named) else None


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer's moments their parameters' layout, which fused kernels take for granted."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def state_of(
    training: Training, best: dict[str, Any] | None, config: CfgNode, classes: list[str] | None, images: int
) -> dict[str, Any]:
    """A checkpoint of a run: tensors and plain types only.

    Args:
        training: What trains.
        best: The best epoch so far.
        config: The configuration.
        classes: The data's by number, where it tells.
        images: How many it is trained on.
    """
    steps, progress = training.steps, training.progress
    images_at_once = training.batch_size * training.world.size
    return {
        "model": training.network.state_dict(),
        "ema": training.ema.module.state_dict() if training.ema else None,
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "progress": {
            **progress.state_dict(),
            "images": images_at_once * min(progress.place * steps.accumulation, steps.steps_per_epoch),  # of the epoch
            "updates_per_epoch": steps.updates_per_epoch,
            "images_per_update": images_at_once * steps.accumulation,
            "ranks": training.world.size,
        },
        "best": best,
        "config": config.dump(),
        "classes": classes,
        "train_images": images,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "timm": timm.__version__},
    }
