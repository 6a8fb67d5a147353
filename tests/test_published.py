"""Names of the published checkpoints <-> ours."""

import functools
import json
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models  # noqa: F401  (registers the variants)
from models import GroupMixFormer
from models.published import from_published, is_published, to_published

FIXTURES = Path(__file__).parent / "fixtures"
VARIANTS = ("miny", "tiny", "small", "base", "large")
deterministic = settings(derandomize=True, deadline=None, max_examples=20)


def published_shapes(variant: str) -> dict[str, list[int]]:
    return json.loads((FIXTURES / f"state_dict_{variant}.json").read_text())


@functools.cache
def our_shapes(variant: str) -> dict[str, list[int]]:
    model = timm.create_model(f"groupmixformer_{variant}", device="meta")
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("variant", ["miny", "tiny", "small"])
def test_every_tensor_has_its_published_name_and_shape(variant):
    published = published_shapes(variant)
    assert to_published(our_shapes(variant)) == published
    assert from_published(published) == our_shapes(variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_are_a_bijection(variant):
    ours = our_shapes(variant)
    published = to_published(ours)
    assert len(published) == len(ours)
    assert not set(published) & set(ours), "every name differs between the forms"
    assert from_published(published) == ours
    assert to_published(from_published(published)) == published


@pytest.mark.parametrize("variant", ["base", "large"])
def test_names_of_the_unlisted_variants_follow_the_listed_pattern(variant):
    def patterns(names):
        stage_or_block = re.compile(r"(?<=layers\.)\d+|(?<=backbone\.)\d+|(?<=gma_stage\.)\d+")
        return {stage_or_block.sub("#", name) for name in names}

    published = to_published(our_shapes(variant))
    assert patterns(published) == patterns(published_shapes("small"))
    depths = {"base": (8, 8, 12, 8), "large": (8, 10, 30, 10)}[variant]
    blocks = {tuple(map(int, found.groups())) for name in published if (found := BLOCK.match(name))}
    assert blocks == {(i, j) for i, depth in enumerate(depths) for j in range(depth)}


BLOCK = re.compile(r"groupmixformer_backbone\.(\d+)\.gma_stage\.(\d+)\.")
BLOCK_SUFFIXES = sorted({BLOCK.sub("", name) for name in published_shapes("miny") if BLOCK.match(name)})
OTHER_NAMES = sorted(name for name in published_shapes("miny") if not BLOCK.match(name))
block_names = st.builds(
    "groupmixformer_backbone.{}.gma_stage.{}.{}".format,
    st.integers(0, 120),
    st.integers(0, 120),
    st.sampled_from(BLOCK_SUFFIXES),
)
published_names = st.one_of(block_names, st.sampled_from(OTHER_NAMES))
words = st.sampled_from(["weight", "bias", "conv1", "0", "1", "norm1", "att", "attn", "blocks", "proj", "fc", "body"])
published_dicts = st.dictionaries(published_names, st.integers())


@deterministic
@given(published_dicts)
def test_any_part_of_a_published_state_dict_survives_the_round_trip(published):
    ours = from_published(published)
    assert len(ours) == len(published)
    assert not is_published(ours)
    assert to_published(ours) == published
    assert from_published(to_published(ours)) == ours


@deterministic
@given(st.lists(st.tuples(st.sampled_from([40, 80]), st.integers(1, 2)), min_size=1, max_size=4))
def test_any_network_keeps_every_tensor_apart(stages):
    dims, depths = zip(*stages, strict=True)
    model = GroupMixFormer(embed_dims=dims, depths=depths, mlp_ratios=[1] * len(dims), num_classes=2, device="meta")
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    published = to_published(ours)
    assert len(published) == len(ours)
    assert is_published(published)
    assert from_published(published) == ours


@deterministic
@given(st.dictionaries(st.lists(words, min_size=2, max_size=4).map(".".join), st.integers()))
def test_foreign_names_stay_as_they_are(others):
    assert from_published(others) == others
    assert to_published(others) == others


@pytest.mark.parametrize(
    "name",
    [
        "header.weight",
        "norm40.weight",
        "norm4",
        "conv_stem.proj10.weight",
        "conv_stem.proj3.weight",
        "my.conv_stem.proj1.weight",
        "patch_embed_layers.x.norm.weight",
        "groupmixformer_backbone.0.gma_stage.weight",
    ],
)
def test_names_that_only_resemble_published_ones_stay_as_they_are(name):
    assert from_published({name: 1}) == {name: 1}


def test_values_and_order_are_kept_and_the_argument_is_left_alone():
    tensor = torch.zeros(2)
    published = OrderedDict([("norm4.weight", tensor), ("conv_stem.proj1.bias", tensor)])
    before = list(published)
    ours = from_published(published)
    assert list(ours) == ["norm.weight", "stem.conv1.bias"]
    assert all(value is tensor for value in ours.values())
    assert list(published) == before


def test_the_form_of_a_state_dict_is_recognised():
    published = published_shapes("miny")
    assert is_published(published)
    assert not is_published(from_published(published))
    assert not is_published({})
    headless = {name: shape for name, shape in published.items() if not name.startswith("head.")}
    assert is_published(headless)
