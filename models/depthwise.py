"""Depthwise convolution, trained in bfloat16 on CPUs at the speed that its arithmetic allows.

oneDNN, which computes convolutions on CPUs, has a depthwise kernel for the gradient of weights of up to three columns.
Wider ones go through its general kernel, which fills every channel up to a group of sixteen. So their gradient is
computed three columns at a time: the same sums, several times as fast on x86 that multiplies in bfloat16. The way back
of strips knows no forward-mode derivatives.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

__all__ = ["DepthwiseConv2d", "depthwise_conv2d"]

STRIP = 3  # columns


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that keeps height and width.

    Args:
        channels: Its channels C.
        kernel_size: Odd size k of the kernels.
        dilation: Pixels from one of their weights to the next.
        **kwargs: Further settings of `nn.Conv2d`: bias, device, dtype.
    """

    def __init__(self, channels: int, kernel_size: int, dilation: int = 1, **kwargs: Any) -> None:
        geometry = {"padding": dilation * (kernel_size // 2), "dilation": dilation, "groups": channels}
        super().__init__(channels, channels, kernel_size, **geometry, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return depthwise_conv2d(x, self.weight, self.bias, self.dilation[0])


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Convolves each channel with a kernel of its own, and keeps height and width.

    Args:
        x: Images, [B, C, H, W].
        weight: Kernels of odd size, [C, 1, k, k].
        bias: [C], or None.
        dilation: Pixels from one weight of a kernel to the next.

    Returns:
        [B, C, H, W].
    """
    if not torch.jit.is_scripting() and _learns_in_strips(x, weight) and dilation == 1:
        return _LearnedInStrips.apply(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return _convolve(x, weight, bias, dilation)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])


@torch.jit.unused
def _learns_in_strips(x: Tensor, weight: Tensor) -> bool:
    if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing():
        return False  # whoever reads a trace, to count, to export, has to see a convolution
    # In float32 the general kernel loses less, and a whole step would gain too little.
    slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and weight.shape[-1] > STRIP
    fits = weight.dtype == x.dtype or torch.is_autocast_enabled("cpu")
    return slow and fits and weight.requires_grad and torch.is_grad_enabled()


class _LearnedInStrips(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolve(x, weight, bias, dilation=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad
        return (
            _input_gradient(grad, x, weight) if needs_x else None,
            _weight_gradient(grad, x, weight.shape[-1]),
            grad.sum((0, 2, 3)) if needs_bias else None,  # oneDNN gives it only together with the weight's
        )


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    # torch.nn.grad.conv2d_input does not know the layout of x, and copies where this need not.
    channels, padding = weight.shape[0], weight.shape[-1] // 2
    geometry = ([1, 1], [padding, padding], [1, 1], False, [0, 0], channels)
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, [True, False, False])[0]


def _weight_gradient(grad: Tensor, x: Tensor, size: int) -> Tensor:
    channels, padding, width = x.shape[1], size // 2, x.shape[-1]
    padded = F.pad(x, (padding, padding))
    strips = []
    for start in range(0, size, STRIP):
        columns = min(STRIP, size - start)
        seen = padded[..., start : start + width + columns - 1]
        shape = (channels, 1, size, columns)
        strips.append(conv2d_weight(seen, shape, grad, padding=(padding, 0), groups=channels))
    return torch.cat(strips, dim=-1)
