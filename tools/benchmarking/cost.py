"""What a step costs whoever computes it: operations, bytes to move, memory at the peak."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tools.benchmarking.ceiling import DTYPES
from utils.throughput import wait

_PASSES = {"infer": 1, "train": 3}


@dataclass(frozen=True)
class Work:
    """The contractions of one image's forward pass: its convolutions and matrix products.

    Attributes:
        flops: Their operations, two for a multiply-add.
        elements: Numbers that they read and write for each image, each input and each output once.
        weights: Numbers that they read once a batch.
    """

    flops: float
    elements: float
    weights: float

    def of_step(self, mode: str, precision: str, batch_size: int) -> tuple[float, float]:
        """FLOPs and bytes of a step.

        The backward pass has two contractions for each of the forward pass, with its operations and operands. Bytes
        are the least that an implementation moves which computes one contraction after the other, in the given
        precision and all else fused into them; the optimizer's are left out.
        """
        passes = _PASSES[mode]
        numbers = batch_size * self.elements + self.weights
        return passes * batch_size * self.flops, passes * numbers * DTYPES[precision].itemsize


def count_work(network: nn.Module, size: int) -> Work:
    """Counts a network's contractions on images of a size, without computing anything."""
    network = copy.deepcopy(network).eval().to("meta")
    one, two = _Counter(), _Counter()
    for batch_size, counter in ((1, one), (2, two)):
        with counter:
            network(torch.empty(batch_size, 3, size, size, device="meta"))
    of_image = two.elements - one.elements
    return Work(float(two.flops - one.flops), float(of_image), float(one.elements - of_image))


class _Counter(TorchDispatchMode):
    """Adds up operations and operands of what torch has a FLOP formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self.flops += formula(*args, **kwargs, out_val=out)
            self.elements += sum(leaf.numel() for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        return out


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors at the peak of a step, above those held before it (weights, optimizer state, images).

    Gradients and activations count, as does a library's scratch space that comes from torch's allocator. On a CPU the
    allocations are those that torch's profiler sees, in their order.
    """
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(changes), default=0)
