"""FLOPs, parameters and activations of a network, by fvcore."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fvcore's import meets a deprecation of torch's
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

# What fvcore leaves out, and published figures with it: operations of each, by element of its output (or input).
_SOFTMAX = 5  # maximum, difference, exponential, sum, quotient
_ELEMENTWISE = ("hardswish", "gelu", "add", "mul")
_FUSED = {"addcmul": 2}  # a sum and a product
_MOVED = ("cat", "unflatten")  # nothing is computed
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
    extras |= {name: _elements(operations) for name, operations in _FUSED.items()}
    flops.set_op_handle(**{f"aten::{name}": handle for name, handle in extras.items()})
    flops.set_op_handle(**dict.fromkeys((f"aten::{name}" for name in _MOVED), None))
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
