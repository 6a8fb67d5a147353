"""FLOPs, parameters, activations and images/s of a network."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from torch import nn
from yacs.config import CfgNode

from utils.optim import Precision

# What fvcore leaves out, and published figures with it: operations of each, by element of its output (or input).
_SOFTMAX = 5  # maximum, difference, exponential, sum, quotient
_ELEMENTWISE = ("hardswish", "gelu", "add", "mul")
_POOLING = ("mean", "adaptive_avg_pool2d")


@dataclass(frozen=True)
class Counts:
    """What a network costs for one image. fvcore counts one multiply-add as one FLOP.

    Attributes:
        parameters: Number of parameters.
        flops: What fvcore counts by itself: the figure that papers print.
        all_flops: The same with softmax, pooling, activations, sums and products counted too.
        activations: Elements of the outputs of convolutions, linear layers and matrix products.
        by_operator: All FLOPs by operator.
        modules: For each module by its dotted name, '' for the network: parameters, FLOPs, all FLOPs, activations.
        uncounted: Operators without a rule, and how often each occurs.
    """

    parameters: int
    flops: int
    all_flops: int
    activations: int
    by_operator: dict[str, int]
    modules: dict[str, tuple[int, int, int, int]]
    uncounted: dict[str, int]


def count(model: nn.Module, in_chans: int, height: int, width: int) -> Counts:
    """Counts one image's forward pass in evaluation mode.

    Args:
        model: The network, left in evaluation mode.
        in_chans: Channels of the image.
        height: Its height in pixels.
        width: Its width in pixels.
    """
    model.eval()
    image = torch.zeros(1, in_chans, height, width, device=next(model.parameters()).device)
    flops = FlopCountAnalysis(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    extras = {"softmax": _elements(_SOFTMAX)}
    extras |= {name: _elements(1) for name in _ELEMENTWISE} | {name: _elements(1, of="inputs") for name in _POOLING}
    flops.set_op_handle(**{f"aten::{name}": handle for name, handle in extras.items()})
    activations = ActivationCountAnalysis(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    activations_of = activations.by_module()
    modules = {}
    for name, counts in flops.by_module_and_operator().items():
        parameters = sum(parameter.numel() for parameter in model.get_submodule(name).parameters())
        by_fvcore = sum(number for operator, number in counts.items() if operator not in extras)
        modules[name] = (parameters, int(by_fvcore), int(sum(counts.values())), int(activations_of[name]))
    parameters, by_fvcore, everything, outputs = modules[""]
    by_operator = {name: int(number) for name, number in sorted(flops.by_operator().items())}
    return Counts(parameters, by_fvcore, everything, outputs, by_operator, modules, dict(flops.unsupported_ops()))


def _elements(operations: int, of: str = "outputs") -> Callable[[list[Any], list[Any]], int]:
    """A rule for fvcore: so many operations for each element; the sizes that a trace computes with count nothing."""

    def rule(inputs: list[Any], outputs: list[Any]) -> int:
        sizes = (outputs if of == "outputs" else inputs)[0].type().sizes()
        return operations * math.prod(sizes) if sizes else 0

    return rule


@torch.inference_mode()
def throughput(
    model: nn.Module, images: torch.Tensor, precision: Precision, warmup: int = 3, seconds: float = 10.0
) -> float:
    """Images per second of a network's forward pass in evaluation mode.

    Args:
        model: The network, on the images' device.
        images: One batch, [B, C, H, W].
        precision: How to compute.
        warmup: Batches before the clock starts.
        seconds: How long to measure at least.
    """
    model.eval()
    with precision.autocast():
        for _ in range(warmup):
            model(images)
        _wait(images.device)
        batches, start, elapsed = 0, time.perf_counter(), 0.0
        while elapsed < seconds:
            model(images)
            _wait(images.device)
            batches += 1
            elapsed = time.perf_counter() - start
    return batches * len(images) / elapsed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def throughput_line(model: nn.Module, config: CfgNode, device: torch.device, precision: Precision) -> str:
    """Measures a network at the configured batch and image size, and says under which conditions."""
    memory_format = torch.channels_last if config.CHANNELS_LAST else torch.contiguous_format
    size, batch = config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE
    images = torch.randn(batch, config.MODEL.GMA.IN_DIM, size, size, device=device).to(memory_format=memory_format)
    speed = throughput(model.to(device, memory_format=memory_format), images, precision)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return (
        f"throughput {speed:.1f} images/s (batch {batch}, {size} x {size}, {precision.name}, {name}, "
        f"{torch.get_num_threads()} CPU threads)"
    )
