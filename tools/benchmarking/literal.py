"""GroupMixFormer in its literal form: the published order of operations, as a slow twin to measure against.

Between modules tokens are [B, N, C]; convolutions see them as images [B, C, H, W].
The twin has the weights of the network that it is made of, under the same names, and computes the same.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.groupmixformer import (
    NUM_SEGMENTS,
    GroupAggregator,
    GroupMixAttention,
    GroupMixBlock,
    GroupMixFormer,
    GroupMixStage,
    RelativePosition,
    SeparableConv,
)


class LiteralGroupMixFormer(nn.Module):
    """The literal form of a network, whose tensors it shares: [B, in_chans, H, W] -> [B, num_classes]."""

    def __init__(self, model: GroupMixFormer) -> None:
        super().__init__()
        self.stem, self.stages, self.norm, self.head = model.stem, model.stages, model.norm, model.head
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        x = self.stem(x)
        for stage in self.stages:
            x = _stage(stage, x)
        return self.head(self.norm(x))


def _to_images(x: Tensor, height: int, width: int) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)


def _to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _stage(stage: GroupMixStage, x: Tensor) -> Tensor:
    x = stage.patch_embed(x)
    height, width = x.shape[2:]
    x = _to_tokens(x)
    for block in stage.blocks:
        x = _block(block, x, height, width)
    return _to_images(x, height, width)


def _block(block: GroupMixBlock, x: Tensor, height: int, width: int) -> Tensor:
    x = x + _to_tokens(block.cpe.conv(_to_images(x, height, width)))
    x = x + block.drop_path1(_attention(block.attn, block.norm1(x), height, width))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def _attention(attn: GroupMixAttention, x: Tensor, height: int, width: int) -> Tensor:
    batch, tokens, dim = x.shape
    qkv = F.linear(x, attn.qkv.weight, attn.qkv.bias)
    qkv = qkv.reshape(batch, tokens, 3, dim).permute(2, 0, 1, 3).reshape(3 * batch, tokens, dim)
    attended, local = _aggregate(attn.aggregator, qkv, height, width)
    # [3, B, heads, N, C'/heads]
    q, k, v = attended.reshape(3, batch, attn.num_heads, -1, tokens).transpose(-2, -1).unbind(0)
    context = k.softmax(dim=2).transpose(2, 3) @ v
    out = attn.scale * (q @ context) + q * _position(attn.position, v, height, width)
    out = out.transpose(1, 2).reshape(batch, tokens, -1)
    return attn.proj_drop(attn.proj(torch.cat((out, local), dim=-1)))


def _aggregate(aggregator: GroupAggregator, qkv: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """[3B, N, C] -> the attended segments as images [3B, 4C/5, H, W], and the local branch as tokens [B, N, C/5]."""
    images = _to_images(qkv, height, width)
    segments = images.chunk(NUM_SEGMENTS, dim=1)
    attended = [aggregator.act(aggregator.norm(segments[0]))]
    for proxy, segment in zip(aggregator.proxies, segments[1:4], strict=True):
        attended.append(SeparableConv.forward(proxy, segment))
    side_by_side = torch.cat(segments[-1].chunk(3, dim=0), dim=1)  # of queries, keys and values: [B, 3C/5, H, W]
    return torch.cat(attended, dim=1), _local(aggregator.local, side_by_side)


def _local(local: SeparableConv, x: Tensor) -> Tensor:
    tokens = _to_tokens(local.conv_pw(local.conv_dw(x)))
    norm = local.norm
    return local.act(F.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps))


def _position(position: RelativePosition, v: Tensor, height: int, width: int) -> Tensor:
    """Values, and what the heads see around them: [B, heads, N, C'/heads]."""
    images = v.transpose(2, 3).reshape(v.shape[0], -1, height, width)
    groups = images.split([conv.in_channels for conv in position.convs], dim=1)
    # With torch's own gradients, as published code has.
    windows = [nn.Conv2d.forward(conv, group) for conv, group in zip(position.convs, groups, strict=True)]
    seen = torch.cat(windows, dim=1)
    return seen.reshape(*v.shape[:2], v.shape[3], v.shape[2]).transpose(2, 3)
