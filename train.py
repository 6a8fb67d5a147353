"""Train GroupMixFormer, or fine-tune it.

Usage:
    python train.py --cfg configs/groupmixformer_small.yaml --data-path D --batch-size 64 --output O --tag T
    torchrun --nproc_per_node 8 train.py --cfg configs/groupmixformer_small.yaml --data-path D --output O --tag T

What a run starts from, the first that applies:
    1. --resume FILE: that checkpoint, wherever it is from.
    2. <output>/<MODEL.NAME>/<tag>/last.pth, unless TRAIN.AUTO_RESUME is False: the same command goes on where it was.
    3. --pretrained FILE: its weights, a fresh optimizer, epoch 0.
    4. Fresh weights.
"""

import datetime
import logging
import platform
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from data.build import EvalData, TrainData, build_eval_data, build_mixup, build_train_data
from data.datasets import check_same_classes, count_classes
from models.build import build_model, load_pretrained, load_weights
from models.groupmixformer import GroupMixFormer
from utils import checkpoint
from utils.cli import config_from, make_parser, run
from utils.config import accumulation_steps, differences
from utils.curves import draw_curves
from utils.dist import World, barrier, broadcast_buffers, world
from utils.engine import Report, Training, evaluate, train_one_epoch
from utils.errors import UserError, listing
from utils.logger import MetricsLog, setup_logging
from utils.metrics import Score
from utils.optim import (
    Steps,
    build_ema,
    build_loss,
    build_optimizer,
    build_scheduler,
    choose_precision,
    learning_rate_scale,
)
from utils.profiling import throughput_line
from utils.scoring import score_weights
from utils.seeding import number_for, seed_everything

_log = logging.getLogger(__name__)

# Keys that may differ between a run and what resumes it by itself: where things lie, and how often they are written.
_FREE_KEYS = ("DATA.DATA_PATH", "DATA.NUM_WORKERS", "DATA.PIN_MEMORY", "MODEL.RESUME", "TRAIN.AUTO_RESUME", "DEVICE")
_FREE_KEYS += ("OUTPUT", "TAG", "SAVE_FREQ", "KEEP", "PRINT_FREQ", "EVAL_MODE", "THROUGHPUT_MODE")


def main() -> None:
    """Parses, then trains, scores or measures."""
    config = config_from(make_parser("Train GroupMixFormer, or fine-tune it.").parse_args())
    with world(config.DEVICE) as here:
        setup_logging(here.is_main)
        precision = choose_precision(config, here.device, _log.info)
        if config.THROUGHPUT_MODE:
            network = build_model(config, config.MODEL.GMA.NUM_CLASSES)
            _log.info(throughput_line(network, config, here.device, precision))
        elif config.EVAL_MODE:
            score, _ = score_weights(config, here, precision)
            _log.info(" * Acc@1 %.3f Acc@5 %.3f", score.acc1, score.acc5)
        else:
            train(config, here)


def train(config: CfgNode, here: World) -> None:
    """Builds everything and runs the epochs."""
    train_data = build_train_data(config, here)
    num_classes = count_classes(config, train_data.classes)
    eval_data = build_eval_data(config, here, train_data.classes, num_classes)
    check_same_classes(train_data.classes, eval_data.classes)
    seed_everything(number_for(config.SEED, "weights"))
    network = build_model(config, num_classes)

    folder = Path(config.OUTPUT) / config.MODEL.NAME / config.TAG
    resumed = resume_state(config, folder)
    if config.MODEL.PRETRAINED and not resumed:
        for sentence in load_pretrained(
            network, checkpoint.load(config.MODEL.PRETRAINED)["model"], config.MODEL.PRETRAINED
        ):
            _log.warning(sentence)
    make_folder(folder, here)
    setup_logging(here.is_main, folder)

    training = build_training(config, here, network, train_data, num_classes)
    first_epoch, best = restore(resumed, training)
    describe(config, here, training, train_data, eval_data, folder)
    with MetricsLog(folder if here.is_main else None, first_epoch * training.steps.updates_per_epoch) as metrics:
        for epoch in range(first_epoch, config.TRAIN.EPOCHS):
            train_data.set_epoch(epoch)
            train_one_epoch(
                training, train_data.loader, epoch, config.PRINT_FREQ, lambda r: log_report(r, training, metrics)
            )
            scores = evaluate_epoch(training, eval_data)
            reached = {
                "epoch": epoch,
                "metric": "ema" if training.ema else "model",
                "acc1": list(scores.values())[-1].acc1,
            }
            is_best = best is None or reached["acc1"] > best["acc1"]
            best = reached if is_best else best
            log_scores(scores, best, epoch, training, metrics)
            if here.is_main:
                draw_curves(folder, training.steps.updates_per_epoch)
                checkpoint.save_epoch(
                    state_of(training, epoch + 1, best, config, train_data.classes),
                    folder,
                    epoch + 1,
                    is_best=is_best,
                    number=(epoch + 1) % config.SAVE_FREQ == 0 or epoch + 1 == config.TRAIN.EPOCHS,
                    keep=config.KEEP,
                )
            barrier()
    _log.info("done: best Acc@1 %.3f after epoch %d; everything is in %s", best["acc1"], best["epoch"], folder)


def build_training(
    config: CfgNode, here: World, network: GroupMixFormer, train_data: TrainData, num_classes: int
) -> Training:
    """Puts the network on its device and builds what trains it."""
    memory_format = torch.channels_last if config.CHANNELS_LAST else torch.contiguous_format
    on_gpus = here.device.type == "cuda"
    torch.backends.cudnn.benchmark = on_gpus
    synchronise_norms = on_gpus and here.size > 1 and config.TRAIN.SYNC_BN
    if synchronise_norms:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(here.device, memory_format=memory_format)
    steps = Steps(train_data.steps_per_epoch, accumulation_steps(config), config.TRAIN.EPOCHS)
    optimizer = build_optimizer(config, network, here.size)
    model: nn.Module = network
    if here.size > 1:
        model = DistributedDataParallel(
            network,
            device_ids=[here.device.index] if on_gpus else None,
            broadcast_buffers=not synchronise_norms,
            gradient_as_bucket_view=True,
        )
    precision = choose_precision(config, here.device, lambda sentence: None)
    return Training(
        network=network,
        model=torch.compile(model) if config.TRAIN.COMPILE else model,
        criterion=build_loss(config),
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, steps, here.size),
        scaler=precision.grad_scaler(),
        ema=build_ema(config, network),
        mixup=build_mixup(config, num_classes),
        precision=precision,
        world=here,
        steps=steps,
        batch_size=config.DATA.BATCH_SIZE,
        clip_grad=config.TRAIN.CLIP_GRAD,
        seed=config.SEED,
        memory_format=memory_format,
    )


def resume_state(config: CfgNode, folder: Path) -> dict[str, Any] | None:
    """The checkpoint to go on from, if there is one.

    Raises:
        UserError: If the folder holds another run, or the checkpoint is not one of a run.
    """
    last = checkpoint.find_last(folder)
    if not config.MODEL.RESUME and last and not config.TRAIN.AUTO_RESUME:
        raise UserError(f"{folder} holds a run already: choose another --tag, or leave TRAIN.AUTO_RESUME on")
    path = config.MODEL.RESUME or last
    if not path:
        return None
    state = checkpoint.load(path)
    if "progress" not in state:
        raise UserError(f"{path} holds weights but no run to go on with: start from it with --pretrained")
    changes = [change for change in differences(config, state["config"]) if change.split(":")[0] not in _FREE_KEYS]
    foreign = [change for change in changes if change.startswith("MODEL.")]
    if foreign and not config.MODEL.RESUME:
        raise UserError(
            f"{folder} holds a run with other settings ({listing(foreign)}): choose another --tag, "
            f"or go on with --resume {path}"
        )
    _log.info("going on from %s, epoch %d", path, state["progress"]["epoch"])
    if changes:
        _log.warning("settings differ from those of %s: %s", path, listing(changes, 20))
    return state


def make_folder(folder: Path, here: World) -> None:
    """Makes the run's folder and checks that it can be written to.

    Raises:
        UserError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{here.rank}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): choose another --output") from None


def restore(state: dict[str, Any] | None, training: Training) -> tuple[int, dict[str, Any] | None]:
    """Loads a checkpoint of a run into what trains it.

    Returns:
        The epoch to go on with, and the best so far.

    Raises:
        UserError: If the checkpoint is of another network, optimizer, or length of an epoch.
    """
    if state is None:
        return 0, None
    updates = state["progress"]["updates_per_epoch"]
    if updates != training.steps.updates_per_epoch:
        raise UserError(
            f"the checkpoint has {updates} updates an epoch and this run {training.steps.updates_per_epoch}: "
            "use the same data, batch size, accumulation and number of ranks"
        )
    load_weights(training.network, state["model"], "the checkpoint")
    try:
        training.optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise UserError(f"the checkpoint's optimizer does not fit: {error}: use the configuration of its run") from None
    if training.scaler.is_enabled() and state["scaler"]:
        training.scaler.load_state_dict(state["scaler"])
    if training.ema:
        load_weights(training.ema.module, state["ema"] or state["model"], "the checkpoint's moving average")
    return state["progress"]["epoch"], state["best"]


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


def evaluate_epoch(training: Training, data: EvalData) -> dict[str, Score]:
    """Scores the network, and its moving average where there is one."""
    broadcast_buffers(training.network)
    scores = {"": evaluate(training.network, data.loader, training.world, training.precision)}
    if training.ema:
        broadcast_buffers(training.ema.module)
        scores["ema_"] = evaluate(training.ema.module, data.loader, training.world, training.precision)
    return scores


def describe(
    config: CfgNode, here: World, training: Training, train_data: TrainData, eval_data: EvalData, folder: Path
) -> None:
    """Logs what is about to run, and writes config.yaml."""
    parameters = sum(parameter.numel() for parameter in training.network.parameters())
    steps, scale = training.steps, learning_rate_scale(config, here.size)
    _log.info("%s: %s parameters, %s classes", config.MODEL.NAME, f"{parameters:,}", training.network.num_classes)
    _log.info(
        "%d rank(s) on %s, %s, %d CPU threads each", here.size, here.device.type, training.precision.name,
        torch.get_num_threads(),
    )  # fmt: skip
    _log.info(
        "%d epochs of %d updates of %d images; learning rate %.3g after warm-up; %d validation images",
        steps.epochs, steps.updates_per_epoch, config.DATA.BATCH_SIZE * here.size * steps.accumulation,
        config.TRAIN.BASE_LR * scale, eval_data.images,
    )  # fmt: skip
    _log.info("loss: %s; mixup: %s", type(training.criterion).__name__, "on" if training.mixup else "off")
    if here.is_main:
        (folder / "config.yaml").write_text(config.dump())


def log_report(report: Report, training: Training, metrics: MetricsLog) -> None:
    """Writes one line of training progress, in the published form."""
    steps = training.steps
    left = datetime.timedelta(seconds=int(report.seconds * (steps.updates - report.update)))
    _log.info(
        f"Train: [{report.epoch}/{steps.epochs}][{report.update_in_epoch}/{steps.updates_per_epoch}]\t"
        f"eta {left} lr {report.lr:.6f}\ttime {report.seconds:.4f}\tloss {report.loss:.4f}\t"
        f"grad_norm {report.grad_norm:.4f}\tmem {report.memory_mb:.0f}MB\t{report.images_per_s:.1f} images/s",
        extra={"progress": True},
    )
    values = {
        "update": report.update,
        "epoch": report.epoch,
        "loss": report.loss,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "images_per_s": report.images_per_s,
    }
    tags = {
        "loss": report.loss,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "images_per_s": report.images_per_s,
        "data_time": report.data_share * report.seconds,
        "memory_mb": report.memory_mb,
    }
    metrics.write(values, tags)


def log_scores(
    scores: dict[str, Score], best: dict[str, Any], epoch: int, training: Training, metrics: MetricsLog
) -> None:
    """Writes the scores of an epoch."""
    values: dict[str, float] = {"update": (epoch + 1) * training.steps.updates_per_epoch, "epoch": epoch}
    tags = {}
    for prefix, score in scores.items():
        _log.info(" * %sAcc@1 %.3f Acc@5 %.3f", "EMA " if prefix else "", score.acc1, score.acc5)
        values |= {f"{prefix}acc1": score.acc1, f"{prefix}acc5": score.acc5, f"{prefix}loss": score.loss}
        suffix = "_ema" if prefix else ""
        tags |= {f"Acc@1{suffix}": score.acc1, f"Acc@5{suffix}": score.acc5}
    _log.info("best Acc@1 so far: %.3f (epoch %d)", best["acc1"], best["epoch"])
    metrics.write(values, tags)


if __name__ == "__main__":
    run(main)
