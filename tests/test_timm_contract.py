"""The network as timm, and the tools around PyTorch, expect it."""

import itertools

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from timm.models import group_parameters
from timm.models._manipulate import adapt_input_conv
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import models
from models.published import to_published
from tests.fixtures.fill import fill, images

VARIANTS = {
    "groupmixformer_miny": [40, 80, 160, 160],
    "groupmixformer_tiny": [80, 160, 200, 240],
    "groupmixformer_small": [80, 160, 320, 320],
    "groupmixformer_base": [200, 240, 320, 480],
    "groupmixformer_large": [240, 320, 360, 480],
}
DIMS = (40, 80, 40, 120)
SMALL = {"embed_dims": DIMS, "depths": (1, 1, 2, 1), "mlp_ratios": (2, 1, 2, 1)}


def small_model(**kwargs) -> models.GroupMixFormer:
    torch.manual_seed(0)
    return models.GroupMixFormer(**{**SMALL, "num_classes": 7, **kwargs})


def create_small(**kwargs) -> nn.Module:
    """A registered network made small, as timm creates it."""
    torch.manual_seed(0)
    return timm.create_model("groupmixformer_small", **{**SMALL, **kwargs})


class TestRegistry:
    def test_the_variants_are_registered(self):
        assert set(timm.list_models("groupmixformer*")) == set(VARIANTS)
        assert all(timm.is_model(name) for name in VARIANTS)

    @pytest.mark.parametrize(("name", "dims"), VARIANTS.items())
    def test_feature_info_tells_widths_and_strides(self, name, dims):
        info = timm.create_model(name, device="meta").feature_info
        assert [stage["num_chs"] for stage in info] == dims
        assert [stage["reduction"] for stage in info] == [4, 8, 16, 32]
        assert [stage["module"] for stage in info] == [f"stages.{i}" for i in range(4)]

    def test_create_model_passes_settings_on(self):
        model = timm.create_model("groupmixformer_miny", num_classes=10, in_chans=1, drop_path_rate=0.3)
        assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 10)
        assert model.num_classes == 10
        assert model.stages[3].blocks[3].drop_path2.drop_prob == pytest.approx(0.3)

    @pytest.mark.parametrize("name", VARIANTS)
    def test_default_cfg_is_that_of_the_published_evaluation(self, name):
        model = timm.create_model(name, device="meta")
        data = resolve_model_data_config(model)
        assert data["input_size"] == (3, 224, 224)
        assert data["mean"] == IMAGENET_DEFAULT_MEAN
        assert data["std"] == IMAGENET_DEFAULT_STD
        assert data["interpolation"] == "bicubic"
        assert data["crop_pct"] == 0.875
        assert model.default_cfg["num_classes"] == 1000
        assert model.default_cfg["architecture"] == name
        assert model.get_submodule(model.default_cfg["first_conv"]) is model.stem.conv1
        assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
        names = dict(model.named_parameters())
        assert model.default_cfg["first_conv"] + ".weight" in names
        assert model.default_cfg["classifier"] + ".weight" in names


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A published checkpoint file of the small network, and its tensors."""
    state = fill(to_published(create_small().state_dict()))
    path = tmp_path_factory.mktemp("published") / "groupmixformer.pth"
    torch.save({"model": state}, path)
    return path, state


class TestPretrainedFiles:
    def test_checkpoint_path_loads_a_published_file(self, published):
        path, state = published
        model = create_small(checkpoint_path=str(path))
        loaded = to_published(model.state_dict())
        assert set(loaded) == set(state)
        assert all(torch.equal(loaded[name], state[name]) for name in state)

    def test_pretrained_loads_a_published_file(self, published):
        path, state = published
        model = create_small(pretrained=True, pretrained_cfg_overlay={"file": str(path)})
        loaded = to_published(model.state_dict())
        assert all(torch.equal(loaded[name], state[name]) for name in state)

    def test_pretrained_with_other_classes_and_channels(self, published):
        path, state = published
        model = create_small(
            pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=10, in_chans=1
        ).eval()
        loaded = to_published(model.state_dict())
        same = [name for name in state if not name.startswith("head.") and name != "conv_stem.proj1.weight"]
        assert all(torch.equal(loaded[name], state[name]) for name in same)
        assert torch.equal(model.stem.conv1.weight, adapt_input_conv(1, state["conv_stem.proj1.weight"]))
        assert model.head.fc.bias.eq(0).all()
        assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)

    def test_pretrained_features_are_those_of_the_whole_network(self, published):
        path, state = published
        overlay = {"file": str(path)}
        backbone = create_small(pretrained=True, pretrained_cfg_overlay=overlay, features_only=True).eval()
        model = create_small()
        model.load_state_dict(state)
        x = images(1, 64, 48)
        expected = model.eval().forward_intermediates(x, intermediates_only=True)
        torch.testing.assert_close(backbone(x), expected, rtol=0, atol=0)

    def test_a_file_of_another_network_is_refused(self, published):
        path, _ = published
        with pytest.raises(RuntimeError, match=r"stages\.0\.blocks\.1"):
            create_small(checkpoint_path=str(path), depths=(2, 1, 2, 1))


class TestFeatures:
    @pytest.mark.parametrize("feature_cls", ["list", "hook", "fx", "getter"])
    @pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (2,), (0, 2)])
    def test_features_only_gives_the_chosen_stages(self, feature_cls, out_indices):
        x = images(2, 64, 96)
        expected = create_small().eval().forward_intermediates(x, intermediates_only=True)
        backbone = create_small(features_only=True, out_indices=out_indices, feature_cls=feature_cls).eval()
        torch.testing.assert_close(backbone(x), [expected[i] for i in out_indices], rtol=0, atol=0)
        assert backbone.feature_info.channels() == [DIMS[i] for i in out_indices]
        assert backbone.feature_info.reduction() == [4 * 2**i for i in out_indices]

    @pytest.mark.parametrize("stages", [2, 4])
    def test_features_only_gives_all_stages_by_default(self, stages):
        dims = DIMS[:stages]
        settings = {"embed_dims": dims, "depths": (1,) * stages, "mlp_ratios": (1,) * stages}
        shapes = [tuple(x.shape) for x in create_small(features_only=True, **settings)(images(1, 64, 64))]
        assert shapes == [(1, dim, 16 >> i, 16 >> i) for i, dim in enumerate(dims)]

    def test_features_only_leaves_later_stages_out(self):
        backbone = create_small(features_only=True, out_indices=(1,))
        assert not any("stages_2" in name or "head" in name for name, _ in backbone.named_parameters())


class TestIntermediates:
    @pytest.fixture
    def network(self):
        """A network, an image, and every stage's output by the plain way."""
        model, x = small_model().eval(), images(2, 64, 48)
        stages = list(itertools.accumulate(model.stages, lambda y, stage: stage(y), initial=model.stem(x)))[1:]
        return model, x, stages

    @pytest.mark.parametrize(
        ("indices", "chosen"), [(None, [0, 1, 2, 3]), (1, [3]), (3, [1, 2, 3]), ([0, 2], [0, 2]), ([-1, -4], [0, 3])]
    )
    @pytest.mark.parametrize("stop_early", [False, True])
    def test_indices_choose_stages(self, network, indices, chosen, stop_early):
        model, x, stages = network
        features = model.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
        torch.testing.assert_close(features, [stages[i] for i in chosen], rtol=0, atol=0)

    @pytest.mark.parametrize("stop_early", [False, True])
    def test_the_first_value_is_that_of_forward_features(self, network, stop_early):
        model, x, _ = network
        final, _ = model.forward_intermediates(x, [0, 3], stop_early=stop_early)
        assert torch.equal(final, model.forward_features(x))
        assert torch.equal(model.forward_head(final), model(x))

    def test_stopping_early_computes_no_further_stage(self, network):
        model, x, stages = network
        model.stages[2].register_forward_hook(lambda *_: pytest.fail("the third stage was computed"))
        final, features = model.forward_intermediates(x, [0, 1], stop_early=True)
        assert torch.equal(final, stages[1])
        assert torch.equal(features[1], stages[1])

    @pytest.mark.parametrize("norm", [False, True])
    def test_the_norm_is_applied_to_the_last_stage_alone(self, network, norm):
        model, x, stages = network
        model.norm.bias.data.fill_(0.5)
        features = model.forward_intermediates(x, norm=norm, intermediates_only=True)
        last = model.norm(stages[3]) if norm else stages[3]
        torch.testing.assert_close(features, [*stages[:3], last], rtol=0, atol=0)

    def test_channels_may_come_last(self, network):
        model, x, stages = network
        features = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        torch.testing.assert_close(features, [stage.permute(0, 2, 3, 1) for stage in stages], rtol=0, atol=0)

    def test_another_format_is_refused_by_name(self, network):
        with pytest.raises(ValueError, match=r"'NLC'.*NCHW"):
            network[0].forward_intermediates(network[1], output_fmt="NLC")

    @pytest.mark.parametrize("indices", [5, [4], [-5]])
    def test_stages_that_do_not_exist_are_refused(self, network, indices):
        with pytest.raises(AssertionError, match="out of range"):
            network[0].forward_intermediates(network[1], indices)


class TestPruning:
    @pytest.mark.parametrize(("indices", "chosen"), [(1, [3]), ([0, 1], [0, 1]), ([2], [2]), ([-4], [0])])
    def test_chosen_stages_stay_and_forward_still_works(self, indices, chosen):
        model, x = small_model().eval(), images(2, 64, 48)
        expected = model.forward_intermediates(x, chosen, intermediates_only=True)
        assert model.prune_intermediate_layers(indices) == chosen
        assert len(model.stages) == max(chosen) + 1
        torch.testing.assert_close(model.forward_intermediates(x, chosen, intermediates_only=True), expected)
        last = expected[-1] if max(chosen) < 3 else model.norm(expected[-1])
        assert torch.equal(model.forward_features(x), last)
        assert torch.equal(model(x), last)
        assert model.num_features == model.head_hidden_size == DIMS[max(chosen)]

    def test_norm_and_head_may_stay_or_go_with_all_stages(self):
        x = images(1, 64, 64)
        model = small_model().eval()
        expected = model(x)
        model.prune_intermediate_layers([3], prune_norm=False, prune_head=False)
        assert torch.equal(model(x), expected)
        model.prune_intermediate_layers([3], prune_norm=True, prune_head=True)
        assert torch.equal(model(x), model.stages(model.stem(x)))

    def test_a_pruned_network_takes_a_new_classifier(self):
        model = small_model()
        model.prune_intermediate_layers([1])
        model.reset_classifier(5, "avg")
        assert model(images(2, 64, 64)).shape == (2, 5)

    def test_every_parameter_of_a_pruned_network_is_used(self):
        model = small_model()
        model.prune_intermediate_layers([1])
        model(images(2, 64, 64)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


class TestHead:
    def test_forward_is_features_and_head(self):
        model, x = small_model().eval(), images(2, 64, 48)
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, 2, 2)
        assert torch.equal(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        assert torch.equal(model.get_classifier()(pooled), model(x))

    @pytest.mark.parametrize(
        ("pool", "pooled"),
        [
            ("avg", lambda x: x.mean((2, 3))),
            ("fastavg", lambda x: x.mean((2, 3))),
            ("max", lambda x: x.amax((2, 3))),
            ("avgmax", lambda x: (x.mean((2, 3)) + x.amax((2, 3))) / 2),
            ("catavgmax", lambda x: torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)),
        ],
    )
    def test_other_poolings(self, pool, pooled):
        model, x = small_model(global_pool=pool).eval(), images(2, 64, 64)
        features = model.forward_features(x)
        before_logits = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(before_logits, pooled(features))
        assert before_logits.shape[1] == model.head_hidden_size == model.get_classifier().in_features
        assert model.num_features == 120
        assert model(x).shape == (2, 7)

    def test_no_pooling_and_no_classifier_gives_the_features(self):
        model, x = small_model(num_classes=0, global_pool="").eval(), images(2, 64, 64)
        assert torch.equal(model(x), model.forward_features(x))

    def test_no_classifier_gives_the_pooled_features(self):
        model, x = small_model(num_classes=0).eval(), images(2, 64, 64)
        assert isinstance(model.get_classifier(), nn.Identity)
        torch.testing.assert_close(model(x), model.forward_features(x).mean((2, 3)))

    @pytest.mark.parametrize("training", [False, True])
    def test_a_new_classifier_starts_afresh_and_the_rest_stays(self, training):
        model = small_model(drop_rate=0.25).train(training)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "head" not in name}
        model.reset_classifier(300)
        assert model.num_classes == model.get_classifier().out_features == 300
        assert model.get_classifier().weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert model.get_classifier().bias.eq(0).all()
        assert all(module.training is training for module in model.modules())
        assert model.head.drop.p == 0.25
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
        assert model(images(2, 64, 64)).shape == (2, 300)

    def test_the_pooling_stays_unless_another_is_named(self):
        model = small_model(global_pool="max")
        model.reset_classifier(5)
        assert model.head.global_pool.pool_type == "max"
        model.reset_classifier(5, "catavgmax")
        assert model.get_classifier().in_features == model.head_hidden_size == 240
        model.reset_classifier(0, "")
        assert model(images(1, 64, 64)).shape == (1, 120, 2, 2)
        assert model.head_hidden_size == 120

    def test_a_new_classifier_has_the_networks_type_and_device(self):
        model = small_model().double()
        model.reset_classifier(5)
        assert model.get_classifier().weight.dtype == torch.float64
        model = small_model().to(torch.bfloat16).to("meta")
        model.reset_classifier(5)
        assert model.get_classifier().weight.is_meta
        assert model.get_classifier().weight.dtype == torch.bfloat16


class TestParameterGroups:
    def test_layers_grow_from_the_stem_to_the_head(self):
        model = small_model()
        layers = group_parameters(model, model.group_matcher(), reverse=True)
        assert set(layers) == {name for name, _ in model.named_parameters()}
        in_order = ["stem.", "stages.0.", "stages.1.", "stages.2.blocks.0", "stages.2.blocks.1", "stages.3.", "head."]
        found = [{layer for name, layer in layers.items() if name.startswith(start)} for start in in_order]
        assert found == [{i} for i in range(7)]
        assert layers["stages.2.patch_embed.conv_dw.weight"] == layers["stages.2.blocks.0.norm1.weight"]
        assert layers["norm.weight"] == layers["stages.3.blocks.0.norm1.weight"]

    def test_coarse_layers_are_stages(self):
        model = small_model()
        layers = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        starts = ["stem.", "stages.0.", "stages.1.", "stages.2.", "stages.3.", "head."]
        found = [{layer for name, layer in layers.items() if name.startswith(start)} for start in starts]
        assert found == [{i} for i in range(6)]

    def test_layer_decay_scales_by_depth(self):
        model = small_model()
        scales = {}
        for group in param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5):
            for parameter in group["params"]:
                scales[parameter] = group["lr_scale"]
        assert scales[model.head.fc.weight] == 1
        assert scales[model.norm.weight] == 0.5
        assert scales[model.stages[2].blocks[1].attn.qkv.weight] == 0.25
        assert scales[model.stem.conv1.weight] == 0.5**6
        assert len(scales) == len(list(model.parameters()))

    def test_weight_decay_spares_biases_and_one_dimensional_tensors_alone(self):
        model = small_model()
        assert model.no_weight_decay() == set()
        groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
        spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
        assert spared == {id(p) for p in model.parameters() if p.ndim <= 1}


class TestTools:
    """What scripts, traces, exports and compiles a network must give the network's own answer."""

    @pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_torchscript(self, checkpointing):
        model, x = small_model(drop_path_rate=0.1).eval(), images(2, 64, 48)
        model.set_grad_checkpointing(checkpointing)
        scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(x), model(x))
        torch.testing.assert_close(scripted(x[:1, :, :33]), model(x[:1, :, :33]))

    @pytest.mark.parametrize("training", [False, True])
    def test_fx_tracing(self, training):
        model, x = small_model().double().train(training), images(2, 64, 48).double()
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x), model(x))
        torch.testing.assert_close(traced(x[:, :, :33]), model(x[:, :, :33]))

    @pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
    def test_torchvisions_feature_extractor(self):
        model, x = small_model(drop_path_rate=0.1).eval(), images(2, 64, 48)
        extractor = create_feature_extractor(model, {"stages.1": "early", "norm": "late", "head": "logits"}).eval()
        found = extractor(x)
        final, (early,) = model.forward_intermediates(x, [1])
        torch.testing.assert_close(found, {"early": early, "late": final, "logits": model(x)})

    @pytest.mark.slow
    def test_export_with_any_batch_size(self):
        model = small_model().eval()
        program = torch.export.export(model, (images(2, 64, 48),), dynamic_shapes=({0: torch.export.Dim("batch")},))
        for batch in (1, 2, 5):
            x = images(batch, 64, 48)
            torch.testing.assert_close(program.module()(x), model(x))

    @pytest.mark.slow
    def test_compilation_is_one_graph(self):
        model = small_model(embed_dims=(40, 80), depths=(1, 1), mlp_ratios=(1, 1)).double().eval()
        x = images(2, 64, 48).double()
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
