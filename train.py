"""Train GroupMixFormer, or fine-tune it.

Usage:
    python train.py --cfg configs/groupmixformer_small.yaml --data-path D --batch-size 64 --output O --tag T
    torchrun --nproc_per_node 8 train.py --cfg configs/groupmixformer_small.yaml --data-path D --output O --tag T

What a run starts from, the first that applies:
    1. --resume FILE: that checkpoint, wherever it is from.
    2. <output>/<MODEL.NAME>/<tag>/last.pth, unless TRAIN.AUTO_RESUME is False: the same command goes on where it was.
    3. --pretrained FILE: its weights, a fresh optimizer, epoch 0.
    4. Fresh weights.
A folder that holds a run of another network, or one that started from other --pretrained weights, is refused.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from data.build import EvalData, TrainData, build_eval_data, build_mixup, build_train_data
from data.datasets import check_same_classes, count_classes
from models.build import build_model
from models.groupmixformer import GroupMixFormer
from utils import checkpoint
from utils.cli import config_from, make_parser, run
from utils.config import accumulation_steps
from utils.curves import draw_curves
from utils.dist import World, barrier, broadcast_buffers, same_on_all_ranks, world
from utils.engine import Training, evaluate, train_one_epoch
from utils.errors import UserError
from utils.logger import MetricsLog, setup_logging
from utils.metrics import Score
from utils.optim import (
    Precision,
    Steps,
    build_ema,
    build_loss,
    build_optimizer,
    build_scheduler,
    choose_precision,
    choose_scoring_precision,
    memory_format,
)
from utils.report import log_plan, log_report, log_scores
from utils.resume import find_state, restore, start_from_pretrained, state_of
from utils.scoring import score_weights
from utils.seeding import number_for, seed_everything
from utils.throughput import throughput_line

_log = logging.getLogger(__name__)


def main() -> None:
    """Parses, then trains, scores or measures."""
    config = config_from(make_parser("Train GroupMixFormer, or fine-tune it.").parse_args())
    with world(config.DEVICE) as here:
        setup_logging(here.is_main)
        if config.EVAL_MODE:
            score, _ = score_weights(config, here, choose_scoring_precision(config, here.device, _log.info))
            _log.info(f" * Acc@1 {score.acc1:.3f} Acc@5 {score.acc5:.3f}")
            return
        precision = choose_precision(config, here.device, _log.info)
        if config.THROUGHPUT_MODE:
            network = build_model(config, config.MODEL.GMA.NUM_CLASSES)
            _log.info(throughput_line(network, config, here.device, precision))
        else:
            train(config, here, precision)


def train(config: CfgNode, here: World, precision: Precision) -> None:
    """Builds everything and runs the epochs."""
    train_data = build_train_data(config, here)
    num_classes = count_classes(config, train_data.classes)
    eval_data = build_eval_data(config, here, known=None, num_classes=None)
    check_same_classes(train_data.classes, eval_data.classes)
    seed_everything(number_for(config.SEED, "weights"))
    network = build_model(config, num_classes)

    folder = Path(config.OUTPUT) / config.MODEL.NAME / config.TAG
    state = find_state(config, folder)
    if not same_on_all_ranks(state["progress"]["update"] if state else 0, here.device):
        raise UserError(f"ranks find different checkpoints in {folder}: put --output where all machines see it")
    if state is None:
        start_from_pretrained(config, network)
    make_folder(folder, here)
    setup_logging(here.is_main, folder)
    training = build_training(config, here, precision, network, train_data.steps_per_epoch)
    if state:
        _log.info(
            f"going on from {config.MODEL.RESUME or folder / checkpoint.LAST}, epoch {state['progress']['epoch']}"
        )
        restore(state, training, config)
    if here.is_main:
        (folder / "config.yaml").write_text(config.dump())
    log_plan(config, training, eval_data.images)
    run_epochs(config, training, train_data, eval_data, folder, state)


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


def build_training(
    config: CfgNode, here: World, precision: Precision, network: GroupMixFormer, steps_per_epoch: int
) -> Training:
    """Puts the network on its device and builds what trains it."""
    layout = memory_format(config)
    on_gpus = here.device.type == "cuda"
    torch.backends.cudnn.benchmark = on_gpus
    if on_gpus and here.size > 1 and config.TRAIN.SYNC_BN:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(here.device, memory_format=layout)
    steps = Steps(steps_per_epoch, accumulation_steps(config), config.TRAIN.EPOCHS)
    optimizer = build_optimizer(config, network, here.size)
    ema = build_ema(config, network)
    model: nn.Module = network
    if here.size > 1:
        model = DistributedDataParallel(
            network,
            device_ids=[here.device.index] if on_gpus else None,
            gradient_as_bucket_view=True,
        )
    return Training(
        network=network,
        model=torch.compile(model) if config.TRAIN.COMPILE else model,
        criterion=build_loss(config),
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, steps, here.size),
        scaler=precision.grad_scaler(),
        ema=ema,
        mixup=build_mixup(config, network.num_classes),
        precision=precision,
        world=here,
        steps=steps,
        batch_size=config.DATA.BATCH_SIZE,
        clip_grad=config.TRAIN.CLIP_GRAD,
        seed=config.SEED,
        memory_format=layout,
    )


def run_epochs(
    config: CfgNode,
    training: Training,
    train_data: TrainData,
    eval_data: EvalData,
    folder: Path,
    state: dict[str, Any] | None,
) -> None:
    """Trains, scores, draws and saves, epoch after epoch.

    Args:
        config: The configuration.
        training: What trains.
        train_data: Training batches.
        eval_data: Validation batches.
        folder: The run's.
        state: The checkpoint that the run goes on from, if any.
    """
    first_epoch = state["progress"]["epoch"] if state else 0
    best = state["best"] if state and (folder / checkpoint.BEST).is_file() else None  # the best of this folder
    steps, is_main = training.steps, training.world.is_main
    with MetricsLog(folder if is_main else None, first_epoch * steps.updates_per_epoch) as metrics:
        report = partial(log_report, training=training, metrics=metrics)
        for epoch in range(first_epoch, steps.epochs):
            train_data.set_epoch(epoch)
            train_one_epoch(training, train_data.loader, epoch, config.PRINT_FREQ, report)
            scores = evaluate_epoch(training, eval_data)
            of = "ema" if training.ema else "model"
            is_best = best is None or scores[of].acc1 > best["acc1"]
            best = {"epoch": epoch, "of": of, "acc1": scores[of].acc1} if is_best else best
            log_scores(scores, best, epoch, training, metrics)
            if is_main:
                draw_curves(folder, steps.updates_per_epoch)
                checkpoint.save_epoch(
                    state_of(training, epoch + 1, best, config, train_data.classes),
                    folder,
                    epoch + 1,
                    is_best=is_best,
                    number=(epoch + 1) % config.SAVE_FREQ == 0 or epoch + 1 == steps.epochs,
                    keep=config.KEEP,
                )
            barrier()
    reached = (
        f"best Acc@1 {best['acc1']:.3f} after {best['epoch'] + 1} epochs" if best else "no epoch was left to train"
    )
    _log.info(f"done: {reached}; everything is in {folder}")


def evaluate_epoch(training: Training, data: EvalData) -> dict[str, Score]:
    """Scores the 'model', and its moving average as 'ema' where there is one."""
    networks = {"model": training.network} | ({"ema": training.ema.module} if training.ema else {})
    scores = {}
    for name, network in networks.items():
        broadcast_buffers(network)
        scores[name] = evaluate(network, data.loader, training.world, training.precision, data.images)
    return scores


if __name__ == "__main__":
    run(main)
