"""The attention of single tokens made explicit: what Group-Mix Attention computes without ever forming it.

A block computes out = scale * Q (softmax(K)^T V) in linear time. Read from left to right the same product says how
much of each token's value a token t takes: the weight of token n is scale * sum_k Q[t, k] softmax(K)[n, k], where the
softmax runs over the tokens. As every column of softmax(K) sums to one, the weights of a token sum to
scale * sum_k Q[t, k]. Queries are no probabilities: weights may be negative, and their sum may be any number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.groupmixformer import GroupMixAttention, GroupMixFormer

__all__ = ["AttentionMap", "attention_maps", "attention_weights", "head_contents", "token_at"]


@dataclass(frozen=True)
class AttentionMap:
    """The attention of a token in one block.

    Attributes:
        stage: Number of the stage, from 0.
        block: Number of the block in its stage, from 0.
        token: Row and column of the token in the stage's feature map.
        weights: How much of each token's value it takes, [heads, H, W].
        heads: What each head's channels hold.
    """

    stage: int
    block: int
    token: tuple[int, int]
    weights: Tensor
    heads: list[str]


def attention_maps(
    network: GroupMixFormer, image: Tensor, place: tuple[float, float], blocks: Sequence[tuple[int, int]]
) -> list[AttentionMap]:
    """The attention of the token at a place of an image, as it is while the network runs.

    Args:
        network: In evaluation mode.
        image: The network's input, [1, in_chans, H, W].
        place: How far down and how far to the right the place is, in shares of height and width, from 0 to 1.
        blocks: (stage, block) of each map, from 0.

    Returns:
        The maps in the order of `blocks`.
    """
    attentions = [network.stages[stage].blocks[block].attn for stage, block in blocks]
    inputs = _attended_tokens(network, image, attentions)
    maps = []
    for (stage, block), attention, tokens in zip(blocks, attentions, inputs, strict=True):
        token = token_at(place, tokens.shape[1:3])
        weights = attention_weights(attention, tokens, token)[0]
        maps.append(AttentionMap(stage, block, token, weights, head_contents(attention)))
    return maps


def attention_weights(attention: GroupMixAttention, tokens: Tensor, token: tuple[int, int]) -> Tensor:
    """How much of each token's value a token takes, the position term left out.

    Args:
        attention: The layer.
        tokens: Its attended queries, keys and values as its aggregator gives them, [B, H, W, 3, C'].
        token: Row and column of the token that attends.

    Returns:
        Weights of [B, heads, H, W]; with them, the head's output at the token is the weighted sum of its values.
    """
    H, W = tokens.shape[1:3]
    queries, keys, _ = tokens.unflatten(-1, (attention.num_heads, -1)).unbind(3)  # [B, H, W, heads, head_dim]
    shares = keys.flatten(1, 2).softmax(dim=1)
    weights = attention.scale * torch.einsum("bhk,bnhk->bhn", queries[:, token[0], token[1]], shares)
    return weights.unflatten(-1, (H, W))


def head_contents(attention: GroupMixAttention) -> list[str]:
    """What the channels of each head hold: 'tokens', '3x3 groups', or several of them joined by a plus."""
    proxies = attention.aggregator.proxies
    segments = ["tokens", *("{}x{} groups".format(*proxy.conv_dw.kernel_size) for proxy in proxies)]
    heads = attention.num_heads
    # Head h takes the channels from h / heads to (h + 1) / heads of all, segment s those from s / segments.
    return [
        " + ".join(segments[h * len(segments) // heads : -(-(h + 1) * len(segments) // heads)]) for h in range(heads)
    ]


def token_at(place: tuple[float, float], shape: Sequence[int]) -> tuple[int, int]:
    """Row and column of the token whose cell of the image holds a place; the cells share the image out evenly.

    Args:
        place: In shares of height and width, from 0 to 1.
        shape: Rows and columns of the feature map.
    """
    row, column = (min(int(share * count), count - 1) for share, count in zip(place, shape, strict=True))
    return row, column


@torch.no_grad()
def _attended_tokens(network: GroupMixFormer, image: Tensor, attentions: Sequence[GroupMixAttention]) -> list[Tensor]:
    """Runs the network and returns what the aggregators of some of its layers gave to be attended."""
    given: dict[torch.nn.Module, Tensor] = {}

    def keep(aggregator: torch.nn.Module, _inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        given[aggregator] = output[0]

    hooks = [attention.aggregator.register_forward_hook(keep) for attention in attentions]
    try:
        network.forward_features(image)
    finally:
        for hook in hooks:
            hook.remove()
    return [given[attention.aggregator] for attention in attentions]
