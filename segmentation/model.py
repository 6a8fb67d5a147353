"""UperNet and Semantic FPN of segmentation_models_pytorch on our backbone."""

from collections.abc import Mapping
from typing import Any

import segmentation_models_pytorch as smp
import torch.nn.functional as F
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.base.modules import Conv2dReLU
from torch import Tensor, nn
from yacs.config import CfgNode

from models.build import backbone_layers, load_around_backbone, network_settings
from models.groupmixformer import GroupMixFormer
from utils.errors import UserError

_STRIDE = 32  # of the last stage: sides of what the decoders take are multiples of it
_AUX_STAGE = 2  # of four, from 0
_BACKBONE = "encoder.model.model."  # of its tensors' names
_OF_CLASSES = ("head.0.", "auxiliary.2.")  # of the tensors whose shapes depend on the number of classes


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

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers of parameters for timm's layer-wise learning rate decay: the backbone's, then decoder and heads."""
        return backbone_layers(self.backbone, _BACKBONE, coarse)


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
            parts = smp.FPN(
                name,
                decoder_pyramid_channels=decoder.CHANNELS,
                decoder_segmentation_channels=decoder.CHANNELS // 2,
                decoder_dropout=0.0,
                **settings,
            )
    except ValueError as error:
        raise UserError(f"MODEL.GMA: {error}") from None
    aux_channels = decoder.AUX_CHANNELS if decoder.AUX_WEIGHT > 0 else 0
    segmenter = Segmenter(parts, num_classes, decoder.DROPOUT, aux_channels)
    segmenter.backbone.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT, config.TRAIN.RECOMPUTE)
    return segmenter


def load_to_start(segmenter: Segmenter, state_dict: Mapping[str, Tensor], source: str) -> list[str]:
    """As `load_around_backbone`: a classifier's weights, or those of a segmenter of perhaps other classes."""
    return load_around_backbone(segmenter, segmenter.backbone, _BACKBONE, _OF_CLASSES, state_dict, source)
