"""The segmenter: any size, the configured backbone inside, weights from classifiers and segmenters."""

import copy

import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import torch
from helpers_segmentation import FPN, tiny
from helpers_unit import ROOT, examples
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import models  # noqa: F401  (registers the variants)
from models import GroupMixFormer
from models.published import to_published
from segmentation.config import default_config
from segmentation.model import Segmenter, build_segmenter, load_to_start
from segmentation.task import segmentation
from utils import checkpoint
from utils.config import load_config
from utils.errors import UserError
from utils.seeding import seed_everything

DIMS = {"embed_dims": (40, 40, 40, 40), "depths": (1, 1, 1, 1), "mlp_ratios": (2, 2, 2, 2)}


def segmenter(classes=3, **values):
    seed_everything(0)
    return build_segmenter(tiny(**values), classes)


def noise(height, width, channels=3, images=1):
    return torch.randn(images, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def both():
    return {"upernet": segmenter().eval(), "fpn": segmenter(**FPN).eval()}


@pytest.mark.parametrize("name", ["upernet", "fpn"])
@examples(6)
@given(height=st.integers(1, 70), width=st.integers(1, 70))
def test_images_of_any_size_get_logits_of_every_pixel(both, name, height, width):
    with torch.inference_mode():
        assert both[name](noise(height, width)).shape == (1, 3, height, width)


@pytest.mark.parametrize("name", ["upernet", "fpn"])
def test_logits_are_the_decoders_enlarged(both, name):
    network, images = both[name], noise(64, 96)
    with torch.inference_mode():
        small = network.head(network.decoder(network.encoder(images)))
        assert small.shape[-2:] == (16, 24)
        wanted = torch.nn.functional.interpolate(small, size=(64, 96), mode="bilinear")
        assert torch.equal(network(images), wanted)


def test_the_library_takes_the_registered_backbone_by_its_name():
    network = smp.UPerNet("tu-groupmixformer_miny", encoder_weights=None, classes=2, decoder_channels=8).eval()
    with torch.inference_mode():
        assert network(noise(64, 32)).shape == (1, 2, 64, 32)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["miny", "tiny", "small", "base", "large"])
def test_the_variants_files_hold_the_registered_networks(variant):
    config = load_config(ROOT / f"configs/segmentation/upernet_{variant}.yaml", default_config)
    with torch.device("meta"):
        network = build_segmenter(config, 150)
        registered = smp.create_model("upernet", f"tu-groupmixformer_{variant}", encoder_weights=None)
    sizes = [(name, value.shape) for name, value in network.backbone.state_dict().items()]
    wanted = [value.shape for value in registered.encoder.state_dict().values()]
    assert [shape for _, shape in sizes] == wanted


def test_every_parameter_learns_from_what_training_answers():
    network = segmenter().train()
    logits, auxiliary = network(noise(48, 48, images=2))
    assert logits.shape == auxiliary.shape == (2, 3, 48, 48)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_a_weight_of_zero_leaves_out_the_auxiliary_head():
    network = segmenter(MODEL__DECODER__AUX_WEIGHT=0.0).train()
    assert network(noise(48, 48, images=2)).shape == (2, 3, 48, 48)
    assert not any("auxiliary" in name for name in network.state_dict())


def test_recomputation_changes_neither_gradients_nor_running_statistics():
    states = []
    for use in (False, True):
        network = segmenter(TRAIN__USE_CHECKPOINT=use).double().train()
        seed_everything(3)
        network(noise(48, 48, images=2).double())[0].square().mean().backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        states.append({**network.state_dict(), **{f"grad {name}": value for name, value in gradients.items()}})
    assert states[0].keys() == states[1].keys()
    assert all(torch.allclose(states[0][name].double(), states[1][name].double(), atol=1e-12) for name in states[0])


def test_layers_learn_slower_towards_the_image_and_the_decoder_as_configured():
    network = segmenter()
    groups = param_groups_layer_decay(network, 0.01, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    scales = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scales["decoder.psp.out_conv.0.weight"] == scales["head.0.weight"] == scales["auxiliary.2.weight"] == 1
    stages = [scales[f"encoder.model.model.stages.{stage}.blocks.0.attn.qkv.weight"] for stage in range(4)]
    assert scales["encoder.model.model.stem.conv1.weight"] < stages[0] < stages[1] < stages[2] < stages[3] < 1
    assert len(scales) == len(names)


def test_norms_and_biases_do_not_decay():
    network = segmenter()
    decay = {group["weight_decay"]: group["params"] for group in param_groups_weight_decay(network, 0.01)}
    assert all(parameter.ndim > 1 for parameter in decay[0.01])
    norms = [module for module in network.modules() if "Norm" in type(module).__name__]
    spared = {id(parameter) for parameter in decay[0.0]}
    assert len(norms) > 20
    assert all(id(parameter) in spared for norm in norms for parameter in norm.parameters(recurse=False))


# Weights to start from


def classifier():
    seed_everything(7)
    return GroupMixFormer(num_classes=5, **DIMS)


def save_ours(path, network):
    torch.save({"model": network.state_dict()}, path)


def save_published(path, network):
    torch.save({"model": to_published(network.state_dict())}, path)


def save_safetensors(path, network):
    safetensors.torch.save_file(network.state_dict(), path)


@pytest.mark.parametrize(
    ("save", "name"), [(save_ours, "a.pth"), (save_published, "a.pth"), (save_safetensors, "a.safetensors")]
)
def test_a_classifiers_weights_fill_the_backbone_but_for_norm_and_head(tmp_path, save, name):
    source, network = classifier(), segmenter()
    before = copy.deepcopy(network.state_dict())
    save(tmp_path / name, source)
    (sentence,) = load_to_start(network, checkpoint.load(tmp_path / name)["model"], name)
    assert sentence == f"of {name} the backbone is taken, without final norm and head: all else starts afresh"
    for key, value in network.backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])
    outside = [key for key in before if not key.startswith("encoder.")]
    assert all(torch.equal(before[key], network.state_dict()[key]) for key in outside)


def test_a_classifier_of_another_size_is_refused_with_its_tensors_names():
    weights = GroupMixFormer(num_classes=5, **{**DIMS, "embed_dims": (40, 40, 80, 40)}).state_dict()
    with pytest.raises(UserError, match=r"w\.pth does not fit the network: stages\.2\."):
        load_to_start(segmenter(), weights, "w.pth")


def test_a_classifier_that_lacks_a_tensor_is_refused():
    weights = classifier().state_dict()
    del weights["stages.1.blocks.0.attn.qkv.weight"]
    with pytest.raises(UserError, match=r"it lacks stages\.1\.blocks\.0\.attn\.qkv\.weight"):
        load_to_start(segmenter(), weights, "w.pth")


def test_a_segmenters_weights_load_wholly():
    source, network = segmenter(), segmenter(MODEL__GMA__DROP_PATH_RATE=0.0)
    for value in source.state_dict().values():
        value.add_(1)
    assert load_to_start(network, source.state_dict(), "w.pth") == []
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in network.state_dict().items())


def test_a_segmenter_of_other_classes_keeps_all_but_the_classifiers():
    source, network = segmenter(classes=4), segmenter(classes=3)
    fresh = network.state_dict()["head.0.weight"].clone()
    for value in source.state_dict().values():
        value.add_(1)
    sentences = load_to_start(network, source.state_dict(), "w.pth")
    assert sentences == ["w.pth is of other classes: all of it is taken but auxiliary.2, head.0"]
    assert torch.equal(network.state_dict()["head.0.weight"], fresh)
    kept = "decoder.psp.out_conv.0.weight"
    assert torch.equal(network.state_dict()[kept], source.state_dict()[kept])


def test_a_segmenter_with_another_decoder_is_refused():
    other = segmenter(**FPN).state_dict()
    with pytest.raises(UserError, match=r"w\.pth does not fit the network: it lacks decoder\."):
        load_to_start(segmenter(), other, "w.pth")


def test_settings_that_make_no_network_are_refused():
    with pytest.raises(UserError, match=r"MODEL\.GMA: width 41"):
        segmenter(MODEL__GMA__EMBEDDING_DIMS=[41, 40, 40, 40])


def test_compilation_takes_the_backbones_blocks():
    network = segmenter()
    segmentation().compile(network)
    assert isinstance(network, Segmenter)
    parts = [block.attn for stage in network.backbone.stages for block in stage.blocks]
    assert all(getattr(part, "_compiled_call_impl", None) for part in parts[1:])
