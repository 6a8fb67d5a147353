"""Knowledge distillation: the network learns from a teacher's answers beside the labels.

Soft: Hinton et al., 2015, https://arxiv.org/abs/1503.02531. Hard: Touvron et al., 2020, https://arxiv.org/abs/2012.12877.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import load_state_dict
from torch import Tensor, nn
from yacs.config import CfgNode

from utils import checkpoint
from utils.errors import UserError, reason
from utils.precision import Precision, memory_format
from utils.trained import load_trained

_log = logging.getLogger(__name__)

_LONGEST = 300  # letters of a reason: torch names every tensor

Mix = Callable[[Tensor, Any], tuple[Tensor, Any]]


class DistillationLoss(nn.Module):
    """(1 - weight) of the loss of the labels, and weight of the distance from the teacher.

    Args:
        of_labels: Loss of logits [B, classes] and whatever the labels are.
        weight: Of the teacher, from 0 to 1.
        temperature: What both sides' logits are divided by. The soft loss is multiplied by its square, which keeps its
            gradients' size.
        hard: Whether the teacher's first class counts alone, as if it were the label.
    """

    def __init__(self, of_labels: nn.Module, weight: float, temperature: float, hard: bool) -> None:
        super().__init__()
        self._of_labels, self._weight, self._temperature, self._hard = of_labels, weight, temperature, hard

    def forward(self, logits: Tensor, targets: tuple[Any, Tensor]) -> Tensor:
        """The loss of logits [B, classes], labels, and the teacher's logits [B, classes]."""
        labels, taught = targets
        return (1 - self._weight) * self._of_labels(logits, labels) + self._weight * self._of_teacher(logits, taught)

    def _of_teacher(self, logits: Tensor, taught: Tensor) -> Tensor:
        if self._hard:
            return F.cross_entropy(logits, taught.argmax(dim=1))
        log_shares = [F.log_softmax(each.float() / self._temperature, dim=1) for each in (logits, taught)]
        return F.kl_div(*log_shares, reduction="batchmean", log_target=True) * self._temperature**2


class Teacher:
    """Puts a teacher's answers beside the labels of a batch, after mixup.

    Args:
        network: Gives logits [B, classes]; it is left as it is.
        mix: Mixes images and labels, if anything does.
        precision: How the teacher computes.
        scale: What the images, normalised for the network that learns, are multiplied by for the teacher, by channel.
        shift: What is added then.
    """

    def __init__(self, network: nn.Module, mix: Mix | None, precision: Precision, scale: Tensor, shift: Tensor) -> None:
        self._network, self._mix, self._precision = network.eval().requires_grad_(False), mix, precision
        self._scale, self._shift = scale.view(-1, 1, 1), shift.view(-1, 1, 1)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Any, Tensor]]:
        """Images [B, C, H, W] and labels [B] -> the mixed images, and the mixed labels with the teacher's logits."""
        if self._mix:
            images, labels = self._mix(images, labels)
        with torch.no_grad(), self._precision.autocast():
            taught = self._network(images * self._scale + self._shift)
        return images, (labels, taught.float())


def build_teacher(
    config: CfgNode, num_classes: int, mix: Mix | None, precision: Precision, device: torch.device
) -> Teacher:
    """The configured teacher.

    Args:
        config: The configuration, whose DISTILL.TEACHER is not empty.
        num_classes: Of the network that learns.
        mix: Mixes images and labels, if anything does.
        precision: How the teacher computes.
        device: Where.

    Raises:
        UserError: If there is no such teacher, or it answers for other classes or cannot take the images.
    """
    name, data = config.DISTILL.TEACHER, config.DATA
    if Path(name).is_file():
        if config.DISTILL.WEIGHTS:
            raise UserError(f"DISTILL.WEIGHTS is for networks of timm, and {name} is a checkpoint: leave it empty")
        trained = load_trained(Path(name))
        network, mean, std = trained.network, trained.config.DATA.MEAN, trained.config.DATA.STD
    else:
        network = _timm_teacher(name, config.DISTILL.WEIGHTS, num_classes)
        mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    _try_out(network, name, num_classes, data.IMG_SIZE, config.MODEL.GMA.IN_DIM)
    ours = [torch.tensor(list(values), dtype=torch.float64) for values in (data.MEAN, data.STD)]
    its = [torch.tensor(list(values), dtype=torch.float64) for values in (mean, std)]
    scale, shift = ours[1] / its[1], (ours[0] - its[0]) / its[1]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    mixing = f", after {type(mix).__name__}" if mix else ""
    _log.info(f"teacher {name}: {parameters:,} parameters{mixing}")
    network.to(device, memory_format=memory_format(config))
    return Teacher(network, mix, precision, scale.float().to(device), shift.float().to(device))


def check_teacher(config: CfgNode, classes: list[str] | None) -> None:
    """Refuses a teacher whose checkpoint is of another task, or tells other classes than the data's.

    Raises:
        UserError: If it does.
    """
    path = Path(config.DISTILL.TEACHER)
    known = checkpoint.load_for_task(path, "classification").get("classes") if path.is_file() else None
    if known and classes and known != classes:
        raise UserError(f"DISTILL.TEACHER {path} knows other classes than the data has: choose one trained on these")


def _timm_teacher(name: str, weights: str, num_classes: int) -> nn.Module:
    if not timm.is_model(name):
        raise UserError(
            f"DISTILL.TEACHER {name} is neither a checkpoint of this code nor a network of timm: mend the path or name"
        )
    if not weights:
        try:
            return timm.create_model(name, pretrained=True)
        except Exception as error:  # of any kind: the hub may be out of reach
            raise UserError(
                f"DISTILL.TEACHER {name} has no weights ({reason(error)}): name a file that has some in DISTILL.WEIGHTS"
            ) from None
    if not Path(weights).is_file():
        raise UserError(f"DISTILL.WEIGHTS {weights} is no file: name one that holds weights of {name}")
    network = timm.create_model(name, num_classes=num_classes)
    try:
        network.load_state_dict(load_state_dict(weights))
    except Exception as error:  # of any kind: the file may be anything
        why = shorten(f"{type(error).__name__}: {error}", _LONGEST, placeholder=" ...")
        raise UserError(
            f"DISTILL.WEIGHTS {weights} holds no weights of {name} for {num_classes} classes ({why}): name another file"
        ) from None
    return network


def _try_out(network: nn.Module, name: str, num_classes: int, size: int, channels: int) -> None:
    try:
        with torch.no_grad():
            answer = network.eval()(torch.zeros(1, channels, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"DISTILL.TEACHER {name} cannot take {channels} x {size} x {size} pixels ({reason(error)}): choose another"
        ) from None
    if answer.shape != (1, num_classes):
        raise UserError(
            f"DISTILL.TEACHER {name} answers for {answer.shape[-1]} classes and not {num_classes}: choose another"
        )
