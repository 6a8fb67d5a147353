"""Configuration -> a detector of torchvision's on our backbone, and the weights that it may start from."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import LevelMapper
from yacs.config import CfgNode

from detection.batch import Batch, Objects
from detection.config import GROUPS
from models.build import backbone_layers, build_model, load_around_backbone
from models.groupmixformer import GroupMixFormer
from utils.errors import UserError

_BODY = "detector.backbone.body."  # of the names of the backbone's tensors
_OF_CLASSES = (  # of the names of the tensors whose shapes depend on the number of classes
    "detector.head.classification_head.cls_logits.",
    "detector.roi_heads.box_predictor.",
    "detector.roi_heads.mask_predictor.mask_fcn_logits.",
)
_OCTAVE = (1, 2 ** (1 / 3), 2 ** (2 / 3))  # RetinaNet has anchors of three sizes on a level


class Anchors(AnchorGenerator):
    """torchvision's anchors, in float32 where feature maps are bf16, which has no numbers between 1024 and 1032."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Puts the anchors of one cell on a device, in a type of at least 32 bits."""
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


class ExactMasks(GeneralizedRCNNTransform):
    """torchvision's, but that masks are put into their boxes as these are.

    torchvision rounds boxes to whole pixels, by which right masks of objects of 16 pixels overlap them by 0.88 only.
    """

    def postprocess(
        self, result: list[Objects], image_shapes: list[tuple[int, int]], original_image_sizes: list[tuple[int, int]]
    ) -> list[Objects]:
        """What was found in scaled images -> in the images themselves."""
        small = [objects.pop("masks", None) for objects in result]
        found = super().postprocess(result, image_shapes, original_image_sizes)
        for objects, masks, size in zip(found, small, original_image_sizes, strict=False):  # in training there are none
            if masks is not None:
                objects["masks"] = paste_masks(masks, objects["boxes"], size)
        return found


def paste_masks(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Masks [N, 1, S, S], each of which covers its box -> [N, 1, H, W], 0 outside of the boxes.

    Args:
        masks: From 0 to 1.
        boxes: [N, 4] as x1, y1, x2, y2 in pixels.
        size: Height and width of the image.
    """
    pasted = masks.new_zeros(len(masks), 1, *size)
    for whole, mask, (left, top, right, bottom) in zip(pasted, masks, boxes.tolist(), strict=True):
        rows, columns = (
            range(max(math.floor(start), 0), min(math.ceil(end), length))  # scaled back, a box may end an ulp outside
            for start, end, length in ((top, bottom, size[0]), (left, right, size[1]))
        )
        y, x = (
            (torch.arange(pixels.start, pixels.stop, device=masks.device) + 0.5 - start) / (end - start) * 2 - 1
            for pixels, start, end in ((rows, top, bottom), (columns, left, right))
        )  # middles of pixels, from -1 to 1 in the box
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        values = F.grid_sample(mask[None].float(), grid[None], align_corners=False)[0]
        whole[:, rows.start : rows.stop, columns.start : columns.stop] = values
    return pasted


class Pyramid(nn.Module):
    """The backbone and a feature pyramid on its last stages: [B, C, H, W] -> maps [B, channels, H/s, W/s] by name.

    Args:
        body: The backbone, whose classifier goes.
        first: The first stage that the pyramid stands on, from 0.
        channels: Width of the pyramid.
        extra: What adds coarser levels.
    """

    def __init__(self, body: GroupMixFormer, first: int, channels: int, extra: ExtraFPNBlock) -> None:
        super().__init__()
        self.body, self.out_channels = body, channels
        self.stages = body.prune_intermediate_layers(list(range(first, len(body.stages))), prune_norm=True)
        widths = [body.feature_info[stage]["num_chs"] for stage in self.stages]
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in widths)  # what a stage gives is a sum of residuals
        self.fpn = FeaturePyramidNetwork(widths, channels, extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The levels, from the finest to the coarsest."""
        maps = self.body.forward_intermediates(images, self.stages, intermediates_only=True)
        named = ((str(level), norm(x)) for level, (norm, x) in enumerate(zip(self.norms, maps, strict=True)))
        return self.fpn(OrderedDict(named))


class Detector(nn.Module):
    """A detector that numbers classes from 0, in one call for training and evaluation.

    Args:
        detector: torchvision's, on a `Pyramid`.
        num_classes: Number of classes.
        freeze_statistics: Whether batch norms of the backbone normalise by their running statistics in training too.
    """

    def __init__(
        self, detector: FasterRCNN | MaskRCNN | RetinaNet, num_classes: int, freeze_statistics: bool = False
    ) -> None:
        super().__init__()
        self.detector, self.num_classes, self.freeze_statistics = detector, num_classes, freeze_statistics
        self._first = 0 if isinstance(detector, RetinaNet) else 1  # the others have the background first
        for head in _heads(detector):
            head.register_forward_hook(in_float32)

    @property
    def body(self) -> GroupMixFormer:
        """The backbone."""
        return self.detector.backbone.body

    def train(self, mode: bool = True) -> "Detector":
        """As `nn.Module.train`, but frozen statistics stay frozen."""
        super().train(mode)
        if self.freeze_statistics:
            for module in self.body.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer-wise learning rate decay: the backbone's, and all else as the last one."""
        return backbone_layers(self.body, _BODY, coarse)

    def forward(self, batch: Batch) -> dict[str, Tensor] | list[Objects]:
        """Finds objects, or learns to.

        Args:
            batch: Images of values from 0 to 1, [C, H, W] of any sizes; in training with what is in them.

        Returns:
            In training the losses by name. Else what is found in each image, the surest first: 'boxes' [N, 4] as x1,
            y1, x2, y2 in pixels, 'labels' [N], 'scores' [N], and of Mask R-CNN 'masks' [N, 1, H, W] from 0 to 1.
        """
        if self.training:
            return self.detector(batch.images, [_renumber(objects, self._first) for objects in batch.targets])
        return [_renumber(objects, -self._first) for objects in self.detector(batch.images)]


def _renumber(objects: Objects, by: int) -> Objects:
    return {**objects, "labels": objects["labels"] + by}


def _heads(detector: nn.Module) -> list[nn.Module]:
    if isinstance(detector, RetinaNet):
        return [detector.head]
    roi_heads = detector.roi_heads
    return [head for head in (detector.rpn.head, roi_heads.box_predictor, roi_heads.mask_predictor) if head is not None]


def in_float32(_head: nn.Module, _inputs: Any, outputs: Any) -> Any:
    """A forward hook that gives out nested tensors as float32, as torchvision computes boxes in the type that heads
    answer in."""
    return tree_map(Tensor.float, outputs)


def build_detector(config: CfgNode, num_classes: int) -> Detector:
    """The configured detector with fresh weights.

    Raises:
        UserError: If the settings cannot make a network.
    """
    settings, data = config.MODEL.DETECTOR, config.DATA
    is_retinanet = settings.NAME == "retinanet"
    channels, body = settings.FPN_CHANNELS, build_model(config, 0)
    extra = LastLevelP6P7(channels, channels) if is_retinanet else LastLevelMaxPool()
    pyramid = Pyramid(body, int(is_retinanet), channels, extra)
    levels = len(pyramid.stages) + (2 if is_retinanet else 1)
    if len(settings.ANCHOR_SIZES) != levels:
        raise UserError(
            f"MODEL.DETECTOR.ANCHOR_SIZES has {len(settings.ANCHOR_SIZES)} numbers but {settings.NAME} has {levels} "
            "levels: give one for each"
        )
    octave = _OCTAVE if is_retinanet else (1,)
    anchors = Anchors(
        tuple(tuple(int(size * step) for step in octave) for size in settings.ANCHOR_SIZES),
        (tuple(settings.ANCHOR_RATIOS),) * levels,
    )
    shared = {
        "min_size": tuple(data.SHORT_SIDES),
        "max_size": data.LONG_SIDE,
        "image_mean": data.MEAN,
        "image_std": data.STD,
    }
    if is_retinanet:
        norm = partial(nn.GroupNorm, GROUPS) if settings.HEAD_NORM else None
        head = RetinaNetHead(channels, len(octave) * len(settings.ANCHOR_RATIOS), num_classes, norm)
        detector: nn.Module = RetinaNet(
            pyramid,
            num_classes,
            anchor_generator=anchors,
            head=head,
            score_thresh=settings.SCORE_THRESHOLD,
            nms_thresh=settings.NMS_THRESHOLD,
            detections_per_img=settings.MAX_DETECTIONS,
            **shared,
        )
    else:
        detector = _build_rcnn(settings, pyramid, num_classes, anchors, shared)
    return Detector(detector, num_classes, config.MODEL.FREEZE_STATISTICS)


def _build_rcnn(
    settings: CfgNode, pyramid: Pyramid, num_classes: int, anchors: AnchorGenerator, shared: Mapping[str, Any]
) -> FasterRCNN | MaskRCNN:
    channels, width, outputs = settings.FPN_CHANNELS, settings.HEAD_WIDTH, num_classes + 1
    kind: type[FasterRCNN] = FasterRCNN
    masks: dict[str, nn.Module] = {}
    if settings.NAME == "mask_rcnn":
        kind = MaskRCNN
        masks = {
            "mask_roi_pool": _region_pool(pyramid, 14),
            "mask_head": MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
            "mask_predictor": MaskRCNNPredictor(channels, channels, outputs),
        }
    detector = kind(
        pyramid,
        rpn_anchor_generator=anchors,
        rpn_batch_size_per_image=settings.RPN_SAMPLES,
        rpn_pre_nms_top_n_train=2 * settings.PROPOSALS,
        rpn_post_nms_top_n_train=settings.PROPOSALS,
        rpn_pre_nms_top_n_test=settings.PROPOSALS,
        rpn_post_nms_top_n_test=settings.PROPOSALS,
        box_roi_pool=_region_pool(pyramid, 7),
        box_head=TwoMLPHead(channels * 7 * 7, width),
        box_predictor=FastRCNNPredictor(width, outputs),
        box_batch_size_per_image=settings.BOX_SAMPLES,
        box_score_thresh=settings.SCORE_THRESHOLD,
        box_nms_thresh=settings.NMS_THRESHOLD,
        box_detections_per_img=settings.MAX_DETECTIONS,
        **masks,
        **shared,
    )
    detector.transform = ExactMasks(**shared)
    return detector


def _region_pool(pyramid: Pyramid, size: int) -> MultiScaleRoIAlign:
    """torchvision's, told the strides of the levels, which it would guess for good from the first image that it sees:
    a low one, such as of 40 pixels that are padded to 64, would have it look at the wrong places of all."""
    strides = [pyramid.body.feature_info[stage]["reduction"] for stage in pyramid.stages]
    pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], size, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(*(int(math.log2(stride)) for stride in (strides[0], strides[-1])))
    return pool


class SumOfLosses(nn.Module):
    """What torchvision's detectors answer in training, added up."""

    def forward(self, losses: Mapping[str, Tensor], targets: Any) -> Tensor:
        """The sum; the targets were the model's already."""
        return torch.stack(list(losses.values())).sum()


def load_to_start(network: Detector, state_dict: Mapping[str, Tensor], source: str) -> list[str]:
    """As `load_around_backbone`: a classifier's weights, or those of a detector of perhaps other classes."""
    return load_around_backbone(network, network.body, _BODY, _OF_CLASSES, state_dict, source)
