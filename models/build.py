"""Configuration -> network, and weights loaded strictly."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn
from yacs.config import CfgNode

from models.groupmixformer import GroupMixFormer, checkpoint_filter_fn
from utils.errors import UserError, listing

_GREY, _RGB = 1, 3  # numbers of input channels that others can be adapted from
_MOST_CODES = 32  # one part is compiled anew for each stage and size of batch, in training and recomputed
_NOT_IN_BACKBONE = ("norm.", "head.")  # of a classifier's tensors
_INPUT_CONV, _HEAD = "stem.conv1.weight", ("head.fc.weight", "head.fc.bias")


def build_model(config: CfgNode, num_classes: int) -> GroupMixFormer:
    """The configured network with fresh weights.

    Raises:
        UserError: If the settings cannot make a network.
    """
    try:
        model = GroupMixFormer(in_chans=config.MODEL.GMA.IN_DIM, num_classes=num_classes, **network_settings(config))
    except ValueError as error:
        raise UserError(f"MODEL.GMA: {error}") from None
    model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT, config.TRAIN.RECOMPUTE)
    return model


def network_settings(config: CfgNode) -> dict[str, Any]:
    """What the configuration says of the network, beside its input and its classes, as `GroupMixFormer` takes it."""
    gma = config.MODEL.GMA
    return {
        "embed_dims": gma.EMBEDDING_DIMS,
        "depths": gma.SERIAL_DEPTHS,
        "mlp_ratios": gma.MLP_RATIOS,
        "num_heads": gma.NUM_HEADS,
        "qkv_bias": gma.QKV_BIAS,
        "qk_scale": gma.QKV_SCALE,
        "proj_drop_rate": gma.DROP_RATE,
        "drop_path_rate": gma.DROP_PATH_RATE,
    }


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Loads weights of either naming; every tensor must be there, have its shape, and none be left over.

    Raises:
        UserError: Naming the tensors that do not fit.
    """
    wanted, given = model.state_dict(), checkpoint_filter_fn(state_dict)
    strange = [str(name) for name, value in given.items() if not isinstance(value, Tensor)]
    if strange:
        raise UserError(f"{source} holds no weights under {listing(strange)}: name another file")
    problems = []
    if missing := [name for name in wanted if name not in given]:
        problems.append(f"it lacks {listing(missing)}")
    if extra := [name for name in given if name not in wanted]:
        problems.append(f"it has {listing(extra)}, which the network has not")
    misshapen = [
        f"{name} is {list(given[name].shape)} and not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if misshapen:
        problems.append(listing(misshapen))
    if problems:
        raise UserError(f"{source} does not fit the network: {'; '.join(problems)}: use the --cfg it was trained with")
    model.load_state_dict(given)


def load_pretrained(model: GroupMixFormer, state_dict: Mapping[str, Tensor], source: str) -> list[str]:
    """Loads weights to fine-tune: as `load_weights`, but the head and the input channels may differ.

    Args:
        model: A freshly made network.
        state_dict: Weights of either naming.
        source: Where they come from, for errors.

    Returns:
        A sentence for each thing that was not loaded as it is.

    Raises:
        UserError: Naming the tensors that do not fit.
    """
    weights: dict[str, Any] = dict(checkpoint_filter_fn(state_dict))
    fresh, sentences = model.state_dict(), []
    head = weights.get(_HEAD[0])
    if getattr(head, "shape", None) != getattr(fresh.get(_HEAD[0]), "shape", None):
        for name in _HEAD:
            weights.pop(name, None)
        weights.update({name: fresh[name] for name in _HEAD if name in fresh})
        had = "no head" if head is None else f"{len(head)} classes"
        sentences.append(f"{source} has {had}, the network {model.num_classes} classes: the head starts afresh")
    conv = weights.get(_INPUT_CONV)
    channels = conv.shape[1] if isinstance(conv, Tensor) and conv.ndim == 4 else model.in_chans
    if channels in (_GREY, _RGB) and channels != model.in_chans:
        if channels == _RGB:
            weights[_INPUT_CONV], how = adapt_input_conv(model.in_chans, conv), "adapted as timm does"
        else:
            weights[_INPUT_CONV], how = conv.repeat(1, model.in_chans, 1, 1) / model.in_chans, "shared out to them"
        sentences.append(
            f"{source} takes {channels} channels, the network {model.in_chans}: the first convolution was {how}"
        )
    load_weights(model, weights, source)
    return sentences


def load_around_backbone(
    network: nn.Module,
    backbone: GroupMixFormer,
    place: str,
    of_classes: tuple[str, ...],
    state_dict: Mapping[str, Tensor],
    source: str,
) -> list[str]:
    """Loads weights to start a network around a backbone from: a classifier's into the backbone, or its own kind's.

    Args:
        network: A freshly made network.
        backbone: The backbone in it.
        place: What the backbone's tensors' names begin with in the network, with a dot at the end.
        of_classes: What the names of tensors begin with that depend on the number of classes, which may differ.
        state_dict: Weights of such a network, or of a classifier in either naming.
        source: Where they come from, for errors.

    Returns:
        A sentence for each thing that was not loaded as it is.

    Raises:
        UserError: Naming the tensors that do not fit.
    """
    if not any(name.startswith(place) for name in state_dict):
        weights = checkpoint_filter_fn(state_dict)
        kept = {name: tensor for name, tensor in weights.items() if not name.startswith(_NOT_IN_BACKBONE)}
        sentences = load_pretrained(backbone, kept, source)
        taken = f"of {source} the backbone is taken, without final norm and head: all else starts afresh"
        return [taken, *sentences]
    others = {}
    for name, fresh in network.state_dict().items():
        given = getattr(state_dict.get(name), "shape", fresh.shape)
        if name.startswith(of_classes) and given != fresh.shape and given[1:] == fresh.shape[1:]:
            others[name] = fresh
    load_weights(network, {**state_dict, **others}, source)
    layers = sorted({name.rpartition(".")[0] for name in others})
    return [f"{source} is of other classes: all of it is taken but {listing(layers)}"] if layers else []


def backbone_layers(backbone: GroupMixFormer, place: str, coarse: bool) -> dict[str, Any]:
    """A backbone's layers for timm's layer-wise learning rate decay, inside a larger network.

    What no pattern matches, timm puts into the last layer.

    Args:
        backbone: The backbone.
        place: What its tensors' names begin with in the larger network, with a dot at the end.
        coarse: As in `GroupMixFormer.group_matcher`.
    """

    def inside(patterns: Any) -> Any:
        if isinstance(patterns, str):
            return f"^{re.escape(place)}{patterns.removeprefix('^')}"
        return [(inside(pattern), order) for pattern, order in patterns]

    return {name: inside(patterns) for name, patterns in backbone.group_matcher(coarse).items()}


def compile_blocks(model: GroupMixFormer) -> None:
    """Has torch.compile take the network block by block, in place, when each is first run.

    Blocks of a stage are alike and share what is compiled, so that a network of any depth takes the time of four
    blocks. Drop paths are not alike, as their rates differ: of blocks that have one, the three parts that it stands
    between are compiled, and norms and residuals run as they are. So are those of blocks with SyncBatchNorm, which
    cannot be traced: what is compiled ends before it, and would do so inside activation checkpointing, too.
    """
    dynamo = torch._dynamo.config
    dynamo.optimize_ddp = False  # for networks compiled whole: it cuts graphs where DDP's buckets end
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_CODES)
    # Inductor's takes tokens [B, H, W, C] for images, and on GPUs transposes them around layer norms and residuals.
    options = {"layout_optimization": False}
    for stage in model.stages:
        for block in stage.blocks:
            has_drop_path = not isinstance(block.drop_path1, nn.Identity)
            is_synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in block.modules())
            for part in [block.cpe, block.attn, block.mlp] if has_drop_path or is_synchronised else [block]:
                part.compile(dynamic=False, options=options)
