"""Names of the published checkpoints <-> ours: a pure function each way.

Every tensor has the same shape and meaning in both forms; only the names differ.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

# (published, ours); `*` stands for a number, in the same order on both sides. Whole dotted prefixes, first match wins.
_PREFIXES = (
    ("conv_stem.proj1", "stem.conv1"),
    ("conv_stem.norm1", "stem.norm1"),
    ("conv_stem.proj2", "stem.conv2"),
    ("conv_stem.norm2", "stem.norm2"),
    ("patch_embed_layers.*.proj.conv1", "stages.*.patch_embed.conv_dw"),
    ("patch_embed_layers.*.proj.pointwise_conv", "stages.*.patch_embed.conv_pw"),
    ("patch_embed_layers.*.norm", "stages.*.patch_embed.norm"),
    ("groupmixformer_backbone.*.gma_stage.*", "stages.*.blocks.*"),
    ("norm4", "norm"),
    ("head", "head.fc"),
)
_BLOCK_PREFIXES = (
    ("cpe.proj", "cpe.conv"),
    ("att.aggregator.norm0", "attn.aggregator.norm"),
    ("att.aggregator.agg0.conv.conv1", "attn.aggregator.local.conv_dw"),
    ("att.aggregator.agg0.conv.pointwise_conv", "attn.aggregator.local.conv_pw"),
    ("att.aggregator.agg0.norm", "attn.aggregator.local.norm"),
    *(
        pair
        for i in range(3)
        for pair in (
            (f"att.aggregator.agg{i + 1}.conv1", f"attn.aggregator.proxies.{i}.conv_dw"),
            (f"att.aggregator.agg{i + 1}.pointwise_conv", f"attn.aggregator.proxies.{i}.conv_pw"),
            (f"att.aggregator.norm{i + 1}", f"attn.aggregator.proxies.{i}.norm"),
        )
    ),
    ("att.crpe.conv_list.*", "attn.position.convs.*"),
    ("att.qkv", "attn.qkv"),
    ("att.proj", "attn.proj"),
)
_ALL_PREFIXES = (
    *(
        (f"groupmixformer_backbone.*.gma_stage.*.{published}", f"stages.*.blocks.*.{ours}")
        for published, ours in _BLOCK_PREFIXES
    ),
    *_PREFIXES,
)


def _rule(source: str, target: str) -> tuple[re.Pattern[str], str]:
    pattern = "^" + re.escape(source).replace(r"\*", r"(\d+)") + r"(?=\.)"
    numbers = iter(range(1, 10))
    return re.compile(pattern), re.sub(r"\*", lambda _: rf"\{next(numbers)}", target)


_TO_OURS = tuple(_rule(published, ours) for published, ours in _ALL_PREFIXES)
_TO_PUBLISHED = tuple(_rule(ours, published) for published, ours in _ALL_PREFIXES)


def _rename(name: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return name


def is_published(state_dict: Mapping[str, object]) -> bool:
    """Whether the names are those of the published code."""
    return any(
        name.startswith(("conv_stem.", "patch_embed_layers.", "groupmixformer_backbone.")) for name in state_dict
    )


def is_ours(name: str) -> bool:
    """Whether a tensor's name is one of ours that has a published counterpart."""
    return _rename(name, _TO_PUBLISHED) != name


def from_published(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """The same tensors under our names; a name that the published code does not have stays as it is."""
    return {_rename(name, _TO_OURS): value for name, value in state_dict.items()}


def to_published(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """The same tensors under the published names; a name that we do not have stays as it is."""
    return {_rename(name, _TO_PUBLISHED): value for name, value in state_dict.items()}
