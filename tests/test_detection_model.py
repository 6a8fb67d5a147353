"""Detectors on the backbone: their shapes, what they learn from, what they answer, and what they start from."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from helpers_detection import configured
from helpers_unit import ROOT, equal
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet, maskrcnn_resnet50_fpn, retinanet_resnet50_fpn

from detection.batch import Batch, finish
from detection.config import check, default_config
from detection.model import Detector, SumOfLosses, build_detector, load_to_start, paste_masks
from detection.task import detection
from models import GroupMixFormer
from models.published import to_published
from utils.config import load_config
from utils.errors import UserError
from utils.optim import build_optimizer

DETECTORS = ("mask_rcnn", "faster_rcnn", "retinanet")
RETINANET = ("MODEL.DETECTOR.NAME", "retinanet")
CONFIGS = sorted(path.name for path in (ROOT / "configs" / "detection").glob("*.yaml") if path.name != "coco_1x.yaml")


def build(*options, classes=3, seed=0):
    torch.manual_seed(seed)
    return build_detector(configured(*options), classes)


def objects(*boxes, label=1, size=(40, 48)):
    """What is in an image of [height, width]."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    wanted = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": wanted, "labels": torch.full((len(boxes),), label), "masks": masks}


def batch(*targets):
    """Images of noise of two sizes with what is in them."""
    generator = torch.Generator().manual_seed(1)
    sizes = [tuple(target["masks"].shape[1:]) for target in targets]
    images = [torch.randint(256, (3, *size), generator=generator).byte() for size in sizes]
    return finish(Batch(images, list(targets)))


MIXED = (objects((4, 5, 20, 30), (22, 8, 44, 30)), objects(size=(48, 40)))


def on_meta(name):
    """The detector of a configuration's file, without memory for its tensors."""
    config = load_config(ROOT / "configs" / "detection" / name, default_config)
    check(config)
    with torch.device("meta"):
        return build_detector(config, 80), config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_builds_a_detector_of_its_kind_on_its_backbone(name):
    network, config = on_meta(name)
    kinds = {"mask_rcnn": MaskRCNN, "faster_rcnn": FasterRCNN, "retinanet": RetinaNet}
    assert type(network.detector) is kinds[config.MODEL.DETECTOR.NAME]
    assert [stage.patch_embed.norm.num_features for stage in network.body.stages] == config.MODEL.GMA.EMBEDDING_DIMS
    assert [len(stage.blocks) for stage in network.body.stages] == config.MODEL.GMA.SERIAL_DEPTHS


@pytest.mark.parametrize(("name", "finest"), [("mask_rcnn", 4), ("retinanet", 8)])
def test_a_pyramid_has_five_levels_each_half_as_fine_as_the_one_before(name, finest):
    network, _ = on_meta(f"{name}_miny.yaml")
    maps = network.detector.backbone(torch.zeros(1, 3, 128, 192, device="meta"))
    strides = [finest * 2**level for level in range(5)]
    assert [tuple(x.shape) for x in maps.values()] == [(1, 256, 128 // s, -(-192 // s)) for s in strides]


def test_the_recipe_is_coco_1x():
    config = load_config(ROOT / "configs" / "detection" / "mask_rcnn_small.yaml", default_config)
    train, data = config.TRAIN, config.DATA
    assert (train.OPTIMIZER.NAME, train.BASE_LR, train.WEIGHT_DECAY, train.LR_BATCH) == ("adamw", 1e-4, 0.05, 16)
    assert (train.EPOCHS, train.LR_SCHEDULER.MILESTONES) == (12, [8, 11])
    assert (data.SHORT_SIDES, data.LONG_SIDE) == ([800], 1333)
    assert train.CLIP_GRAD == 0


@pytest.mark.parametrize("name", ["mask_rcnn", "retinanet"])
def test_default_anchors_and_heads_are_those_of_torchvisions_builders(name):
    config = load_config(ROOT / "configs" / "detection" / f"{name}_miny.yaml", default_config)
    builder = maskrcnn_resnet50_fpn if name == "mask_rcnn" else retinanet_resnet50_fpn
    theirs = builder(weights=None, weights_backbone=None, num_classes=81 if name == "mask_rcnn" else 80)
    ours = build_detector(config, 80).detector
    generators = [m.rpn.anchor_generator if name == "mask_rcnn" else m.anchor_generator for m in (ours, theirs)]
    assert generators[0].sizes == generators[1].sizes and generators[0].aspect_ratios == generators[1].aspect_ratios
    if name == "mask_rcnn":  # twice as many boxes of a level to choose from in training, as COCO's recipes have it
        assert ours.rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
        assert ours.rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    shapes = [
        {key: value.shape for key, value in m.state_dict().items() if not key.startswith("backbone.")}
        for m in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    kept = ("min_size", "max_size", "image_mean", "image_std", "size_divisible")
    theirs_kept, ours_kept = ([getattr(m.transform, key) for key in kept] for m in (theirs, ours))
    assert list(map(str, ours_kept)) == list(map(str, theirs_kept))


@pytest.mark.parametrize("name", DETECTORS)
def test_every_parameter_learns_from_images_of_which_one_has_no_object(name):
    network = build("MODEL.DETECTOR.NAME", name, "MODEL.GMA.DROP_PATH_RATE", 0.0)
    losses = network(batch(*MIXED))
    SumOfLosses()(losses, None).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", DETECTORS)
def test_images_without_any_object_give_finite_losses_and_every_gradient(name):
    network = build("MODEL.DETECTOR.NAME", name)
    losses = network(batch(objects(), objects(size=(48, 40))))
    SumOfLosses()(losses, None).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("name", DETECTORS)
def test_what_is_found_is_in_pixels_of_the_image_and_numbered_from_0(name):
    network = build("MODEL.DETECTOR.NAME", name, "MODEL.DETECTOR.SCORE_THRESHOLD", 0.0, classes=2).eval()
    with torch.inference_mode():
        found = network(batch(*MIXED))
    for objects_, (height, width) in zip(found, [(40, 48), (48, 40)], strict=True):
        boxes = objects_["boxes"]
        assert len(boxes) > 0 and set(objects_["labels"].tolist()) == {0, 1}
        assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= width).all() and (boxes[:, [1, 3]] <= height).all()
        if name == "mask_rcnn":
            assert objects_["masks"].shape == (len(boxes), 1, height, width)


@pytest.mark.parametrize("height", [40, 66])  # padded to 64 and 96
def test_what_is_found_does_not_depend_on_the_image_that_was_seen_first(height):
    options = ("DATA.SHORT_SIDES", "[96]", "DATA.LONG_SIDE", 128, "MODEL.DETECTOR.SCORE_THRESHOLD", 0.0)
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))
    fresh, other = build(*options).eval(), build(*options).eval()
    with torch.inference_mode():
        other(Batch([image[:, :height]], []))
        assert equal(fresh(Batch([image], [])), other(Batch([image], [])))


@pytest.mark.parametrize(("name", "shift"), [("mask_rcnn", 1), ("faster_rcnn", 1), ("retinanet", 0)])
def test_classes_are_numbered_from_0_around_detectors_whose_first_is_the_background(name, shift, monkeypatch):
    network, seen = build("MODEL.DETECTOR.NAME", name), []

    def forward(images, targets=None):
        seen.append(targets)
        return [{"labels": torch.tensor([shift, shift + 2])}]

    monkeypatch.setattr(network.detector, "forward", forward)
    network(batch(objects((1, 1, 9, 9), label=2)))
    assert seen[0][0]["labels"].tolist() == [2 + shift]
    assert network.eval()(batch(objects()))[0]["labels"].tolist() == [0, 2]


def test_retinanets_heads_have_group_norms_where_they_are_asked_for():
    plain, normed = (
        build(*RETINANET, "MODEL.DETECTOR.FPN_CHANNELS", 32, "MODEL.DETECTOR.HEAD_NORM", on) for on in (False, True)
    )
    for network, wanted in ((plain, 0), (normed, 8)):
        assert sum(isinstance(module, nn.GroupNorm) for module in network.detector.head.modules()) == wanted
    assert {name for name in plain.state_dict() if "backbone" in name} <= set(normed.state_dict())


@pytest.mark.parametrize("options", [("FPN_CHANNELS", 48), ("NAME", "mask_rcnn", "FPN_CHANNELS", 32)])
def test_group_norms_that_cannot_be_are_refused(options):
    words = [f"MODEL.DETECTOR.{word}" if word in ("FPN_CHANNELS", "NAME") else word for word in options]
    with pytest.raises(UserError, match="HEAD_NORM is for retinanet with a multiple of 32 FPN_CHANNELS"):
        check(configured(*RETINANET, "MODEL.DETECTOR.HEAD_NORM", True, *words))


def test_the_network_takes_pixels_from_0_to_1_and_objects_as_they_are():
    pixels, objects = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1), {"labels": torch.tensor([1])}
    finished = finish(Batch([pixels], [objects]))
    assert torch.equal(finished.images[0].flatten(), torch.tensor([0, 0.2, 1]))
    assert finished.targets == [objects]


def test_losses_are_added_up():
    losses = {"one": torch.tensor(1.5), "other": torch.tensor(2.0)}
    assert SumOfLosses()(losses, None) == 3.5


# The backbone in it


@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_of_the_backbones_norms_follow_the_images_unless_they_are_frozen(frozen):
    network = build("MODEL.FREEZE_STATISTICS", frozen, *RETINANET).train()
    before = copy.deepcopy(dict(network.named_buffers()))
    network(batch(*MIXED))
    changed = {name for name, value in network.named_buffers() if not torch.equal(value, before[name])}
    assert changed == (set() if frozen else set(before))
    norms = [m for m in network.body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.weight.requires_grad for norm in norms) and network.training


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        (["MODEL.FREEZE_STATISTICS", True], True),
        (["MODEL.FREEZE_STATISTICS", False], False),
        (["MODEL.FREEZE_STATISTICS", True, "MODEL.PRETRAINED", "weights.pth"], False),
        (["MODEL.FREEZE_STATISTICS", True, "MODEL.RESUME", "last.pth"], False),
    ],
    ids=["frozen", "not frozen", "pretrained", "resumed"],
)
def test_frozen_statistics_are_warned_of_where_there_are_none(caplog, options, warns):
    config = configured(*options)
    detection(config).build_network(config, SimpleNamespace(classes=["disc"]))
    assert ("fresh weights have none" in caplog.text) is warns


def test_checkpointed_blocks_give_the_same_gradients_and_count_images_once():
    options = (*RETINANET, "MODEL.GMA.DROP_PATH_RATE", 0.0, "DATA.SHORT_SIDES", "[48]")
    plain, frugal = build(*options), build(*options, "TRAIN.USE_CHECKPOINT", True)
    frugal.load_state_dict(plain.state_dict())
    for network in (plain, frugal):
        SumOfLosses()(network(batch(*MIXED)), None).backward()
    for (name, one), other in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    assert equal(dict(plain.named_buffers()), dict(frugal.named_buffers()))
    assert any(block.recompute for stage in frugal.body.stages for block in stage.blocks)


def test_layer_decay_slows_the_backbone_down_and_nothing_else():
    config = configured(*RETINANET, "TRAIN.LAYER_DECAY", 0.5)
    network = build_detector(config, 3)
    scales = {
        id(parameter): group["lr_scale"]
        for group in build_optimizer(config, network, 1).param_groups
        for parameter in group["params"]
    }
    by_name = {name: scales[id(parameter)] for name, parameter in network.named_parameters()}
    body = "detector.backbone.body."
    assert {scale for name, scale in by_name.items() if not name.startswith(body)} == {1.0}
    layers = (
        "stem.conv1",
        "stages.0.blocks.0.attn.proj",
        "stages.1.patch_embed.conv_pw",
        "stages.3.blocks.0.attn.proj",
    )
    assert [by_name[f"{body}{layer}.weight"] for layer in layers] == [0.5**5, 0.5**4, 0.5**3, 0.5]


def test_boxes_are_computed_in_float32_under_autocast():
    network = build("MODEL.DETECTOR.SCORE_THRESHOLD", 0.0, "DATA.SHORT_SIDES", "[64]", "DATA.LONG_SIDE", 96).eval()
    image = torch.rand(3, 600, 900, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        (found,) = network(Batch([image], []))
    assert {value.dtype for name, value in found.items() if name != "labels"} == {torch.float32}
    large = found["boxes"][found["boxes"] > 256]
    assert len(large) > 10 and (large != large.bfloat16().float()).any()


@pytest.mark.parametrize("name", DETECTORS)
def test_anchors_are_the_same_under_autocast(name):
    network = build("MODEL.DETECTOR.NAME", name, "DATA.SHORT_SIDES", "[64]", "DATA.LONG_SIDE", 1333).eval()
    detector, answers = network.detector, []
    generator = detector.anchor_generator if name == "retinanet" else detector.rpn.anchor_generator
    generator.register_forward_hook(lambda module, inputs, anchors: answers.append(anchors))
    for enabled in (False, True):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            network(Batch([torch.rand(3, 64, 1300)], []))
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=0)


# Masks


def disc(x, y, diameter, size):
    """The mask [H, W] of a disc."""
    rows, columns = (torch.arange(length) + 0.5 for length in size)
    return ((rows[:, None] - y) ** 2 + (columns - x) ** 2 <= diameter**2 / 4).byte()


@pytest.mark.parametrize("diameter", [12, 20, 32])
def test_a_right_mask_covers_its_object_wherever_that_lies(diameter):
    transform = build().eval().detector.transform
    for x, y in ((20.5, 30.2), (31.9, 24.0), (40.3, 20.7), (24.6, 39.5)):
        truth, half = disc(x, y, diameter, (60, 60)), diameter / 2
        boxes = torch.tensor([[x - half, y - half, x + half, y + half]])
        fine = disc(28, 28, 56, (56, 56)).float()[None, None]
        masks = nn.functional.avg_pool2d(fine, 2)  # share of each of the mask's pixels
        (found,) = transform.postprocess([{"boxes": 2 * boxes, "masks": masks}], [(120, 120)], [(60, 60)])
        mask = found["masks"][0, 0] >= 0.5
        assert torch.equal(found["boxes"], boxes)
        assert (mask & truth.bool()).sum() / (mask | truth.bool()).sum() > 0.95


def test_masks_are_interpolated_at_the_middles_of_their_boxes_pixels():
    masks = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[1.3, 2.8, 9.1, 7.4], [0, 0, 12, 10], [11.2, 8.9, 12, 10], [-1e-6, 4.2, 4.3, 10.000001]])
    wanted = torch.zeros(4, 1, 10, 12)
    for mask, (left, top, right, bottom), pixels in zip(masks, boxes.tolist(), wanted, strict=True):
        for row in range(int(top), min(math.ceil(bottom), 10)):
            for column in range(int(left), math.ceil(right)):
                y, x = (row + 0.5 - top) / (bottom - top) * 5 - 0.5, (column + 0.5 - left) / (right - left) * 5 - 0.5
                pixels[0, row, column] = sum(
                    mask[0, i, j] * max(1 - abs(y - i), 0) * max(1 - abs(x - j), 0) for i in range(5) for j in range(5)
                )
    torch.testing.assert_close(paste_masks(masks, boxes, (10, 12)), wanted)
    assert paste_masks(masks[:0], boxes[:0], (10, 12)).shape == (0, 1, 10, 12)
    assert paste_masks(masks.bfloat16(), boxes, (10, 12)).dtype == torch.bfloat16


# What it starts from


@pytest.fixture
def classifier():
    torch.manual_seed(7)
    return GroupMixFormer(embed_dims=(40,) * 4, depths=(1,) * 4, mlp_ratios=(1,) * 4, num_classes=11)


@pytest.mark.parametrize("naming", [dict, to_published], ids=["ours", "published"])
def test_a_classifiers_weights_start_the_backbone_without_its_norm_and_head(classifier, naming):
    network = build()
    (sentence,) = load_to_start(network, naming(classifier.state_dict()), "w.pth")
    wanted = {name: value for name, value in classifier.state_dict().items() if not name.startswith(("norm.", "head."))}
    assert equal(dict(network.body.state_dict()), wanted)
    assert sentence == "of w.pth the backbone is taken, without final norm and head: all else starts afresh"


def test_a_detector_of_grey_images_starts_from_a_classifier_of_colour_images(classifier):
    network = build("MODEL.GMA.IN_DIM", 1, "DATA.MEAN", "[0.5]", "DATA.STD", "[0.2]")
    _, adapted = load_to_start(network, classifier.state_dict(), "w.pth")
    assert adapted == "w.pth takes 3 channels, the network 1: the first convolution was adapted as timm does"
    torch.testing.assert_close(network.body.stem.conv1.weight, classifier.stem.conv1.weight.sum(1, keepdim=True))


def test_a_classifier_that_does_not_fit_is_refused_by_the_names_of_its_tensors(classifier):
    state = classifier.state_dict()
    del state["stem.norm2.bias"]
    with pytest.raises(UserError, match=r"w\.pth does not fit the network: it lacks stem\.norm2\.bias"):
        load_to_start(build(), state, "w.pth")
    with pytest.raises(UserError, match="which the network has not"):
        load_to_start(build(), classifier.state_dict() | {"stem.extra": torch.zeros(1)}, "w.pth")


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detectors_weights_start_another_whole_but_for_what_depends_on_the_classes(name):
    options = ("MODEL.DETECTOR.NAME", name)
    other, network = build(*options, classes=5), build(*options, seed=1)
    fresh = copy.deepcopy(network.state_dict())
    (sentence,) = load_to_start(network, other.state_dict(), "d.pth")
    loaded, given = network.state_dict(), other.state_dict()
    afresh = {key for key in loaded if loaded[key].shape != given[key].shape}
    assert all(torch.equal(value, fresh[key] if key in afresh else given[key]) for key, value in loaded.items())
    assert 2 <= len(afresh) <= 6 and all(key.rpartition(".")[0] in sentence for key in afresh)
    assert load_to_start(network, build(*options, seed=2).state_dict(), "d.pth") == []


def test_a_detector_of_another_kind_is_refused():
    with pytest.raises(UserError, match="does not fit the network"):
        load_to_start(build(), build(*RETINANET).state_dict(), "d.pth")


def test_a_number_of_anchor_sizes_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="ANCHOR_SIZES has 2 numbers but mask_rcnn has 5 levels"):
        build("MODEL.DETECTOR.ANCHOR_SIZES", "[8, 16]")


def test_a_detector_of_grey_images_is_built(classifier):
    network = build("MODEL.GMA.IN_DIM", 1, "DATA.MEAN", "[0.5]", "DATA.STD", "[0.2]").eval()
    assert isinstance(network, Detector)
    with torch.inference_mode():
        (found,) = network(Batch([torch.rand(1, 40, 48)], []))
    assert found["boxes"].shape[1] == 4
