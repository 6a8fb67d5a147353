"""The loops: one epoch of training, one evaluation. They are given built objects and build none."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from data.build import EvalData
from utils.dist import World, any_rank, gather, gather_objects
from utils.errors import BrokenDataError, OneRankError, Stopped, UserError
from utils.meter import Meter, Report
from utils.metrics import ScoreSums, Sums, TaskScore
from utils.precision import Precision
from utils.progress import Progress, Steps
from utils.seeding import number_for, seed_everything


@dataclass(frozen=True)
class Training:
    """All that an update needs.

    Attributes:
        network: The bare network.
        model: The network as it is called in training: in DDP, or itself.
        criterion: Loss of what the model answers and the targets: to classify, of logits [B, classes] and class numbers
            [B], or mixed targets [B, classes].
        optimizer: torch's.
        scheduler: timm's, asked for the learning rate of an update by its number.
        scaler: torch's loss scaler, idle outside fp16.
        ema: timm's moving average, if there is one.
        finish: Makes the model's input of 8-bit images on the device; may draw, and is seeded for each step.
        batch_transform: What is done to the finished images and the targets, if anything is: to classify, mixup, or a
            teacher's answers put beside the targets; may draw, and is seeded likewise.
        precision: How the network computes.
        world: This process among all.
        steps: Steps and updates of the training.
        batch_size: Images of a micro-batch on each rank.
        clip_grad: Largest gradient norm of an update, 0 for no clipping.
        most_left_out: Updates in a row whose leaving out ends the run; 0 where none may be left out.
        seed: The run's.
        progress: How far the run is.
    """

    network: nn.Module
    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    finish: Callable[[Any], Any]
    batch_transform: Callable[[Any, Any], tuple[Any, Any]] | None
    precision: Precision
    world: World
    steps: Steps
    batch_size: int
    clip_grad: float
    most_left_out: int
    seed: int
    progress: Progress


class Watch:
    """What the training loop tells, and asks, between updates; as it stands here it stops at broken images."""

    def alarm(self) -> tuple[int, bool]:
        """The signal that asks this rank to stop, or 0; and whether this rank failed to write something."""
        return 0, False

    def on_broken(self, complaints: list[str]) -> None:
        """Told about broken images of all ranks, on all ranks, before their update.

        Raises:
            UserError: Where the update must not be taken.
        """
        raise BrokenDataError(complaints[0])

    def on_update(self, signal: int, failed: bool) -> None:
        """Told after each update, on all ranks, what the alarms of all ranks were before it."""

    def on_not_finite(self, what: str, losses: list[float]) -> None:
        """Told on all ranks of an update whose loss or gradients are no numbers, before it is left out.

        Args:
            what: What became no number, and where.
            losses: The loss on each rank.

        Raises:
            UserError: Where the run must not go on.
        """
        raise UserError(what)

    def on_report(self, report: Report) -> None:
        """Told how training goes."""


def train_one_epoch(training: Training, loader: Iterable[Any], report_every: int, watch: Watch) -> None:
    """Trains to the end of the epoch that the run is in.

    Args:
        training: All that an update needs.
        loader: Micro-batches of this rank for this epoch, from the place that the run has reached: (images, targets,
            complaints about broken images: B texts, mostly empty). To classify, 8-bit images [B, C, H, W] and class
            numbers [B]; other tasks have whatever has a `to(device)`.
        report_every: Updates between reports; the last update of an epoch is always reported.
        watch: Told what happens.

    Raises:
        OneRankError: If the loader of this rank gives fewer batches than an epoch has.
        UserError: If the loss or the gradients of an update are no numbers on some rank: all ranks raise it, and the
            update is not taken. Under the loss scaler, or where the watch lets it be, such an update is left out,
            unless too many in a row are.
    """
    training.model.train()
    progress, steps, world = training.progress, training.steps, training.world
    meter, batches = Meter(world.device), iter(loader)
    with tqdm(
        total=steps.updates_per_epoch,
        initial=progress.place,
        desc=f"epoch {progress.epoch}",
        disable=None if world.is_main else True,
    ) as bar:
        while progress.place < steps.updates_per_epoch:
            signal, failed = _take_update(training, batches, meter, watch)
            bar.update()
            if progress.place % report_every == 0 or progress.place == steps.updates_per_epoch:
                lr = max(group["lr"] for group in training.optimizer.param_groups)
                latest = meter.report(progress, steps, lr)
                bar.set_postfix_str(
                    f"loss {latest.loss:.3f}, lr {latest.lr:.2e}, {latest.images_per_s:.0f} images/s, "
                    f"run left {latest.left}"
                )
                watch.on_report(latest)
            watch.on_update(signal, failed)


def _take_update(training: Training, batches: Iterator[Any], meter: Meter, watch: Watch) -> tuple[int, bool]:
    """Takes the update of the place that the run is at, or leaves it out; returns the alarms of all ranks."""
    progress = training.progress
    micro_steps = len(training.steps.batches_of_update(progress.place))
    meter.add_update(micro_steps * training.batch_size * training.world.size)
    # A forward pass that ends in no numbers spoils the running statistics of batch norms, too.
    buffers = [buffer.clone() for buffer in training.network.buffers()] if training.most_left_out else []
    loss, complaints = _accumulate(training, batches, micro_steps, meter)
    training.scaler.unscale_(training.optimizer)
    norm = nn.utils.clip_grad_norm_(training.network.parameters(), training.clip_grad or math.inf)
    votes = _vote(loss, norm, len(complaints), *watch.alarm())
    if votes.complaints:
        watch.on_broken([complaint for of_rank in gather_objects(complaints) for complaint in of_rank])
    if votes.are_finite:
        training.scheduler.step_update(progress.updates)
        training.scaler.step(training.optimizer)
        progress.take(math.fsum(votes.losses) / training.world.size, votes.grad_norm)
        if training.ema:
            training.ema.update(training.network, step=progress.updates)
    else:
        _leave_out(training, votes, buffers, watch)
    training.scaler.update()
    training.optimizer.zero_grad()
    return votes.signal, votes.failed


def _accumulate(training: Training, batches: Iterator[Any], micro_steps: int, meter: Meter) -> tuple[Tensor, list[str]]:
    """Adds up the gradients of an update's micro-batches; returns its loss, and complaints about its images."""
    position = training.progress.position(training.steps.updates_per_epoch)
    total, complaints = torch.zeros((), dtype=torch.float64, device=training.world.device), []
    for micro_step in range(micro_steps):
        images, targets, of_batch = _next(training, batches, meter)
        complaints += filter(None, of_batch)
        seed_everything(number_for(training.seed, "step", position, micro_step, training.world.rank))
        images = training.finish(images)
        if training.batch_transform:
            images, targets = training.batch_transform(images, targets)
        is_last = micro_step == micro_steps - 1
        with training.model.no_sync() if hasattr(training.model, "no_sync") and not is_last else nullcontext():
            with training.precision.autocast():
                loss = training.criterion(training.model(images), targets) / micro_steps
            training.scaler.scale(loss).backward()
        total += loss.detach().double()
    return total, complaints


def _next(training: Training, batches: Iterator[Any], meter: Meter) -> tuple[Any, Any, list[str]]:
    since = time.perf_counter()
    batch = next(batches, None)
    if batch is None:
        raise OneRankError(
            f"the data gave fewer than the {training.steps.steps_per_epoch} batches of epoch "
            f"{training.progress.epoch}: a stream's shards are missing or hold fewer images than its index says; "
            "mend them"
        )
    images, targets, complaints = batch
    images = images.to(training.world.device, non_blocking=True)
    targets = targets.to(training.world.device, non_blocking=True)
    meter.add_data_seconds(time.perf_counter() - since)
    return images, targets, complaints


@dataclass(frozen=True)
class _Votes:
    """What all ranks know before an update is taken: the losses of all, how many complaints, what alarms."""

    losses: list[float]
    grad_norm: float
    complaints: int
    signal: int
    failed: bool

    @property
    def are_finite(self) -> bool:
        return all(map(math.isfinite, (*self.losses, self.grad_norm)))


def _vote(loss: Tensor, norm: Tensor, complaints: int, signal: int, failed: bool) -> _Votes:
    """Exchanges in one small message what every rank must know, and waits for this update's numbers once."""
    # Made on the GPU: a copy would wait for it.
    own = [loss.new_full((), number) for number in (complaints, signal, failed)]
    table = gather(torch.stack([loss, *own]))
    *rows, grad_norm = torch.cat([table.flatten(), norm.detach().double()[None]]).tolist()
    losses, complaints_of, signals, failures = (rows[column::4] for column in range(4))
    return _Votes(losses, grad_norm, int(sum(complaints_of)), int(max(signals)), any(failures))


def _leave_out(training: Training, votes: _Votes, buffers: list[Tensor], watch: Watch) -> None:
    progress = training.progress
    where = f"update {progress.place + 1} of epoch {progress.epoch}"
    losses = ", ".join(f"{loss} on rank {rank}" for rank, loss in enumerate(votes.losses) if not math.isfinite(loss))
    what = f"the loss became {losses}" if losses else f"the norm of the gradients became {votes.grad_norm}"
    if not training.scaler.is_enabled():  # under which this is normal
        watch.on_not_finite(f"{what} at {where}", votes.losses)
    for buffer, before in zip(training.network.buffers(), buffers, strict=True):
        buffer.copy_(before)
    progress.leave_out()
    if progress.left_out_in_row >= training.most_left_out:
        raise UserError(
            f"{what} at {where}, and {progress.left_out_in_row} updates in a row were left out: lower TRAIN.BASE_LR, "
            "set TRAIN.CLIP_GRAD, or try --precision fp32"
        )


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    data: EvalData,
    world: World,
    precision: Precision,
    sums: Sums | None = None,
    asked_to_stop: Callable[[], int] = lambda: 0,
) -> TaskScore:
    """Scores a network on this rank's share of a data set, and adds the shares of all ranks.

    A rank that must stop tells the others after each of the batches that every rank has.

    Args:
        network: The bare network, which waits for no other rank.
        data: This rank's images.
        world: This process among all.
        precision: How to compute.
        sums: Adds up what to score by; a classifier's accuracies if None.
        asked_to_stop: Gives the signal that asks this rank to stop, or 0.

    Raises:
        BrokenDataError: If an image is broken on some rank; all ranks raise it.
        UserError: If another number, or none, was scored; all ranks raise it.
        Stopped: If some rank is asked to stop; all ranks raise it.
    """
    network.eval()
    sums = ScoreSums(world.device) if sums is None else sums
    complaint, signal = "", 0
    for number, (inputs, targets, complaints) in enumerate(
        tqdm(data.loader, desc="scoring", leave=False, disable=None if world.is_main else True)
    ):
        complaint = complaint or next(filter(None, complaints), "")
        signal = signal or asked_to_stop()
        if number < data.rounds and any_rank(bool(complaint or signal), world.device):
            break
        if not complaint:
            inputs = data.finish(inputs.to(world.device, non_blocking=True))
            targets = targets.to(world.device, non_blocking=True)
            with precision.autocast():
                outputs = network(inputs)
            sums.add(outputs, targets)
    told = gather_objects((complaint, signal or asked_to_stop()))
    if complaints := [complaint for complaint, _ in told if complaint]:
        raise BrokenDataError(f"{complaints[0]}: mend or remove it")
    if signal := max(signal for _, signal in told):
        raise Stopped(signal)
    score = sums.total()
    if score.images == 0 or data.images not in (0, score.images):
        raise UserError(
            f"{score.images} of {data.images or 'some'} validation images were scored: "
            "the data is empty, or a stream skipped broken ones; mend it"
        )
    return score
