"""The network rewritten for inference: the same answers from fewer operations.

Every batch norm that follows a convolution or a projection is folded into it, the residual of the position encoding
into its kernel, the windows of the relative position encoding into one, and the projection to queries, keys and values
is stored segment by segment. One norm is left, the last: it follows a residual, and `forward_features` gives it out.
"""

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_weights
from torchvision.ops.misc import FrozenBatchNorm2d

from models.groupmixformer import (
    GroupMixAttention,
    GroupMixBlock,
    GroupProxy,
    PositionalConv,
    RelativePosition,
    SegmentProjection,
    SeparableConv,
    Stem,
    to_image,
    to_tokens,
)

__all__ = ["fuse"]

Module = TypeVar("Module", bound=nn.Module)
_BATCH_NORMS = (_BatchNorm, FrozenBatchNorm2d)  # others depend on the image, and stay as they are


def fuse(model: Module) -> Module:
    """A copy of a network for inference, with the network's answers in evaluation mode.

    The copy has the network's methods, `forward_features`, `forward_intermediates` and the rest, but parameters under
    names of its own, and it is not for training.

    Args:
        model: A GroupMixFormer, or any network that holds one or parts of one; it is left as it is.

    Returns:
        The copy, in evaluation mode, on the same device and of the same type.
    """
    holder = nn.Sequential(copy.deepcopy(model).eval())
    with torch.no_grad():
        _fuse_children(holder)
    return holder.requires_grad_(False)[0]


class TokenConv(nn.Module):
    """A convolution of tokens, [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(self.conv(to_image(x)))


class FusedProjection(nn.ModuleList):
    """A projection for each segment: [B, H, W, C] -> five of [B, H, W, 3C/5]."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [projection(x) for projection in self]


class FusedProxy(nn.Module):
    """Group proxies of queries, keys and values, each with a copy of the depthwise kernels: as `GroupProxy`."""

    def __init__(self, depthwise: nn.Conv2d, pointwise: nn.Linear) -> None:
        super().__init__()
        self.depthwise, self.pointwise, self.act = depthwise, pointwise, nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        x = to_tokens(self.depthwise(to_image(x)))
        return self.act(self.pointwise(x.unflatten(-1, (3, -1)))).flatten(-2)


def _fuse_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        _fuse_children(child)
        if isinstance(child, Stem) and isinstance(child.norm1, _BATCH_NORMS):
            _fold_norm(child, "conv1", "norm1")
            _fold_norm(child, "conv2", "norm2")
        elif isinstance(child, SeparableConv) and isinstance(child.norm, _BATCH_NORMS):
            _fold_norm(child, "conv_pw", "norm")
        elif isinstance(child, DropPath):
            setattr(module, name, nn.Identity())
        elif isinstance(child, PositionalConv):
            setattr(module, name, TokenConv(_with_residual(child.conv)))
        elif isinstance(child, RelativePosition) and all(conv.dilation == (1, 1) for conv in child.convs):
            setattr(module, name, TokenConv(_one_window(child.convs)))
        elif isinstance(child, GroupMixBlock):
            child.recompute = ""
        elif isinstance(child, GroupMixAttention) and isinstance(child.aggregator.norm, _BATCH_NORMS):
            child.qkv = _fused_projection(child.qkv, child.aggregator.norm)
            child.aggregator.norm = nn.Identity()
        if isinstance(child, GroupProxy) and isinstance(child.norm, nn.Identity):
            pointwise = _linear(child.conv_pw.weight.flatten(1), child.conv_pw.bias)
            setattr(module, name, FusedProxy(_three_times(child.conv_dw), pointwise))


def _fold_norm(module: nn.Module, conv: str, norm: str) -> None:
    setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
    setattr(module, norm, nn.Identity())


def _fused_projection(projection: SegmentProjection, norm: _BatchNorm) -> FusedProjection:
    """One projection for each segment, the first with the norm of segment 0, which is one for all three."""
    weights, biases = projection.by_segment()
    biases = torch.zeros_like(weights[..., 0]) if biases is None else biases
    statistics = [norm.running_mean.repeat(3), norm.running_var.repeat(3), norm.eps]
    first = fuse_linear_bn_weights(weights[0], biases[0], *statistics, norm.weight.repeat(3), norm.bias.repeat(3))
    return FusedProjection(_linear(*pair) for pair in [first, *zip(weights[1:], biases[1:], strict=True)])


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return linear


def _three_times(conv: nn.Conv2d) -> nn.Conv2d:
    return _depthwise(conv.weight.repeat(3, 1, 1, 1), None, conv.dilation[0])


def _with_residual(conv: nn.Conv2d) -> nn.Conv2d:
    weight = conv.weight.clone()
    weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2] += 1
    return _depthwise(weight, conv.bias, conv.dilation[0])


def _one_window(convs: nn.ModuleList) -> nn.Conv2d:
    """All windows as the largest of them: its zeros cost less than passing over the tokens once for each window."""
    largest = max(conv.kernel_size[0] for conv in convs)
    weights = [F.pad(conv.weight, [(largest - conv.kernel_size[0]) // 2] * 4) for conv in convs]
    return _depthwise(torch.cat(weights), torch.cat([conv.bias for conv in convs]))


def _depthwise(weight: Tensor, bias: Tensor | None, dilation: int = 1) -> nn.Conv2d:
    channels, _, size, _ = weight.shape
    geometry = {"padding": dilation * (size // 2), "dilation": dilation, "groups": channels}
    conv = nn.Conv2d(channels, channels, size, bias=bias is not None, device="meta", **geometry)
    conv.weight = nn.Parameter(weight)
    if bias is not None:
        conv.bias = nn.Parameter(bias.clone())
    return conv
