"""FLOPs, parameters, activations and images/s of a network."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from torch import nn
from yacs.config import CfgNode

from utils.optim import Precision

# Elementwise operators count one operation an output element; fvcore alone leaves them out, as published figures do.
_ELEMENTWISE = ("hardswish", "gelu", "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "rsub")


@dataclass(frozen=True)
class Counts:
    """What a network of a certain input costs.

    Attributes:
        parameters: Number of parameters.
        flops: fvcore's FLOPs with its own operators, one multiply-add counted as one: the figure that papers print.
        all_flops: The same with softmax, pooling and elementwise operators counted too.
        activations: Elements of the outputs of convolutions, linear layers and matrix products.
        by_operator: All FLOPs, by operator.
        by_module: fvcore's FLOPs, by dotted module name; '' is the network.
        activations_by_module: Activations, by dotted module name.
        uncounted: Operators without a rule, and how often each occurs.
    """

    parameters: int
    flops: int
    all_flops: int
    activations: int
    by_operator: dict[str, int]
    by_module: dict[str, int]
    activations_by_module: dict[str, int]
    uncounted: dict[str, int]


def count(model: nn.Module, in_chans: int, height: int, width: int) -> Counts:
    """Counts one image's forward pass in evaluation mode.

    Args:
        model: The network.
        in_chans: Channels of the image.
        height: Its height in pixels.
        width: Its width in pixels.
    """
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    image = torch.zeros(1, in_chans, height, width)
    training = model.training
    model.eval()
    published = _analysis(model, image)
    everything = _analysis(model, image)
    everything.set_op_handle("aten::softmax", _elements(5))  # maximum, difference, exponential, sum, quotient
    everything.set_op_handle("aten::mean", _elements(1, of_input=True))
    for name in _ELEMENTWISE:
        everything.set_op_handle(f"aten::{name}", _elements(1))
    activations = ActivationCountAnalysis(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counts = Counts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=int(published.total()),
        all_flops=int(everything.total()),
        activations=int(activations.total()),
        by_operator={name: int(number) for name, number in everything.by_operator().items()},
        by_module={name: int(number) for name, number in published.by_module().items()},
        activations_by_module={name: int(number) for name, number in activations.by_module().items()},
        uncounted=dict(everything.unsupported_ops()),
    )
    model.train(training)
    return counts


def _analysis(model: nn.Module, image: torch.Tensor) -> FlopCountAnalysis:
    return FlopCountAnalysis(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)


def _elements(operations: int, of_input: bool = False) -> Any:
    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        sizes = (inputs if of_input else outputs)[0].type().sizes()
        return operations * int(torch.Size(sizes).numel())

    return handle


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
