"""Explicit attention: it is what the layer computes, token by token, and what the formula says it sums to."""

import copy

import pytest
import torch
from helpers_unit import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models import GroupMixAttention, GroupMixFormer
from models.attention_maps import attention_maps, attention_weights, head_contents, token_at

WINDOWS = {8: ((3, 2), (5, 3), (7, 3)), 4: ((3, 1), (5, 1), (7, 2)), 6: ((3, 2), (5, 2), (7, 2)), 2: ((3, 1), (5, 1))}
ODD = (5, 7)  # rows and columns
FOUR = ["tokens", "3x3 groups", "5x5 groups", "7x7 groups"]


def layer(heads=8, dim=None, **settings):
    """A layer in double precision whose norms do something."""
    torch.manual_seed(heads)
    attention = GroupMixAttention(dim or 10 * heads, heads, WINDOWS[heads], **settings).double().eval()
    for module in attention.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 2)
            nn.init.normal_(module.bias)
    return attention


def inputs(attention, shape=ODD, images=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, *shape, attention.proj.in_features, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return x, attention.aggregator(attention.qkv(x))[0]


def attended(attention, x):
    """What the layer itself computes, without position term and projection."""
    bare = copy.deepcopy(attention)
    for conv in bare.position.convs:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    nn.init.eye_(bare.proj.weight)
    nn.init.zeros_(bare.proj.bias)
    with torch.no_grad():
        return bare(x)[..., : 4 * x.shape[-1] // 5]


def every_token(shape):
    return [(row, column) for row in range(shape[0]) for column in range(shape[1])]


@pytest.mark.parametrize("heads", WINDOWS)
@pytest.mark.parametrize("settings", [{}, {"qk_scale": 0.7}])
def test_weighted_values_are_the_layers_own_output_at_every_token(heads, settings):
    attention = layer(heads, **settings)
    x, tokens = inputs(attention)
    values = tokens[:, :, :, 2].unflatten(-1, (heads, -1))
    out = attended(attention, x)
    for token in every_token(ODD):
        weights = attention_weights(attention, tokens, token)
        explicit = torch.einsum("bhyx,byxhv->bhv", weights, values).flatten(1)
        torch.testing.assert_close(explicit, out[:, token[0], token[1]], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("heads", WINDOWS)
def test_weights_of_a_token_sum_to_its_scaled_query(heads):
    attention = layer(heads)
    _, tokens = inputs(attention)
    queries = tokens[:, :, :, 0].unflatten(-1, (heads, -1))
    for token in every_token(ODD):
        sums = attention_weights(attention, tokens, token).sum(dim=(2, 3))
        torch.testing.assert_close(sums, attention.scale * queries[:, token[0], token[1]].sum(-1), rtol=1e-12, atol=0)


def test_weights_are_the_formula_written_out_and_may_be_negative():
    attention = layer()
    _, tokens = inputs(attention, images=1)
    weights = attention_weights(attention, tokens, (3, 1))
    keys = tokens[0, :, :, 1].reshape(35, 8, -1)
    query = tokens[0, 3, 1, 0].reshape(8, -1)
    for head in range(8):
        for n in range(35):
            softmax = [
                keys[n, head, k].exp() / sum(keys[m, head, k].exp() for m in range(35)) for k in range(keys.shape[2])
            ]
            wanted = attention.scale * sum(q * s for q, s in zip(query[head], softmax, strict=True))
            assert weights[0, head, n // 7, n % 7] == pytest.approx(float(wanted), rel=1e-10, abs=1e-15)
    assert weights.min() < 0 < weights.max()


def test_eight_heads_fall_on_the_four_segments_two_by_two():
    assert head_contents(layer(8)) == [name for name in FOUR for _ in range(2)]
    assert (
        head_contents(GroupMixFormer(embed_dims=(40,), depths=(1,), mlp_ratios=(1,)).stages[0].blocks[0].attn)[6:]
        == ["7x7 groups"] * 2
    )


@pytest.mark.parametrize("heads", WINDOWS)
def test_heads_are_called_by_the_segments_that_their_channels_lie_in(heads):
    attention = layer(heads, dim=60 * heads)
    attended_channels = 48 * heads
    segment_of = [channel // (attended_channels // 4) for channel in range(attended_channels)]
    for head, contents in enumerate(head_contents(attention)):
        held = sorted(set(segment_of[48 * head : 48 * (head + 1)]))
        assert contents == " + ".join(FOUR[segment] for segment in held)


def test_maps_of_a_network_are_those_of_its_layers_as_they_run():
    torch.manual_seed(0)
    network = GroupMixFormer(embed_dims=(40,) * 4, depths=(2, 1, 1, 1), num_classes=3).double().eval()
    image, seen = torch.randn(1, 3, 75, 90, dtype=torch.float64), {}
    for number in range(2):
        network.stages[0].blocks[number].attn.register_forward_pre_hook(
            lambda _layer, given, number=number: seen.update({number: given[0]})
        )
    before = network(image)
    found = attention_maps(network, image, (0.4, 0.99), [(0, 1), (0, 0), (3, 0)])
    assert [(each.stage, each.block) for each in found] == [(0, 1), (0, 0), (3, 0)]
    assert [tuple(each.weights.shape) for each in found] == [(8, 19, 23), (8, 19, 23), (8, 3, 3)]
    assert [each.token for each in found] == [(7, 22), (7, 22), (1, 2)]
    for each in found[:2]:
        attention = network.stages[0].blocks[each.block].attn
        tokens, _ = attention.aggregator(attention.qkv(seen[each.block]))
        torch.testing.assert_close(each.weights, attention_weights(attention, tokens, (7, 22))[0])
    assert torch.equal(network(image), before)


def test_no_hook_is_left_behind_even_by_an_image_that_does_not_fit():
    network = GroupMixFormer(embed_dims=(40,) * 4, depths=(1,) * 4, num_classes=3).eval()
    attention_maps(network, torch.zeros(1, 3, 32, 32), (0, 0), [(0, 0)])
    with pytest.raises(RuntimeError):
        attention_maps(network, torch.zeros(1, 4, 32, 32), (0, 0), [(0, 0)])
    assert not any(module._forward_hooks for module in network.modules())


@examples(100)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 60), st.integers(1, 60))
def test_the_token_at_a_place_is_the_one_whose_cell_holds_it(down, right, rows, columns):
    token = token_at((down, right), (rows, columns))
    for share, index, count in zip((down, right), token, (rows, columns), strict=True):
        assert 0 <= index < count
        assert index / count <= share + 1e-12 and share - 1e-12 <= (index + 1) / count
