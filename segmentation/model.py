"""UperNet and Semantic FPN of segmentation_models_pytorch on our backbone."""

from collections.abc import Mapping
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.base.modules import Conv2dReLU
from torch import Tensor, nn
from yacs.config import CfgNode

from models.build import (
    backbone_layers,
    backbone_weights,
    compile_blocks,
    load_pretrained,
    load_weights,
    network_settings,
)
from models.groupmixformer import GroupMixFormer
from utils.errors import UserError

_STRIDE = 32  # of the last stage: sides of what the decoders take are multiples of it
_AUX_STAGE = 2  # of four, from 0
_BACKBONE = "encoder.model.model."  # of its tensors' names


class Segmenter(nn.Module):
    """A network that gives logits of every pixel, for images of any size.

    Args:
        parts: What segmentation_models_pytorch made, with `encoder`, `decoder` and `segmentation_head`; the latter must
            not enlarge.
        num_classes: How many classes it tells apart.
        dropout: Probability of leaving out a channel before the classifier, and before the auxiliary head's.
        aux_channels: Channels of the auxiliary head on the third stage; 0 for none.
    """

    def __init__(self, parts: nn.Module, num_classes: int, dropout: float, aux_channels: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.encoder, self.decoder, self.head = parts.encoder, parts.decoder, parts.segmentation_head
        self.dropout = nn.Dropout2d(dropout)
        self.auxiliary = None
        if aux_channels:
            channels = self.backbone.feature_info[_AUX_STAGE]["num_chs"]
            self.auxiliary = nn.Sequential(
                Conv2dReLU(channels, aux_channels, kernel_size=3, padding=1),
                nn.Dropout2d(dropout),
                nn.Conv2d(aux_channels, num_classes, kernel_size=1),
            )
            initialize_decoder(self.auxiliary)

    @property
    def backbone(self) -> GroupMixFormer:
        """The real network inside the encoder, without its final norm and classifier."""
        return self.encoder.model.model

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, classes, H, W] of images [B, C, H, W]; in training also the auxiliary head's, if there is one."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % _STRIDE, 0, -height % _STRIDE))
        features = self.encoder(padded)
        logits = _enlarge(self.head(self.dropout(self.decoder(features))), padded)[..., :height, :width]
        if self.auxiliary is None or not self.training:
            return logits
        auxiliary = self.auxiliary(features[_AUX_STAGE - 4])
        return logits, _enlarge(auxiliary, padded)[..., :height, :width]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names that weight decay must spare: none but the biases and 1-D tensors that timm spares already."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers of parameters for timm's layer-wise learning rate decay: the backbone's, then decoder and heads."""
        return backbone_layers(self.backbone, _BACKBONE, coarse)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, recompute: str = "all") -> None:
        """Recomputes the backbone's activations in the backward pass, as `GroupMixFormer.set_grad_checkpointing`."""
        self.backbone.set_grad_checkpointing(enable, recompute)


def _enlarge(logits: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(logits.float(), size=images.shape[-2:], mode="bilinear", align_corners=False)


def build_segmenter(config: CfgNode, num_classes: int) -> Segmenter:
    """The configured network with fresh weights.

    Raises:
        UserError: If the settings cannot make a network.
    """
    decoder = config.MODEL.DECODER
    settings: dict[str, Any] = {"encoder_weights": None, "classes": num_classes, "upsampling": 1}
    settings |= {"in_channels": config.MODEL.GMA.IN_DIM, "feature_cls": "getter", **network_settings(config)}
    name = "tu-groupmixformer_small"  # of which the settings replace everything
    try:
        if decoder.NAME == "upernet":
            parts = smp.UPerNet(name, decoder_channels=decoder.CHANNELS, **settings)
        else:
            channels = {"pyramid": decoder.CHANNELS, "segmentation": decoder.CHANNELS // 2}
            settings |= {f"decoder_{part}_channels": count for part, count in channels.items()}
            parts = smp.FPN(name, decoder_dropout=0.0, **settings)
    except ValueError as error:
        raise UserError(f"MODEL.GMA: {error}") from None
    aux_channels = decoder.AUX_CHANNELS if decoder.AUX_WEIGHT > 0 else 0
    segmenter = Segmenter(parts, num_classes, decoder.DROPOUT, aux_channels)
    segmenter.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT, config.TRAIN.RECOMPUTE)
    return segmenter


def load_to_start(segmenter: Segmenter, state_dict: Mapping[str, Tensor], source: str) -> list[str]:
    """Loads weights to start from: a classifier's into the backbone, or a segmenter's, of which classes may differ.

    Args:
        segmenter: A freshly made network.
        state_dict: Weights of a segmenter, or of a classifier in either naming.
        source: Where they come from, for errors.

    Returns:
        A sentence for each thing that was not loaded as it is.

    Raises:
        UserError: Naming the tensors that do not fit.
    """
    if not is_segmenter(state_dict):
        sentences = load_pretrained(segmenter.backbone, backbone_weights(state_dict), source)
        return [
            f"{source} is a classifier: its final norm and its head are left out, the decoder starts afresh",
            *sentences,
        ]
    weights, fresh, sentences = dict(state_dict), segmenter.state_dict(), []
    for layer in ("head.0", "auxiliary.2"):
        given, wanted = weights.get(f"{layer}.bias"), fresh.get(f"{layer}.bias")
        if given is not None and wanted is not None and given.shape != wanted.shape:
            weights.update({name: value for name, value in fresh.items() if name.startswith(f"{layer}.")})
            sentences.append(f"{source} has {len(given)} classes, the network {len(wanted)}: {layer} starts afresh")
    load_weights(segmenter, weights, source)
    return sentences


def is_segmenter(state_dict: Mapping[str, Any]) -> bool:
    """Whether weights are those of a `Segmenter`."""
    return any(name.startswith(_BACKBONE) for name in state_dict)


def compile_segmenter(segmenter: Segmenter) -> None:
    """Has torch.compile take the backbone block by block, in place."""
    compile_blocks(segmenter.backbone)
