"""Keeps a run: tells how it goes, writes its checkpoints, stops it when it is asked to or something went wrong."""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from yacs.config import CfgNode

from data.build import TrainData
from utils import checkpoint
from utils.broken import add_broken
from utils.curves import draw_curves
from utils.dist import gather_objects, together
from utils.engine import Training, Watch
from utils.errors import Stopped, UserError, listing
from utils.logger import MetricsLog
from utils.meter import Report
from utils.metrics import TaskScore
from utils.report import log_report, log_scores
from utils.resume import state_of
from utils.signals import StopSignals
from utils.tracking import Tracker
from utils.writer import BackgroundWriter

_log = logging.getLogger(__name__)


class Keeper(Watch):
    """Watches over a run in its folder. Only rank 0 writes; where it fails, the next update's vote tells all ranks.

    Args:
        config: The configuration.
        training: What trains.
        folder: The run's.
        train_data: What it trains on.
        best: The best epoch so far: {'epoch', 'of', and the measure that it was chosen by: 'acc1'}, or None; rank 0
            alone must know it.
        signals: What asks this rank to stop.
    """

    def __init__(
        self,
        config: CfgNode,
        training: Training,
        folder: Path,
        train_data: TrainData,
        best: dict[str, Any] | None,
        signals: StopSignals,
    ) -> None:
        self._config, self._training, self.folder, self._train_data = config, training, folder, train_data
        self.best, self._signals = best, signals
        self._writer, self._failure, self._copy = BackgroundWriter(), None, None
        self._saved_at = time.monotonic()
        self._metrics: MetricsLog | None = None
        if training.world.is_main:
            tracker = Tracker(folder, config) if config.WANDB else None
            reached = training.progress.position(training.steps.updates_per_epoch)
            self._metrics = MetricsLog(folder, reached, training.progress.place == 0, tracker)

    def asked_to_stop(self) -> int:
        """The signal that asks this rank to stop, or 0."""
        return self._signals.asked()

    def alarm(self) -> tuple[int, bool]:
        """The signal that asks this rank to stop, or 0; and whether this rank failed to write something."""
        return self._signals.asked(), self._failure is not None or self._writer.failed()

    def on_broken(self, complaints: list[str]) -> None:
        """Lists broken images, or stops at them."""
        folder = self.folder if self._training.world.is_main else None
        with together():
            add_broken(self._training.progress.broken, complaints, self._config.DATA, self._train_data.images, folder)

    def on_report(self, report: Report) -> None:
        """Logs how training goes."""
        self._attempt(log_report, report, self._training, self._metrics)

    def on_update(self, signal: int, failed: bool) -> None:
        """Saves where it is time to.

        Raises:
            UserError: On all ranks, if something could not be written.
            Stopped: On all ranks, if a signal asked one to stop; a checkpoint is written before.
        """
        if failed:
            self.wait()
        if signal:
            self.stop(signal)
        if self._is_due():
            self.save()

    def on_epoch(self, scores: dict[str, TaskScore]) -> None:
        """Logs the scores of an epoch, draws the curves and saves.

        Args:
            scores: By 'model' and, where there is one, 'ema'.
        """
        training, epoch = self._training, self._training.progress.epoch
        measures = scores["model"].measures
        first = next(iter(measures))
        of = max(reversed(scores), key=lambda name: getattr(scores[name], first))  # of equals the moving average
        reached = getattr(scores[of], first)
        is_best = self.best is None or reached > self.best[first]
        if is_best:
            self.best = {"epoch": epoch, "of": of, first: reached}
        self._attempt(log_scores, scores, self.best, epoch, training, self._metrics)
        self._attempt(draw_curves, self.folder, training.steps.updates_per_epoch, measures)
        training.progress.end_epoch()
        self.save(is_best)

    def save(self, is_best: bool = False) -> None:
        """Writes a checkpoint in the background; training stops for the copy to host memory only."""
        self._attempt(self._save, is_best)

    def stop(self, signal: int) -> NoReturn:
        """Writes a checkpoint and ends the run; every rank must call.

        Raises:
            Stopped: Always.
        """
        self.save()
        self.wait()
        epoch, place = self._training.progress.epoch, self._training.progress.place
        _log.info(
            "stopped by signal %d after %d epoch(s) and %d update(s), and saved: the same command goes on from there",
            signal, epoch, place,
        )  # fmt: skip
        raise Stopped(signal)

    def wait(self) -> None:
        """Waits until all is written; every rank must call.

        Raises:
            UserError: On all ranks, if something could not be written.
        """
        with together():
            if self._failure:
                raise self._failure
            self._writer.wait()

    def on_not_finite(self, what: str, losses: list[float]) -> None:
        """Lists the samples of an update whose loss or gradients are no numbers, and ends a run that does not skip."""
        progress, steps = self._training.progress, self._training.steps
        own = self._train_data.names(progress.epoch, steps.batches_of_update(progress.place))
        names = gather_objects(own)
        path = self.folder / f"not_finite_epoch_{progress.epoch}_update_{progress.place + 1}.txt"
        lines = [f"rank {rank}\t{name}\n" for rank, of_rank in enumerate(names) for name in of_rank]
        with together():
            if self._training.world.is_main:
                checkpoint.write_text(path, "".join(lines))
        suspects = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(names))
        first = [name for rank in suspects for name in names[rank]]
        listed = f"its samples are listed in {path} (of rank {', '.join(map(str, suspects))}: {listing(first)})"
        if self._config.TRAIN.ON_NONFINITE == "stop":
            raise UserError(
                f"{what}; it was not taken, and {listed}: mend those, lower TRAIN.BASE_LR, set TRAIN.CLIP_GRAD, try "
                "--precision fp32, or set TRAIN.ON_NONFINITE skip"
            )
        _log.warning("%s; it is left out, and %s", what, listed)

    def close(self) -> None:
        """Lets the last checkpoint be written, and closes the logs."""
        self._writer.close()
        if self._metrics:
            self._metrics.close()

    def _is_due(self) -> bool:
        train, place = self._config.TRAIN, self._training.progress.place
        if place == self._training.steps.updates_per_epoch:
            return False  # the epoch is about to be scored and saved
        seconds = time.monotonic() - self._saved_at
        by_updates = train.SAVE_UPDATES > 0 and place % train.SAVE_UPDATES == 0
        return by_updates or (train.SAVE_MINUTES > 0 and seconds >= 60 * train.SAVE_MINUTES)

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Does something on rank 0; if it fails, the next vote tells all ranks."""
        if not self._training.world.is_main or self._failure:
            return
        try:
            action(*arguments)
        except UserError as error:
            self._failure = error

    def _save(self, is_best: bool) -> None:
        self._writer.wait()  # it reads the copy that is about to be overwritten
        data = self._train_data
        state = state_of(self._training, self.best, self._config, data.classes, data.images)
        self._copy = checkpoint.on_host(state, self._copy)
        settings = {"is_best": is_best, "every": self._config.SAVE_FREQ, "keep": self._config.KEEP}
        self._writer.submit(partial(checkpoint.save_numbered, self._copy, self.folder, **settings))
        self._saved_at = time.monotonic()
