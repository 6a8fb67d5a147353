"""The loops: one epoch of training, one evaluation. They are given built objects and build none."""

import datetime
import math
import resource
import time
from collections.abc import Callable, Iterable, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from utils.dist import World, sum_over_ranks
from utils.errors import UserError
from utils.metrics import Score, ScoreSums
from utils.optim import Precision, Steps
from utils.seeding import number_for, seed_everything


class Batches(Sized, Iterable[Any], Protocol):
    """A loader of (images [B, C, H, W], class numbers [B])."""


@dataclass(frozen=True)
class Training:
    """All that an update needs.

    Attributes:
        network: The bare network.
        model: The network as it is called in training: in DDP, compiled, or itself.
        criterion: Loss of logits [B, classes] and class numbers [B], or mixed targets [B, classes].
        optimizer: torch's.
        scheduler: timm's, asked for the learning rate of an update by its number.
        scaler: torch's loss scaler, idle outside fp16.
        ema: timm's moving average, if there is one.
        mixup: Mixes images and targets, if it is on.
        precision: How the network computes.
        world: This process among all.
        steps: Steps and updates of the run.
        batch_size: Images of a micro-batch on each rank.
        clip_grad: Largest gradient norm of an update, 0 for no clipping.
        seed: The run's.
        memory_format: Layout of the images.
    """

    network: nn.Module
    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    precision: Precision
    world: World
    steps: Steps
    batch_size: int
    clip_grad: float
    seed: int
    memory_format: torch.memory_format


@dataclass(frozen=True)
class Report:
    """How training goes, averaged since the last report, over all ranks.

    Attributes:
        epoch: Number of the epoch, from 0.
        update: Updates completed in the run.
        update_in_epoch: Updates completed in the epoch.
        loss: Mean loss.
        grad_norm: Mean norm of the gradients before clipping.
        lr: Largest learning rate of the last update.
        seconds: Time of an update.
        data_share: Share of the time spent waiting for data.
        images_per_s: Images per second, over all ranks.
        memory_mb: Peak memory, of the GPU where there is one.
    """

    epoch: int
    update: int
    update_in_epoch: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    data_share: float
    images_per_s: float
    memory_mb: float


def train_one_epoch(
    run: Training, loader: Batches, epoch: int, report_every: int, report: Callable[[Report], None]
) -> None:
    """Trains for one epoch.

    Args:
        run: All that an update needs.
        loader: Micro-batches of this rank for this epoch.
        epoch: Number of the epoch, from 0.
        report_every: Updates between reports; the last update of an epoch is always reported.
        report: Called with each report.

    Raises:
        UserError: If the loss or, outside fp16, a gradient is not finite (all ranks raise it at the same report), or
            the loader gives fewer batches than an epoch has.
    """
    run.model.train()
    device, steps = run.world.device, run.steps
    first_update = epoch * steps.updates_per_epoch
    meter = _Meter(run)
    bar = tqdm(total=steps.updates_per_epoch, desc=f"epoch {epoch}", disable=None if run.world.is_main else True)
    waiting_since = time.perf_counter()
    taken = 0
    for step, (images, targets) in enumerate(islice(loader, steps.steps_per_epoch)):
        taken = step + 1
        update_in_epoch, micro_step = divmod(step, steps.accumulation)
        update, micro_steps = first_update + update_in_epoch, steps.steps_of_update(update_in_epoch)
        is_last = micro_step == micro_steps - 1
        images = images.to(device, non_blocking=True, memory_format=run.memory_format)
        targets = targets.to(device, non_blocking=True)
        meter.data_seconds += time.perf_counter() - waiting_since
        meter.loss += _accumulate(run, images, targets, (update, micro_step), micro_steps, synchronise=is_last)
        if is_last:
            meter.grad_norm += _update(run, update)
            meter.updates, meter.micro_steps = meter.updates + 1, meter.micro_steps + micro_steps
            bar.update()
            if (update_in_epoch + 1) % report_every == 0 or update_in_epoch + 1 == steps.updates_per_epoch:
                latest = meter.report(epoch, update + 1, update_in_epoch + 1)
                left = datetime.timedelta(seconds=int(latest.seconds * (steps.updates - latest.update)))
                bar.set_postfix_str(
                    f"loss {latest.loss:.3f}, lr {latest.lr:.2e}, {latest.images_per_s:.0f} images/s, run left {left}"
                )
                report(latest)
                meter = _Meter(run)
        waiting_since = time.perf_counter()
    bar.close()
    if taken < steps.steps_per_epoch:
        raise UserError(
            f"the data gave {taken} of {steps.steps_per_epoch} batches in epoch {epoch}: a stream's shards are missing "
            "or hold fewer images than its index says; mend them"
        )


def _accumulate(
    run: Training, images: Tensor, targets: Tensor, where: tuple[int, int], micro_steps: int, synchronise: bool
) -> Tensor:
    """Adds a micro-batch's share of the gradients, and returns its share of the loss."""
    seed_everything(number_for(run.seed, "step", *where, run.world.rank))
    if run.mixup:
        images, targets = run.mixup(images, targets)
    distributed = hasattr(run.model, "no_sync")
    with run.model.no_sync() if distributed and not synchronise else nullcontext():
        with run.precision.autocast():
            loss = run.criterion(run.model(images), targets) / micro_steps
        run.scaler.scale(loss).backward()
    return loss.detach().double()


def _update(run: Training, update: int) -> Tensor:
    """Takes an optimizer step of a given number, and returns the norm of its gradients before clipping."""
    run.scheduler.step_update(update)
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.network.parameters(), run.clip_grad or math.inf)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema:
        run.ema.update(run.network, step=update + 1)
    return norm.double()


class _Meter:
    """Sums between two reports, kept on the device so that no step waits for it."""

    def __init__(self, run: Training) -> None:
        self._run = run
        self._start = time.perf_counter()
        self.loss = torch.zeros((), dtype=torch.float64, device=run.world.device)
        self.grad_norm = torch.zeros((), dtype=torch.float64, device=run.world.device)
        self.updates = self.micro_steps = 0
        self.data_seconds = 0.0

    def report(self, epoch: int, update: int, update_in_epoch: int) -> Report:
        run = self._run
        sums = sum_over_ranks(torch.stack((self.loss, self.grad_norm)))
        loss, grad_norm = (sums / (run.world.size * self.updates)).tolist()
        elapsed = time.perf_counter() - self._start
        # Under the fp16 scaler a gradient that is not finite is normal: the scaler leaves that update out.
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or run.scaler.is_enabled()):
            raise UserError(
                f"the loss became {loss} and the gradient norm {grad_norm} by update {update} (epoch {epoch}); no "
                "checkpoint of it was written: lower TRAIN.BASE_LR, set TRAIN.CLIP_GRAD, or try --precision fp32"
            )
        return Report(
            epoch=epoch,
            update=update,
            update_in_epoch=update_in_epoch,
            loss=loss,
            grad_norm=grad_norm,
            lr=max(group["lr"] for group in run.optimizer.param_groups),
            seconds=elapsed / self.updates,
            data_share=self.data_seconds / elapsed,
            images_per_s=self.micro_steps * run.batch_size * run.world.size / elapsed,
            memory_mb=_peak_memory_mb(run.world.device),
        )


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@torch.inference_mode()
def evaluate(network: nn.Module, loader: Batches, world: World, precision: Precision, images: int = 0) -> Score:
    """Scores a network on this rank's share of a data set, and adds the shares of all ranks.

    Args:
        network: The bare network: no rank waits for another while it runs, so the shares may differ in size.
        loader: This rank's images.
        world: This process among all.
        precision: How to compute.
        images: How many images all ranks together must score; 0 if that is not known.

    Raises:
        UserError: If another number, or none, was scored; all ranks raise it.
    """
    network.eval()
    sums = ScoreSums(world.device)
    for inputs, targets in tqdm(loader, desc="scoring", leave=False, disable=None if world.is_main else True):
        inputs = inputs.to(world.device, non_blocking=True)
        targets = targets.to(world.device, non_blocking=True)
        with precision.autocast():
            logits = network(inputs)
        sums.add(logits, targets)
    score = sums.total()
    if score.images == 0 or images not in (0, score.images):
        raise UserError(
            f"{score.images} of {images or 'some'} validation images were scored: "
            "the data is empty, or a stream skipped broken ones; mend it"
        )
    return score
