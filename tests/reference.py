"""GroupMixFormer as literally as its description: a slow function of a published state dict, to compare against.

Nothing is shared with the product code and no fused operator is used: norms and activations are written out, queries,
keys and values pass the aggregator one by one, and each head builds its whole N x N attention matrix. Images and stage
outputs are [B, C, H, W], tokens [B, N, C].
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS = 8
PROXY_KERNELS = (3, 5, 7)
POSITION_WINDOWS = (3, 3, 5, 5, 5, 7, 7, 7)  # one for each head
MOMENTUM = 0.1


@dataclass
class Output:
    """What a pass through the network gives; `running` holds the batch norms' statistics after a training step."""

    logits: Tensor
    features: Tensor
    stages: list[Tensor]
    running: dict[str, Tensor] = field(default_factory=dict)


class Weights:
    """The tensors under a prefix, whether the network trains, and where new running statistics go."""

    def __init__(self, state: Mapping[str, Tensor], training: bool, prefix: str = "", running: dict | None = None):
        self.state, self.training, self.prefix = state, training, prefix
        self.running: dict[str, Tensor] = {} if running is None else running

    def under(self, name: str) -> "Weights":
        return Weights(self.state, self.training, f"{self.prefix}{name}.", self.running)

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.state

    def count(self, name: str) -> int:
        """How many numbered entries a list of modules has."""
        start = f"{self.prefix}{name}."
        return len({key[len(start) :].split(".")[0] for key in self.state if key.startswith(start)})


def hardswish(x: Tensor) -> Tensor:
    return x * (x + 3).clamp(0, 6) / 6


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def layer_norm(w: Weights, x: Tensor, eps: float) -> Tensor:
    """Over the last axis."""
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * w["weight"] + w["bias"]


def batch_norm(w: Weights, x: Tensor) -> Tensor:
    """Over all axes but the channels of [B, C, H, W]; leaves new running statistics in `w.running`."""
    if w.training:
        count = x.numel() // x.shape[1]
        mean = x.mean((0, 2, 3))
        variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
        unbiased = variance * count / (count - 1)
        for name, new in (("running_mean", mean), ("running_var", unbiased)):
            w.running[w.prefix + name] = ((1 - MOMENTUM) * w[name] + MOMENTUM * new).detach()
        w.running[w.prefix + "num_batches_tracked"] = w["num_batches_tracked"] + 1
    else:
        mean, variance = w["running_mean"], w["running_var"]
    x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return x * w["weight"][:, None, None] + w["bias"][:, None, None]


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2, groups=x.shape[1])


def separable(w: Weights, x: Tensor, stride: int = 1) -> Tensor:
    return F.conv2d(depthwise(x, w["conv1.weight"], stride=stride), w["pointwise_conv.weight"])


def to_image(x: Tensor, height: int, width: int) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)


def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def aggregate(w: Weights, qkv: list[Tensor], height: int, width: int) -> tuple[list[Tensor], Tensor]:
    """The four attended segments of each of q, k and v, and the local branch, which is one for all three."""
    images = [to_image(x, height, width) for x in qkv]
    segment = images[0].shape[1] // 5
    parts = [[x[:, s * segment : (s + 1) * segment] for s in range(5)] for x in images]
    attended: list[list[Tensor]] = [[], [], []]
    for s in range(4):
        before = [part[s] if s == 0 else separable(w.under(f"agg{s}"), part[s]) for part in parts]
        normed = batch_norm(w.under(f"norm{s}"), torch.cat(before, dim=0))  # one batch of q, k and v
        for i, x in enumerate(normed.chunk(3, dim=0)):
            attended[i].append(to_tokens(hardswish(x)))
    local = separable(w.under("agg0.conv"), torch.cat([part[4] for part in parts], dim=1))
    local = hardswish(layer_norm(w.under("agg0.norm"), to_tokens(local), eps=1e-5))
    return [torch.cat(segments, dim=-1) for segments in attended], local


def group_mix_attention(w: Weights, x: Tensor, height: int, width: int) -> Tensor:
    """Group-Mix Attention of tokens [B, N, C]."""
    C = x.shape[-1]
    qkv = x @ w["qkv.weight"].T
    if "qkv.bias" in w:
        qkv = qkv + w["qkv.bias"]
    (q, k, v), local = aggregate(w.under("aggregator"), list(qkv.split(C, dim=-1)), height, width)
    width_of_head = q.shape[-1] // HEADS
    scale = (C / HEADS) ** -0.5
    position_weight = [w[f"crpe.conv_list.{i}.weight"] for i in range(3)]
    position_bias = [w[f"crpe.conv_list.{i}.bias"] for i in range(3)]
    heads = []
    for h in range(HEADS):
        channels = slice(h * width_of_head, (h + 1) * width_of_head)
        qh, kh, vh = q[..., channels], k[..., channels], v[..., channels]
        kh = kh.exp() / kh.exp().sum(dim=1, keepdim=True)
        attention = scale * qh @ kh.transpose(1, 2)  # [B, N, N]
        window = PROXY_KERNELS.index(POSITION_WINDOWS[h])
        first = POSITION_WINDOWS.index(POSITION_WINDOWS[h])
        own = slice((h - first) * width_of_head, (h - first + 1) * width_of_head)
        position = depthwise(to_image(vh, height, width), position_weight[window][own], position_bias[window][own])
        heads.append(attention @ vh + qh * to_tokens(position))
    return torch.cat([*heads, local], dim=-1) @ w["proj.weight"].T + w["proj.bias"]


def block(w: Weights, x: Tensor, height: int, width: int) -> Tensor:
    """One block on tokens [B, N, C]."""
    x = x + to_tokens(depthwise(to_image(x, height, width), w["cpe.proj.weight"], w["cpe.proj.bias"]))
    x = x + group_mix_attention(w.under("att"), layer_norm(w.under("norm1"), x, eps=1e-6), height, width)
    hidden = layer_norm(w.under("norm2"), x, eps=1e-6) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    return x + gelu(hidden) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]


def network(state: Mapping[str, Tensor], images: Tensor, training: bool = False) -> Output:
    """The whole network, without drop path.

    Args:
        state: Tensors under the published names; left as they are.
        images: [B, 3, H, W].
        training: Whether the batch norms use the batch's own statistics.
    """
    w = Weights(state, training)
    x = images
    for i in (1, 2):
        x = F.conv2d(x, w[f"conv_stem.proj{i}.weight"], w[f"conv_stem.proj{i}.bias"], stride=2, padding=1)
        x = hardswish(batch_norm(w.under(f"conv_stem.norm{i}"), x))
    stages = []
    for i in range(w.count("groupmixformer_backbone")):
        embed = w.under(f"patch_embed_layers.{i}")
        x = separable(embed.under("proj"), x, stride=1 if i == 0 else 2)
        x = hardswish(batch_norm(embed.under("norm"), x))
        height, width = x.shape[2:]
        tokens = to_tokens(x)
        for j in range(w.count(f"groupmixformer_backbone.{i}.gma_stage")):
            tokens = block(w.under(f"groupmixformer_backbone.{i}.gma_stage.{j}"), tokens, height, width)
        x = to_image(tokens, height, width)
        stages.append(x)
    features = batch_norm(w.under("norm4"), x)
    logits = features.mean((2, 3)) @ w["head.weight"].T + w["head.bias"]
    return Output(logits, features, stages, w.running)
