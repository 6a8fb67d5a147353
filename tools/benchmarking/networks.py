"""The networks that are measured: by name from timm, and ours in each of its forms."""

import copy
import difflib

import timm
import torch
from timm.layers import DropPath
from torch import nn

import models  # noqa: F401  (registers ours with timm)
from models.build import compile_blocks
from models.fuse import fuse
from models.groupmixformer import GroupMixFormer
from tools.benchmarking.literal import LiteralGroupMixFormer
from utils.errors import UserError, reason

PLAIN, LITERAL, FUSED, RECOMPUTED = "plain", "literal", "fused", "recomputed"


def build_network(name: str, size: int) -> nn.Module:
    """A network by its name in timm, ours among them, with fresh weights, for images of a size and without drop path.

    Raises:
        UserError: If there is none of that name, or it cannot take such images.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"near it are {', '.join(near)}" if near else "timm.list_models() has the names"
        raise UserError(f"timm and this code have no network {name}: {hint}")
    fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    torch.manual_seed(0)
    try:
        network = timm.create_model(name, **({"img_size": size} if fixed else {}))
        with torch.no_grad():
            copy.deepcopy(network).eval().to("meta")(torch.empty(1, 3, size, size, device="meta"))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be run on {size} x {size} images ({reason(error)}): choose others") from None
    for module in network.modules():
        if isinstance(module, DropPath):  # Swin's default is 0.1, others' 0
            module.drop_prob = 0.0
    return network


def forms_of(network: nn.Module, fused: bool, recomputed: bool, mode: str) -> tuple[str, ...]:
    """The forms that a network is measured in; the literal one of ours always, as all others are compared with it."""
    if not isinstance(network, GroupMixFormer):
        return (PLAIN,)
    more = {"infer": (FUSED,) if fused else (), "train": (RECOMPUTED,) if recomputed else ()}
    return (LITERAL, PLAIN, *more[mode])


def as_counted(network: nn.Module) -> nn.Module:
    """The form whose work is the least: of ours the literal one, which reads tokens once for the whole projection."""
    return in_form(network, LITERAL) if isinstance(network, GroupMixFormer) else network


def in_form(network: nn.Module, form: str) -> nn.Module:
    """A copy of a network in one of its forms."""
    if form == FUSED:
        return fuse(network)
    network = copy.deepcopy(network)
    if form == LITERAL:
        return LiteralGroupMixFormer(network)
    if form == RECOMPUTED:
        network.set_grad_checkpointing(recompute="cheap")
    return network


def compile_network(network: nn.Module, whole: bool) -> nn.Module:
    """A network that torch.compile has been told to compile on first use.

    Args:
        network: The network.
        whole: Whether ours is compiled in one piece too, and not block by block, which shares the code of a stage.
    """
    if whole or not isinstance(network, GroupMixFormer):
        return torch.compile(network, dynamic=False)
    compile_blocks(network)
    return network
