"""GroupMixFormer, in the form of a timm model file.

Paper: "Advancing Vision Transformers with Group-Mix Attention", Ge et al., 2023, https://arxiv.org/abs/2311.15157

A four-stage pyramid. Each block mixes tokens with Group-Mix Attention: queries, keys and values are cut into five
segments along the channels; three of them are aggregated over 3x3, 5x5 and 7x7 neighbourhoods into *group proxies*,
one stays as it is, and these four attend to each other in linear time, while the fifth is a purely local branch.

Images and stage outputs are [B, C, H, W]; inside the blocks tokens are [B, H, W, C], which a convolution sees as a
channels_last image without a copy. `dd` is the device and the dtype that parameters are made with, as in timm's models.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from models.depthwise import DepthwiseConv2d, depthwise_conv2d
from models.published import from_published, is_published

__all__ = ["GroupMixAttention", "GroupMixFormer"]

NUM_SEGMENTS = 5  # one of tokens, three of group proxies, one local
PROXY_KERNEL_SIZES = (3, 5, 7)
POSITION_WINDOWS = ((3, 2), (5, 3), (7, 3))  # (window, number of heads that use it)
# What activation checkpointing keeps of a block, by what it recomputes.
RECOMPUTE = {
    "all": [],
    "cheap": [getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "convolution")],
}


def to_image(tokens: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W], a channels_last view."""
    return tokens.permute(0, 3, 1, 2)


def to_tokens(image: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C], a view where the image is channels_last."""
    return image.permute(0, 2, 3, 1)


def to_row(tokens: Tensor) -> Tensor:
    """Queries, keys and values of each token, side by side, become three pixels: [B, H, W, 3C] -> [B, C, H, 3W]."""
    B, H, W, C = tokens.shape
    return to_image(tokens.reshape(B, H, 3 * W, C // 3))


def from_row(image: Tensor) -> Tensor:
    """The way back: [B, C, H, 3W] -> [B, H, W, 3C]."""
    B, C, H, W = image.shape
    return to_tokens(image).reshape(B, H, W // 3, 3 * C)


@torch.fx.wrap
def as_products_take(x: Tensor) -> Tensor:
    """Under autocast `x` in its type: cast once, where each of several products would cast, and keep, a copy."""
    if torch.jit.is_scripting():
        return x
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if casts else x


class SeparableConv(nn.Module):
    """Depthwise k x k convolution, pointwise convolution, norm, Hardswish: [B, C_in, H, W] -> [B, C_out, H', W']."""

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int = 3,
        stride: int = 1,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(
            in_chans, in_chans, kernel_size, stride, kernel_size // 2, groups=in_chans, bias=False, **dd
        )
        self.conv_pw = nn.Conv2d(in_chans, out_chans, 1, bias=False, **dd)
        self.norm = norm_layer(out_chans, **dd)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv_pw(self.conv_dw(x))))


class SegmentProjection(nn.Linear):
    """Queries, keys and values of each segment side by side: [B, H, W, C] -> five of [B, H, W, 3C/5].

    The rows of the weight are ordered by queries, keys and values and then by segment, as in published weights. Rows
    are few where tokens are many: taking the rows apart leaves every tensor of tokens in one piece.
    """

    def __init__(self, dim: int, bias: bool = True, **dd: Any) -> None:
        super().__init__(dim, 3 * dim, bias, **dd)
        self.rows = (3, NUM_SEGMENTS, dim // NUM_SEGMENTS)

    def forward(self, x: Tensor) -> list[Tensor]:
        weight, bias = self.by_segment()
        weights = weight.unbind()  # of which gradients are stacked; those of weight[i] would be added to zeros
        if bias is None:
            return [F.linear(x, weights[i]) for i in range(self.rows[1])]
        biases = bias.unbind()
        return [F.linear(x, weights[i], biases[i]) for i in range(self.rows[1])]

    def by_segment(self) -> tuple[Tensor, Tensor | None]:
        """The weight as [5, 3C/5, C] and the bias as [5, 3C/5], a segment's queries, keys and values side by side."""
        weight = self.weight.unflatten(0, self.rows).transpose(0, 1).flatten(1, 2)
        return weight, None if self.bias is None else self.bias.unflatten(0, self.rows).transpose(0, 1).flatten(1)


class GroupProxy(SeparableConv):
    """A separable convolution whose weights serve queries, keys and values, which lie side by side.

    The batch norm sees all three, as if they stood in a row: [B, H, W, 3C] -> [B, H, W, 3C]. Of `conv_dw`, which is
    not called, the weight and the dilation are used.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = to_image(torch.cat([to_tokens(self.conv_dw.weight)] * 3))  # so that its gradient keeps its layout
        x = depthwise_conv2d(to_image(x), weight, None, self.conv_dw.dilation[0])
        return from_row(self.act(self.norm(self.conv_pw(to_row(to_tokens(x))))))


class GroupAggregator(nn.Module):
    """Turns queries, keys and values into attended tokens and group proxies, and a local branch (section 3.2)."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        segment = dim // NUM_SEGMENTS
        self.norm = nn.BatchNorm2d(segment, **dd)
        self.act = nn.Hardswish()
        self.proxies = nn.ModuleList(GroupProxy(segment, segment, size, **dd) for size in PROXY_KERNEL_SIZES)
        self.local = SeparableConv(3 * segment, segment, norm_layer=partial(LayerNorm2d, eps=1e-5), **dd)

    def forward(self, segments: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Aggregates.

        Args:
            segments: Five of [B, H, W, 3C/5], each with its queries, keys and values side by side.

        Returns:
            The attended queries, keys and values, [B, H, W, 3, 4C/5], and the local branch, [B, H, W, C/5].
        """
        attended = [from_row(self.act(self.norm(to_row(segments[0]))))]
        for i, proxy in enumerate(self.proxies):
            attended.append(proxy(segments[i + 1]))
        local = to_tokens(self.local(to_image(segments[-1])))
        tokens = torch.cat([segment.unflatten(-1, (3, -1)) for segment in attended], dim=-1)
        return tokens, local.to(tokens.dtype)  # of a layer norm, whose answer is float32 under autocast on GPUs


class RelativePosition(nn.Module):
    """Convolutional relative position encoding: heads see the values around a token through windows of 3, 5 and 7."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        windows: Sequence[tuple[int, int]] = POSITION_WINDOWS,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.widths = [heads * dim // num_heads for _, heads in windows]
        self.convs = nn.ModuleList(
            DepthwiseConv2d(width, window, **dd) for width, (window, _) in zip(self.widths, windows, strict=True)
        )

    def forward(self, v: Tensor) -> Tensor:
        """[B, H, W, C'] -> [B, H, W, C'], for values whose channels are ordered by head."""
        groups = to_image(v).split(self.widths, dim=1)
        windows = []
        for i, conv in enumerate(self.convs):
            windows.append(conv(groups[i]))
        return to_tokens(torch.cat(windows, dim=1))


@torch.fx.wrap
def attention_context(k: Tensor, v: Tensor) -> Tensor:
    """softmax(K over the tokens)^T V of each head: two of [B, N, heads, head_dim] -> [B, heads, head_dim, head_dim].

    In fp16 it is computed in float32: of many tokens the weights, about 1/N, fall below fp16's normal numbers.
    """
    k = k.transpose(1, 2)  # the product takes the softmax of [B, heads, N, head_dim] without another copy
    if not torch.jit.is_scripting() and v.dtype == torch.float16 and v.device.type != "meta":
        with torch.autocast(v.device.type, enabled=False):
            return torch.einsum("bhnk,bnhv->bhkv", k.float().softmax(dim=2), v.float()).to(v.dtype)
    return torch.einsum("bhnk,bnhv->bhkv", k.softmax(dim=2), v)


class GroupMixAttention(nn.Module):
    """Group-Mix Attention (section 3.2), usable by itself in any network that keeps tokens as [B, H, W, C].

    Args:
        dim: Width C of the tokens, a multiple of 5 times the number of heads.
        num_heads: Heads of the attended 4C/5 channels; they must be shared out among `windows` exactly.
        windows: (window size, number of heads) of the relative position encoding.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        qk_scale: Scale of the attention; (C / num_heads) ** -0.5 if None.
        proj_drop: Dropout rate after the output projection.
        device: Where the parameters are made.
        dtype: Type of the parameters.

    Raises:
        ValueError: If the heads fit neither the width nor the windows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        windows: Sequence[tuple[int, int]] = POSITION_WINDOWS,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_attention(dim, num_heads, windows)
        attended = dim - dim // NUM_SEGMENTS
        self.num_heads = num_heads
        # The full width sets the scale although attention runs on 4/5 of it: the published weights expect it.
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.qkv = SegmentProjection(dim, bias=qkv_bias, **dd)
        self.aggregator = GroupAggregator(dim, **dd)
        self.position = RelativePosition(attended, num_heads, windows, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes tokens: [B, H, W, C] -> [B, H, W, C]."""
        B, H, W, _ = x.shape
        tokens, local = self.aggregator(self.qkv(as_products_take(x)))
        q, k, v = tokens.unbind(3)
        heads = (B, H * W, self.num_heads, -1)
        context = self.scale * attention_context(k.reshape(heads), v.reshape(heads))
        attended = torch.einsum("bnhk,bhkv->bnhv", q.reshape(heads), context).reshape(B, H, W, -1)
        attended = torch.addcmul(attended, q, self.position(v))
        return self.proj_drop(self.proj(torch.cat((attended, local), dim=-1)))


class PositionalConv(nn.Module):
    """Convolutional position encoding: x plus a depthwise 3x3 convolution of x, [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x + to_tokens(self.conv(to_image(x)))


class GroupMixBlock(nn.Module):
    """Position encoding, Group-Mix Attention and MLP, each with a residual: [B, H, W, C] -> [B, H, W, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cpe = PositionalConv(dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = GroupMixAttention(dim, num_heads, qkv_bias=qkv_bias, qk_scale=qk_scale, proj_drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.recompute = ""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.recompute:
            return checkpoint_block(self, x)
        return self.mix(x)

    def mix(self, x: Tensor) -> Tensor:
        """The block itself, with nothing recomputed."""
        x = self.cpe(x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class GroupMixStage(nn.Module):
    """Patch embedding and blocks: [B, C_in, H, W] -> [B, C_out, ceil(H / stride), ceil(W / stride)]."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        stride: int,
        drop_path: Sequence[float],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block_kwargs: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_embed = SeparableConv(in_chans, dim, stride=stride, **dd)
        self.blocks = nn.Sequential(*(GroupMixBlock(dim, drop_path=rate, **block_kwargs, **dd) for rate in drop_path))

    def forward(self, x: Tensor) -> Tensor:
        x = to_tokens(self.patch_embed(x)).contiguous()  # a copy in the first stage only, if at all
        return to_image(self.blocks(x))


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: [B, in_chans, H, W] -> [B, dim, ceil(H / 4), ceil(W / 4)]."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        return self.act(self.norm2(self.conv2(x)))


class GroupMixFormer(nn.Module):
    """GroupMixFormer: an image classifier and, through timm's interfaces, a backbone of strides 4, 8, 16 and 32.

    Args:
        in_chans: Channels of the images.
        num_classes: Width of the classifier, 0 for none.
        global_pool: timm's pooling before the classifier, '' for none.
        embed_dims: Width of each stage, multiples of 40 (five segments of eight heads).
        depths: Blocks of each stage.
        mlp_ratios: Hidden width of each stage's MLPs over its width.
        num_heads: Attention heads of every block.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_scale: Scale of the attention, (width / heads) ** -0.5 if None.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after the projections of attention and MLP.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0 at the first.
        device: Where the parameters are made.
        dtype: Type of the parameters.

    Raises:
        ValueError: If the lists differ in length, or a width and the heads do not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "fastavg",
        embed_dims: Sequence[int] = (80, 160, 320, 320),
        depths: Sequence[int] = (2, 4, 12, 4),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_stages(embed_dims, depths, mlp_ratios, num_heads)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = embed_dims[-1]

        self.stem = Stem(in_chans, embed_dims[0], **dd)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        self.feature_info = []
        for i, dim in enumerate(embed_dims):
            stages.append(
                GroupMixStage(
                    embed_dims[max(i - 1, 0)],
                    dim,
                    stride=1 if i == 0 else 2,
                    drop_path=drop_paths[i],
                    num_heads=num_heads,
                    mlp_ratio=mlp_ratios[i],
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    proj_drop=proj_drop_rate,
                    **dd,
                )
            )
            self.feature_info.append({"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(self.num_features, **dd)
        self.head = self._make_head(num_classes, global_pool, **dd)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self.apply(init_weights)

    def _make_head(self, num_classes: int, global_pool: str, **dd: Any) -> ClassifierHead:
        return ClassifierHead(self.num_features, num_classes, global_pool, drop_rate=self.drop_rate, **dd)

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`, and takes published checkpoints as they are."""
        ours = OrderedDict(checkpoint_filter_fn(state_dict))
        ours._metadata = self.state_dict()._metadata  # without it torch makes up a missing num_batches_tracked
        return super().load_state_dict(ours, strict=strict, assign=assign)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names that weight decay must spare: none but the biases and 1-D tensors that timm spares already."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers of parameters, from the image to the head, for timm's layer-wise learning rate decay."""
        blocks = [
            (r"^stages\.(\d+)\.patch_embed", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, recompute: str = "all") -> None:
        """Recomputes activations in the backward pass instead of keeping them.

        Args:
            enable: Whether to.
            recompute: 'all' for whole blocks, 'cheap' for all but matrix products and convolutions, which are kept
                for one backward pass of each forward pass: torch lets there be no second.

        Raises:
            ValueError: If `recompute` is another.
        """
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute is {recompute!r}: choose one of {', '.join(RECOMPUTE)}")
        for stage in self.stages:
            for block in stage.blocks:
                block.recompute = recompute if enable else ""

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new classifier (none for 0 classes), and optionally another pooling, in place of the old."""
        weight = self.stem.conv1.weight
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.head = self._make_head(num_classes, pool, device=weight.device, dtype=weight.dtype)
        self.head.apply(init_weights).train(self.training)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Runs the network and returns the outputs of chosen stages.

        Args:
            x: Images, [B, in_chans, H, W].
            indices: The last n stages if an int, all if None, else the stages of these numbers.
            norm: Whether the last stage's output passes the final norm.
            stop_early: Whether to stop after the last chosen stage.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: Whether to return the list alone.

        Returns:
            The chosen stages' outputs, and before them what `forward_features` returns unless `intermediates_only`.

        Raises:
            ValueError: If `output_fmt` is another.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}: choose 'NCHW' or 'NHWC'")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last_index = len(self.stages) - 1
        intermediates = []
        x = self.stem(x)
        stages = self.stages[: max_index + 1] if stop_early and not torch.jit.is_scripting() else self.stages
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                feature = self.norm(x) if norm and i == last_index else x
                intermediates.append(feature.permute(0, 2, 3, 1) if output_fmt == "NHWC" else feature)
        if intermediates_only:
            return intermediates
        if len(stages) == len(self.stages):
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last chosen one, and the norm and head where they no longer fit or are not wanted.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Whether to drop the final norm.
            prune_head: Whether to drop the classifier and its pooling.

        Returns:
            The numbers of the chosen stages.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if shortened:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised output of the last stage: [B, in_chans, H, W] -> [B, num_features, ceil(H/32), ceil(W/32)]."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies features, or only pools them: [B, num_features, H, W] -> [B, num_classes]."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images: [B, in_chans, H, W] -> [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def check_attention(dim: int, num_heads: int, windows: Sequence[tuple[int, int]]) -> None:
    """Raises a ValueError that says what to change where width, heads and windows do not fit each other."""
    window_heads = sum(heads for _, heads in windows)
    if window_heads != num_heads:
        shares = ", ".join(f"{heads} of {window}x{window}" for window, heads in windows)
        raise ValueError(
            f"{num_heads} heads do not fit the position windows, which are for {window_heads} ({shares}): "
            f"use num_heads={window_heads} or other windows"
        )
    even = [window for window, _ in windows if window % 2 == 0]
    if even:
        raise ValueError(f"position windows {even} have no centre: use odd ones")
    if dim <= 0 or dim % (NUM_SEGMENTS * num_heads):
        raise ValueError(
            f"width {dim} is not a positive multiple of {NUM_SEGMENTS * num_heads} "
            f"({NUM_SEGMENTS} segments x {num_heads} heads): choose one that is"
        )


def check_stages(embed_dims: Sequence[int], depths: Sequence[int], mlp_ratios: Sequence[float], num_heads: int) -> None:
    """Raises a ValueError that says what to change where the stages' settings cannot make a network."""
    if not len(embed_dims) == len(depths) == len(mlp_ratios) > 0:
        raise ValueError(
            f"embed_dims {list(embed_dims)}, depths {list(depths)} and mlp_ratios {list(mlp_ratios)} "
            "must have one number for each stage: make the lists equally long"
        )
    if min(depths) < 1:
        raise ValueError(f"depths {list(depths)}: every stage needs at least one block")
    if min(mlp_ratios) <= 0:
        raise ValueError(f"mlp_ratios {list(mlp_ratios)}: every ratio must be above 0")
    for dim in embed_dims:
        check_attention(dim, num_heads, POSITION_WINDOWS)


def init_weights(module: nn.Module) -> None:
    """Truncated normal of standard deviation 0.02 for linear layers; convolutions and norms keep PyTorch's own."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, batch norms in training mode normalise as always but leave their running statistics alone."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


@torch.jit.ignore
def checkpoint_block(block: GroupMixBlock, x: Tensor) -> Tensor:
    """Runs a block with activation checkpointing.

    The recomputation in the backward pass is a second forward pass, which must not count twice in the running
    statistics of the batch norms. A compiled graph keeps such side effects out of the recomputation by itself.
    """
    kept = RECOMPUTE[block.recompute]
    if torch.compiler.is_compiling():
        contexts = {"context_fn": partial(create_selective_checkpoint_contexts, kept)} if kept else {}
    else:
        contexts = {"context_fn": partial(_checkpoint_contexts, block, kept)}
    return checkpoint(block.mix, x, use_reentrant=False, **contexts)


def _checkpoint_contexts(block: GroupMixBlock, kept: list[Any]) -> tuple[Any, Any]:
    forward, again = create_selective_checkpoint_contexts(kept) if kept else (contextlib.nullcontext(),) * 2
    return forward, _Recomputation(block, again)


class _Recomputation:
    """The context of a recomputation, entered once more for each backward pass."""

    def __init__(self, block: GroupMixBlock, selection: Any) -> None:
        self._block, self._selection = block, selection

    def __enter__(self) -> None:
        self._entered = contextlib.ExitStack()
        self._entered.enter_context(frozen_statistics(self._block))
        self._entered.enter_context(self._selection)

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], _model: nn.Module | None = None) -> Mapping[str, Any]:
    """Our names for a state dict in either form, unwrapped from a checkpoint where it lies in one.

    Args:
        state_dict: Of either naming.
        _model: Not needed; timm gives it to all such functions.
    """
    if isinstance(state_dict.get("model"), Mapping):
        state_dict = state_dict["model"]
    return from_published(state_dict) if is_published(state_dict) else state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2311.15157",
        "paper_name": "Advancing Vision Transformers with Group-Mix Attention",
        "origin_url": "https://github.com/AILab-CVC/GroupMixFormer",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "groupmixformer_miny": _cfg(),
        "groupmixformer_tiny": _cfg(),
        "groupmixformer_small": _cfg(),
        "groupmixformer_base": _cfg(),
        "groupmixformer_large": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> GroupMixFormer:
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["depths"]))))
    return build_model_with_cfg(
        GroupMixFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "flatten_sequential": True},
        **kwargs,
    )


@register_model
def groupmixformer_miny(pretrained: bool = False, **kwargs: Any) -> GroupMixFormer:
    """GroupMixFormer-M: 5.7M parameters."""
    model_args = {"embed_dims": (40, 80, 160, 160), "depths": (3, 3, 12, 4), "mlp_ratios": (4, 4, 4, 4)}
    return _create("groupmixformer_miny", pretrained, **{**model_args, **kwargs})


@register_model
def groupmixformer_tiny(pretrained: bool = False, **kwargs: Any) -> GroupMixFormer:
    """GroupMixFormer-T: 10.9M parameters."""
    model_args = {"embed_dims": (80, 160, 200, 240), "depths": (4, 4, 12, 4), "mlp_ratios": (4, 4, 4, 4)}
    return _create("groupmixformer_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def groupmixformer_small(pretrained: bool = False, **kwargs: Any) -> GroupMixFormer:
    """GroupMixFormer-S: 22.4M parameters."""
    model_args = {"embed_dims": (80, 160, 320, 320), "depths": (2, 4, 12, 4), "mlp_ratios": (4, 4, 4, 4)}
    return _create("groupmixformer_small", pretrained, **{**model_args, **kwargs})


@register_model
def groupmixformer_base(pretrained: bool = False, **kwargs: Any) -> GroupMixFormer:
    """GroupMixFormer-B: 45.8M parameters."""
    model_args = {"embed_dims": (200, 240, 320, 480), "depths": (8, 8, 12, 8), "mlp_ratios": (2, 2, 4, 4)}
    return _create("groupmixformer_base", pretrained, **{**model_args, **kwargs})


@register_model
def groupmixformer_large(pretrained: bool = False, **kwargs: Any) -> GroupMixFormer:
    """GroupMixFormer-L: 71.8M parameters."""
    model_args = {"embed_dims": (240, 320, 360, 480), "depths": (8, 10, 30, 10), "mlp_ratios": (4, 4, 2, 2)}
    return _create("groupmixformer_large", pretrained, **{**model_args, **kwargs})
