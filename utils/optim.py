"""Optimizer, learning rate schedule, moving average and loss, from the configuration; timm's and torch's."""

import inspect
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, muon
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from yacs.config import CfgNode

from utils.config import accumulation_steps, mixes
from utils.errors import UserError, listing, reason
from utils.progress import Steps


def learning_rate_scale(config: CfgNode, ranks: int) -> float:
    """Images of one update over those that the configured learning rates are for."""
    return config.DATA.BATCH_SIZE * ranks * accumulation_steps(config) / config.TRAIN.LR_BATCH


def build_optimizer(config: CfgNode, model: nn.Module, ranks: int) -> torch.optim.Optimizer:
    """timm's optimizer of the configured name: no weight decay on biases and 1-D tensors, optional layer decay.

    Raises:
        UserError: If timm has no optimizer of that name, or it cannot be used here.
    """
    settings = config.TRAIN.OPTIMIZER
    name = settings.NAME.lower()
    if name not in list_optimizers():
        raise UserError(f"TRAIN.OPTIMIZER.NAME is {settings.NAME!r}: timm has {listing(list_optimizers(), 12)}")
    info = get_optimizer_info(name)
    if info.second_order:
        raise UserError(
            f"TRAIN.OPTIMIZER.NAME {name} needs second derivatives, which are not computed here: choose another"
        )
    special: dict[str, Any] = {"eps": settings.EPS} if info.has_eps else {}
    if info.has_betas:
        if info.num_betas != len(settings.BETAS):
            raise UserError(
                f"TRAIN.OPTIMIZER.NAME {name} takes {info.num_betas} betas, and TRAIN.OPTIMIZER.BETAS is "
                f"{settings.BETAS}: give as many"
            )
        special["betas"] = tuple(settings.BETAS)
    if callable(info.opt_class) and "fused" in inspect.signature(info.opt_class).parameters:
        special["fused"] = True  # one kernel for all parameters, where torch has one
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=name,
            lr=config.TRAIN.BASE_LR * learning_rate_scale(config, ranks),
            weight_decay=config.TRAIN.WEIGHT_DECAY,
            momentum=settings.MOMENTUM,
            layer_decay=config.TRAIN.LAYER_DECAY if config.TRAIN.LAYER_DECAY < 1 else None,
            **special,
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise UserError(f"TRAIN.OPTIMIZER.NAME {name} cannot be used here ({reason(error)}): choose another") from None
    if isinstance(optimizer, muon.Muon) and next(model.parameters()).device.type == "cpu":
        _compute_in_float32(optimizer)
    return optimizer


def _compute_in_float32(optimizer: muon.Muon) -> None:
    """Has Muon's matrix products be float32's; timm's are bfloat16's, which many CPUs only emulate, slowly."""
    float32 = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    optimizer.step = patch.object(muon, "zeropower_via_newtonschulz", float32)(optimizer.step)


def build_scheduler(config: CfgNode, optimizer: torch.optim.Optimizer, steps: Steps, ranks: int) -> Scheduler:
    """The learning rate of an update by its number: warm-up inside the epochs, then cosine, linear or by steps.

    Raises:
        UserError: If the warm-up is longer than the run.
    """
    train, schedule = config.TRAIN, config.TRAIN.LR_SCHEDULER
    scale, epoch = learning_rate_scale(config, ranks), steps.updates_per_epoch
    if steps.updates < train.WARMUP_UPDATES:
        raise UserError(
            f"TRAIN.WARMUP_UPDATES {train.WARMUP_UPDATES} is more than the run's {steps.updates} updates: lower it"
        )
    linear = schedule.NAME == "linear"
    scheduler, _ = create_scheduler_v2(  # whose epochs are updates here
        optimizer,
        sched="poly" if linear else schedule.NAME,
        num_epochs=steps.updates,
        decay_epochs=schedule.DECAY_EPOCHS * epoch,
        decay_milestones=[milestone * epoch + 1 for milestone in schedule.MILESTONES],  # timm steps one update early
        decay_rate=1.0 if linear else schedule.DECAY_RATE,  # timm's power of the polynomial
        min_lr=train.MIN_LR * scale,
        warmup_lr=train.WARMUP_LR * scale,
        warmup_epochs=train.WARMUP_UPDATES or train.WARMUP_EPOCHS * epoch,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler


def build_ema(config: CfgNode, model: nn.Module) -> ModelEmaV3 | None:
    """timm's moving average of parameters and buffers, or None where it is off."""
    train = config.TRAIN
    return ModelEmaV3(model, decay=train.EMA_DECAY, use_warmup=train.EMA_WARMUP) if train.EMA_DECAY > 0 else None


def build_loss(config: CfgNode) -> nn.Module:
    """The loss that follows from what is on: soft targets under mixup, else label smoothing, else cross-entropy."""
    loss: nn.Module = nn.CrossEntropyLoss()
    if mixes(config):
        loss = SoftTargetCrossEntropy()
    elif config.MODEL.LABEL_SMOOTHING > 0:
        loss = LabelSmoothingCrossEntropy(config.MODEL.LABEL_SMOOTHING)
    loss.register_forward_pre_hook(_in_float32)
    return loss


def _in_float32(_loss: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gives a loss logits of half precision as float32, as autocast does by itself on GPUs only."""
    logits, targets = inputs
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), targets
