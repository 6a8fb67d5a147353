"""Trains: builds what a run needs from the configuration, goes on where the run was, and runs its epochs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from data.build import EvalData, TrainData, check_readers
from utils import checkpoint
from utils.config import accumulation_steps, flatten
from utils.dist import World, broadcast_buffers, check_alike, together
from utils.engine import Training, evaluate, train_one_epoch
from utils.errors import Stopped, UserError
from utils.keeper import Keeper
from utils.lock import RunLock
from utils.logger import setup_logging
from utils.metrics import TaskScore
from utils.optim import build_ema, build_optimizer, build_scheduler
from utils.precision import Precision, choose_kernels, memory_format, unmeasured_kernels
from utils.progress import Progress, Steps
from utils.report import describe_best, log_plan
from utils.resume import (
    check_classes,
    find_state,
    fit_to_ranks,
    go_back,
    restore,
    start_from_pretrained,
    steps_of_epoch,
    tell_of_other_images,
    without_permissions,
)
from utils.seeding import number_for, seed_everything
from utils.signals import StopSignals
from utils.task import Task
from utils.tracking import check_tracking

_log = logging.getLogger(__name__)

# Keys in which machines may differ: where things lie on each, and how it loads them.
_OF_A_MACHINE = frozenset(
    {"DATA.DATA_PATH", "DATA.NUM_WORKERS", "DATA.PIN_MEMORY", "DEVICE", "OUTPUT", "MODEL.RESUME", "MODEL.PRETRAINED"}
    | {"DISTILL.TEACHER", "DISTILL.WEIGHTS"}
)


def train(config: CfgNode, world: World, precision: Precision, task: Task) -> None:
    """Builds everything, goes on where the run was, and runs the epochs; every rank must call.

    Args:
        config: The configuration, checked.
        world: This process among all.
        precision: How to compute.
        task: What to train for.

    Raises:
        UserError: If configuration, data, checkpoint and disk do not fit together, or what happens on the way ends the
            run.
        Stopped: If a signal asked the run to stop; its checkpoint is written then.
    """
    folder = Path(config.OUTPUT) / config.MODEL.NAME / config.TAG
    found = find_state(config, folder, world)
    with together():
        if world.is_main:
            check_tracking(config.WANDB)
        config = fit_to_ranks(config, found, world)
        train_data, eval_data = task.open_data(config, world)
        if found:
            check_classes(found, train_data.classes)
            tell_of_other_images(found, train_data.images)
        seed_everything(number_for(config.SEED, "weights"))
        network = task.build_network(config, train_data)
        if not found:
            start_from_pretrained(config, network, train_data.classes, task.load_to_start)
        steps_per_epoch = steps_of_epoch(config, found, train_data.steps_per_epoch)
    check_readers(eval_data)  # those of training are as many
    check_alike(what_ranks_share(config, precision, train_data, eval_data))
    training = build_training(config, world, precision, task, network, steps_per_epoch)
    with together():
        if found:
            restore(found.state, training, config)
        config = without_permissions(config)
        if world.is_main:
            make_folder(folder, training, config.KEEP)

    with hold(folder, world), StopSignals() as signals:
        with together():
            setup_logging(world.is_main, folder)
            best = None
            if world.is_main:
                best = go_back(found, folder) if found else None
                checkpoint.write_text(folder / "config.yaml", config.dump())
            keeper = Keeper(config, training, folder, train_data, best, signals)
        if found:
            _log.info(
                "going on from %s, epoch %d, update %d", found.path, training.progress.epoch, training.progress.place
            )
            found.state.clear()  # all of it is in place, and would fill memory for as long as the run lasts
        log_plan(config, training, train_data.images, eval_data.images)
        try:
            run_epochs(config, task, training, train_data, eval_data, keeper)
        finally:
            keeper.close()


def what_ranks_share(
    config: CfgNode, precision: Precision, train_data: TrainData, eval_data: EvalData
) -> dict[str, Any]:
    """What the ranks of a run must have alike, as each machine has settings, GPUs and perhaps data of its own."""
    return {
        **{name: value for name, value in flatten(config) if name not in _OF_A_MACHINE},
        "the precision": precision.name,
        "the number of training images": train_data.images,
        "the number of validation images": eval_data.images,
        **{f"class {number}": name for number, name in enumerate(train_data.classes or [])},
    }


def build_training(
    config: CfgNode, world: World, precision: Precision, task: Task, network: nn.Module, steps_per_epoch: int
) -> Training:
    """Puts the network on its device and builds what trains it; every rank must call.

    Args:
        config: The configuration.
        world: This process among all.
        precision: How to compute.
        task: What to train for.
        network: The network with the weights that it starts from; on several GPUs its batch norms are replaced.
        steps_per_epoch: Micro-batches of an epoch on each rank.
    """
    on_gpus = world.device.type == "cuda"
    if on_gpus:
        choose_kernels(config.DETERMINISTIC, task.one_size)
    if on_gpus and world.size > 1 and config.TRAIN.SYNC_BN:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(world.device, memory_format=memory_format(config))
    steps = Steps(steps_per_epoch, accumulation_steps(config), config.TRAIN.EPOCHS)
    optimizer = build_optimizer(config, network, world.size)
    ema = build_ema(config, network)
    if task.compile and config.TRAIN.COMPILE:
        task.compile(network)
    model = share_gradients(network, world) if world.size > 1 else network
    scaler = precision.grad_scaler()
    leaves_out = scaler.is_enabled() or config.TRAIN.ON_NONFINITE == "skip"
    return Training(
        network=network,
        model=model,
        criterion=task.build_loss(config),
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, steps, world.size),
        scaler=scaler,
        ema=ema,
        finish=task.build_finish(config, world.device),
        batch_transform=task.build_batch_transform(config, network, precision),
        precision=precision,
        world=world,
        steps=steps,
        batch_size=config.DATA.BATCH_SIZE,
        clip_grad=config.TRAIN.CLIP_GRAD,
        most_left_out=config.TRAIN.MAX_LEFT_OUT if leaves_out else 0,
        seed=config.SEED,
        progress=Progress(),
    )


def share_gradients(network: nn.Module, world: World) -> DistributedDataParallel:
    """A network as several ranks train it; every rank must call.

    Running statistics are each rank's own until `evaluate_epoch` gives all of them rank 0's: no step of training reads
    them, and torch would exchange them before each.
    """
    devices = [world.device.index] if world.device.type == "cuda" else None
    model = DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)
    model.broadcast_buffers = False  # as an argument it is deprecated, and its successor new in torch 2.14
    return model


def make_folder(folder: Path, training: Training, keep: int) -> None:
    """Makes the run's folder, and checks that it can be written to and has space for the checkpoints.

    Raises:
        UserError: If not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): choose another --output") from None
    weights = sum(tensor.nbytes for tensor in training.network.state_dict().values())
    copies = 4 if training.ema else 3  # weights, their moving average, and the optimizer's two moments
    checkpoint.check_space(folder, weights * copies, keep)


@contextmanager
def hold(folder: Path, world: World) -> Iterator[None]:
    """Keeps other runs out of a folder, and removes what a killed one was writing there; every rank must call."""
    with together():
        lock = RunLock(folder) if world.is_main else nullcontext()
    with lock:
        if world.is_main:
            checkpoint.remove_unfinished(folder)
        yield


def run_epochs(
    config: CfgNode, task: Task, training: Training, train_data: TrainData, eval_data: EvalData, keeper: Keeper
) -> None:
    """Trains, scores and saves, epoch after epoch, from where the run is; every rank must call.

    Args:
        config: The configuration.
        task: What to train for.
        training: What trains.
        train_data: What on.
        eval_data: What each epoch is scored on.
        keeper: Writes down how the run goes, and ends it where it must.

    Raises:
        UserError: If a loss is no number, data is broken, another rank is lost or something cannot be written.
        Stopped: If a signal asked the run to stop; its checkpoint is written then.
    """
    progress, steps = training.progress, training.steps
    while progress.epoch < steps.epochs:
        train_data.set_epoch(progress.epoch, progress.place * steps.accumulation)
        train_one_epoch(training, train_data.loader, config.PRINT_FREQ, keeper)
        try:
            scores = evaluate_epoch(config, task, training, eval_data, keeper)
        except Stopped as stopped:
            keeper.stop(stopped.signal)
        keeper.on_epoch(scores)
    keeper.wait()
    best = keeper.best
    reached = f"best {describe_best(best, task.measures)}" if best else "no epoch was left to train"
    _log.info(f"done: {reached}; everything is in {keeper.folder}")


def evaluate_epoch(
    config: CfgNode, task: Task, training: Training, data: EvalData, keeper: Keeper
) -> dict[str, TaskScore]:
    """Scores the 'model', and its moving average as 'ema' where there is one; every rank must call.

    Args:
        config: The configuration.
        task: What to score for.
        training: What trains.
        data: What to score on.
        keeper: Tells of signals.

    Raises:
        UserError: If an image is broken, or another rank is lost.
        Stopped: If some rank is asked to stop.
    """
    networks = {"model": training.network} | ({"ema": training.ema.module} if training.ema else {})
    scores = {}
    for name, network in networks.items():
        broadcast_buffers(network)
        # As test.py scores, but in the run's precision; neither compiling nor measuring pays for it.
        with torch.compiler.set_stance("force_eager"), unmeasured_kernels():
            scores[name] = evaluate(
                task.build_predictor(config, network),
                data,
                training.world,
                training.precision,
                task.build_sums(data, training.world.device),
                keeper.asked_to_stop,
            )
    return scores
