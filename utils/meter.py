"""How training goes between two reports: losses and norms from the run's progress, times and memory from the clock."""

import datetime
import resource
import sys
import time
from dataclasses import dataclass

import torch

from utils.progress import Progress, Steps, Window


@dataclass(frozen=True)
class Report:
    """How training goes, averaged since the last report, over all ranks.

    Attributes:
        epoch: Number of the epoch, from 0.
        update: Updates completed in the run, those left out among them.
        update_in_epoch: Updates completed in the epoch, those left out among them.
        loss: Mean loss of the updates that were taken; not a number if none was.
        grad_norm: Mean norm of their gradients before clipping.
        left_out: Updates left out in the run.
        lr: Largest learning rate of the last update.
        seconds: Time of an update.
        left_s: Seconds that the rest of the run takes at this speed.
        data_share: Share of the time spent waiting for data.
        images_per_s: Images per second, over all ranks.
        memory_mb: Peak memory, of the GPU where there is one.
    """

    epoch: int
    update: int
    update_in_epoch: int
    loss: float
    grad_norm: float
    left_out: int
    lr: float
    seconds: float
    left_s: float
    data_share: float
    images_per_s: float
    memory_mb: float

    @property
    def left(self) -> datetime.timedelta:
        """`left_s` to tell people, in whole seconds."""
        return datetime.timedelta(seconds=int(self.left_s))


class Meter:
    """Measures time and images since the last report.

    Args:
        device: Whose memory is told.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._updates = self._images = 0
        self._data_seconds = 0.0

    def add_data_seconds(self, seconds: float) -> None:
        """Counts time spent waiting for data."""
        self._data_seconds += seconds

    def add_update(self, images: int) -> None:
        """Counts an update, taken or left out, and its images over all ranks."""
        self._updates += 1
        self._images += images

    def report(self, progress: Progress, steps: Steps, lr: float) -> Report:
        """What was measured since the last report, which begins anew."""
        elapsed, window = time.perf_counter() - self._start, progress.window
        mean = [total / window.updates if window.updates else float("nan") for total in (window.loss, window.grad_norm)]
        update, seconds = progress.position(steps.updates_per_epoch), elapsed / self._updates
        report = Report(
            epoch=progress.epoch,
            update=update,
            update_in_epoch=progress.place,
            loss=mean[0],
            grad_norm=mean[1],
            left_out=progress.left_out,
            lr=lr,
            seconds=seconds,
            left_s=seconds * (steps.updates - update),
            data_share=self._data_seconds / elapsed,
            images_per_s=self._images / elapsed,
            memory_mb=_peak_memory_mb(self._device),
        )
        progress.window = Window()
        self._restart()
        return report


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    units = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, elsewhere KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units
