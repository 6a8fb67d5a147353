"""How a network computes on a device: its precision, its kernels and the layout of its tensors."""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from yacs.config import CfgNode

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """How the network computes on a device.

    Attributes:
        name: 'fp32', 'bf16' or 'fp16'.
        device_type: 'cpu' or 'cuda'.
    """

    name: str
    device_type: str

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which the forward pass runs."""
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if self.name not in dtypes:
            return nullcontext()
        return torch.autocast(self.device_type, dtypes[self.name])

    def grad_scaler(self) -> torch.amp.GradScaler:
        """torch's loss scaler, which passes everything through unless gradients are fp16."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def choose_precision(config: CfgNode, device: torch.device) -> Precision:
    """The precision that PRECISION or AMP_OPT_LEVEL asks for on a device.

    Args:
        config: The configuration.
        device: Where the network computes.
    """
    make = partial(Precision, device_type=device.type)
    if config.AMP_OPT_LEVEL:
        chosen = make("fp32" if config.AMP_OPT_LEVEL == "O0" or device.type == "cpu" else "fp16")
        _log.info(f"AMP_OPT_LEVEL {config.AMP_OPT_LEVEL} is apex's name: computing in {chosen.name} on {device.type}")
        return chosen
    if config.PRECISION != "auto":
        return make(config.PRECISION)
    if device.type == "cpu":
        return make("fp32")
    return make("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")


def choose_scoring_precision(config: CfgNode, device: torch.device) -> Precision:
    """As `choose_precision`, but left to itself it is fp32 on every device, so that the digits do not depend on it."""
    if config.PRECISION == "auto" and not config.AMP_OPT_LEVEL:
        return Precision("fp32", device.type)
    return choose_precision(config, device)


def memory_format(config: CfgNode) -> torch.memory_format:
    """The layout of network and images."""
    return torch.channels_last if config.CHANNELS_LAST else torch.contiguous_format


def choose_kernels(deterministic: bool, one_size: bool = True) -> None:
    """Says how a GPU's libraries choose their kernels.

    Args:
        deterministic: Only among such as give the same bits on every run.
        one_size: By measuring them, where images of one size make that pay.
    """
    torch.backends.cudnn.benchmark = one_size and not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first call
        torch.use_deterministic_algorithms(True)


@contextmanager
def unmeasured_kernels() -> Iterator[None]:
    """Turns cudnn.benchmark off for a while: images to score differ in size, and each new size would be measured."""
    measures = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = measures
