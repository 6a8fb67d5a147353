"""What a training run tells its user: log lines in the published form, TensorBoard tags, metrics.jsonl."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from yacs.config import CfgNode

from utils.engine import Training
from utils.logger import MetricsLog
from utils.meter import Report
from utils.metrics import TaskScore, describe
from utils.optim import learning_rate_scale

_log = logging.getLogger(__name__)


def log_plan(config: CfgNode, training: Training, train_images: int, val_images: int) -> None:
    """Says what is about to run.

    Args:
        config: The configuration.
        training: What trains.
        train_images: How many images are trained on, 0 where a stream does not tell.
        val_images: How many are scored, likewise.
    """
    parameters = sum(parameter.numel() for parameter in training.network.parameters())
    steps, world = training.steps, training.world
    images = training.batch_size * world.size * steps.accumulation
    lr = config.TRAIN.BASE_LR * learning_rate_scale(config, world.size)
    done = f", {type(training.batch_transform).__name__}" if training.batch_transform else ""
    _log.info(f"{config.MODEL.NAME}: {parameters:,} parameters, {training.network.num_classes} classes")
    _log.info(
        f"{world.size} rank(s) on {world.device.type}, {training.precision.name}, {torch.get_num_threads()} CPU threads"
    )
    _log.info(f"{steps.epochs} epochs of {steps.updates_per_epoch} updates of {images} images, up to lr {lr:.3g}")
    _log.info(f"loss {type(training.criterion).__name__}{done}")
    of = [f"{count:,}" if count else "an unknown number of" for count in (train_images, val_images)]
    _log.info(f"{of[0]} images to train on, {of[1]} to score")


def log_report(report: Report, training: Training, metrics: MetricsLog) -> None:
    """Writes one line of training progress."""
    steps = training.steps
    left_out = f"\t{report.left_out} left out" if report.left_out else ""
    _log.info(
        f"Train: [{report.epoch}/{steps.epochs}][{report.update_in_epoch}/{steps.updates_per_epoch}]\t"
        f"eta {report.left} lr {report.lr:.6f}\ttime {report.seconds:.4f}\tloss {report.loss:.4f}\t"
        f"grad_norm {report.grad_norm:.4f}\tmem {report.memory_mb:.0f}MB\t{report.images_per_s:.1f} images/s{left_out}",
        extra={"progress": True},
    )
    common = {
        "loss": report.loss,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "left_out": report.left_out,
        "images_per_s": report.images_per_s,
    }
    extras = {"data_time": report.data_share * report.seconds, "memory_mb": report.memory_mb}
    metrics.write({"update": report.update, "epoch": report.epoch, **common}, common | extras)


def log_scores(
    scores: dict[str, TaskScore], best: dict[str, Any], epoch: int, training: Training, metrics: MetricsLog
) -> None:
    """Writes the scores of an epoch.

    Args:
        scores: By 'model' and, where there is one, 'ema'.
        best: The best so far.
        epoch: Number of the epoch, from 0.
        training: What trains.
        metrics: Where to.
    """
    line: dict[str, float] = {"update": (epoch + 1) * training.steps.updates_per_epoch, "epoch": epoch}
    tags = {}
    for name, score in scores.items():
        of_ema = name == "ema"
        _log.info(f" * {'EMA ' if of_ema else ''}{describe(score)}")
        prefix, suffix = ("ema_", "_ema") if of_ema else ("", "")
        line |= {f"{prefix}{measure}": getattr(score, measure) for measure in (*score.measures, "loss")}
        tags |= {f"{label}{suffix}": getattr(score, measure) for measure, label in score.measures.items()}
    _log.info(f"best so far: {describe_best(best, score.measures)}")
    metrics.write(line, tags)


def describe_best(best: dict[str, Any], measures: Mapping[str, str]) -> str:
    """The best epoch so far in words: what it reached by the first measure, whose weights did, and when."""
    measure, label = next(iter(measures.items()))
    whose = " of the moving average" if best["of"] == "ema" else ""
    return f"{label} {best[measure]:.3f}{whose} after {best['epoch'] + 1} epochs"
