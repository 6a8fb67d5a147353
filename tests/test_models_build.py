"""Configuration -> network, and weights loaded strictly."""

import math
import re
from functools import partial

import pytest
import torch
from timm.layers import DropPath
from timm.models._manipulate import adapt_input_conv
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.parallel import DistributedDataParallel

from models import GroupMixFormer
from models.build import build_model, compile_blocks, load_pretrained, load_weights
from models.published import from_published, to_published
from tests.fixtures.fill import fill, images
from utils.config import default_config
from utils.errors import UserError

QKV, QKV_PUBLISHED = (
    "stages.1.blocks.0.attn.qkv.weight",
    "groupmixformer_backbone.1.gma_stage.0.att.qkv.weight",
)


def small_model(**kwargs) -> GroupMixFormer:
    settings = {"embed_dims": (40,) * 4, "depths": (1,) * 4, "mlp_ratios": (4,) * 4, "num_classes": 7}
    return GroupMixFormer(**{**settings, **kwargs})


def filled_state(**kwargs) -> dict[str, torch.Tensor]:
    """A published state dict with fixed values."""
    return fill(to_published(small_model(**kwargs).state_dict()))


def small_config(**gma):
    config = default_config()
    settings = {"EMBEDDING_DIMS": [40] * 4, "SERIAL_DEPTHS": [1, 1, 2, 1], "MLP_RATIOS": [4.0, 2.0, 3.0, 1.0]}
    for key, value in {**settings, **gma}.items():
        config.MODEL.GMA[key] = value
    return config


def same_tensors(actual, expected) -> bool:
    return set(actual) == set(expected) and all(torch.equal(actual[name], expected[name]) for name in expected)


class TestBuildModel:
    def test_the_network_is_the_configured_one(self):
        config = small_config(IN_DIM=2, EMBEDDING_DIMS=[40, 80, 120, 40], QKV_BIAS=False, QKV_SCALE=0.25, DROP_RATE=0.1)
        model = build_model(config, num_classes=5)
        assert model.stem.conv1.in_channels == 2
        assert [info["num_chs"] for info in model.feature_info] == [40, 80, 120, 40]
        assert [len(stage.blocks) for stage in model.stages] == [1, 1, 2, 1]
        hidden = [stage.blocks[0].mlp.fc1.out_features for stage in model.stages]
        assert hidden == [4 * 40, 2 * 80, 3 * 120, 1 * 40]
        attention = model.stages[1].blocks[0].attn
        assert attention.qkv.bias is None
        assert attention.scale == 0.25
        assert attention.proj_drop.p == 0.1
        assert model.get_classifier().out_features == model.num_classes == 5

    def test_the_defaults_are_the_published_small_network(self):
        with torch.device("meta"):
            model = build_model(default_config(), num_classes=1000)
        assert sum(parameter.numel() for parameter in model.parameters()) == 22_421_320
        assert model.stages[-1].blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)

    @pytest.mark.parametrize(
        ("use", "recompute", "done"), [(True, "all", "all"), (True, "cheap", "cheap"), (False, "cheap", "")]
    )
    def test_activation_checkpointing_is_a_key(self, use, recompute, done):
        config = small_config()
        config.TRAIN.USE_CHECKPOINT, config.TRAIN.RECOMPUTE = use, recompute
        blocks = [block for stage in build_model(config, 5).stages for block in stage.blocks]
        assert {block.recompute for block in blocks} == {done}

    @pytest.mark.parametrize(
        ("gma", "words"),
        [
            ({"EMBEDDING_DIMS": [40, 50, 40, 40]}, ["MODEL.GMA", "50", "40"]),
            ({"NUM_HEADS": 4}, ["MODEL.GMA", "4 heads", "8"]),
            ({"SERIAL_DEPTHS": [1, 1, 0, 1]}, ["MODEL.GMA", "[1, 1, 0, 1]"]),
            ({"MLP_RATIOS": [4.0, 4.0]}, ["MODEL.GMA", "[4.0, 4.0]"]),
        ],
    )
    def test_impossible_settings_are_a_users_error(self, gma, words):
        with pytest.raises(UserError) as caught:
            build_model(small_config(**gma), num_classes=5)
        assert all(word in str(caught.value) for word in words)
        assert "\n" not in str(caught.value)


@pytest.fixture(params=["ours", "published", "checkpoint"])
def form(request):
    """Wraps a published state dict in one of the forms that weights come in."""
    if request.param == "checkpoint":
        return lambda state: {"model": state}
    return dict if request.param == "published" else from_published


class TestLoadWeights:
    def test_every_tensor_is_loaded(self, form):
        model, state = small_model(), filled_state()
        load_weights(model, form(state), "weights.pth")
        assert same_tensors(to_published(model.state_dict()), state)

    @pytest.mark.parametrize("name", [QKV_PUBLISHED, "head.bias", "norm4.num_batches_tracked", "norm4.running_var"])
    def test_a_missing_tensor_is_named(self, form, name):
        state = filled_state()
        del state[name]
        with pytest.raises(UserError) as caught:
            load_weights(small_model(), form(state), "weights.pth")
        ours = {QKV_PUBLISHED: QKV, "head.bias": "head.fc.bias"}.get(name, name.replace("norm4", "norm"))
        assert ours in str(caught.value)
        assert "weights.pth" in str(caught.value)

    def test_an_extra_tensor_is_named(self, form):
        state = {**filled_state(), "neck.weight": torch.zeros(3)}
        with pytest.raises(UserError, match=r"weights\.pth .*neck\.weight"):
            load_weights(small_model(), form(state), "weights.pth")

    def test_a_misshapen_tensor_is_named_with_both_shapes(self, form):
        state = {**filled_state(), QKV_PUBLISHED: torch.zeros(120, 41)}
        with pytest.raises(UserError) as caught:
            load_weights(small_model(), form(state), "weights.pth")
        for words in (QKV, "[120, 41]", "[120, 40]", "weights.pth"):
            assert words in str(caught.value)

    def test_what_is_no_tensor_is_named(self, form):
        state = {**filled_state(), QKV_PUBLISHED: [0.5], "epoch": 299}
        with pytest.raises(UserError, match=rf"weights\.pth holds no weights under {re.escape(QKV)}, epoch: "):
            load_weights(small_model(), form(state), "weights.pth")

    def test_all_that_is_wrong_is_told_at_once_and_in_one_line(self):
        state = {**filled_state(), "neck.weight": torch.zeros(3), QKV_PUBLISHED: torch.zeros(1)}
        del state["head.bias"]
        with pytest.raises(UserError) as caught:
            load_weights(small_model(), state, "weights.pth")
        assert all(name in str(caught.value) for name in ("neck.weight", QKV, "head.fc.bias"))
        assert "\n" not in str(caught.value)

    def test_a_long_list_is_shortened(self):
        with pytest.raises(UserError, match=r"and \d+ more"):
            load_weights(small_model(), {}, "weights.pth")

    def test_the_network_is_untouched_where_weights_do_not_fit(self):
        model, state = small_model(), filled_state()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        del state["head.bias"]
        with pytest.raises(UserError):
            load_weights(model, state, "weights.pth")
        assert same_tensors(model.state_dict(), before)

    @pytest.mark.parametrize("settings", [{"num_classes": 8}, {"in_chans": 1}, {"depths": (1, 1, 2, 1)}])
    def test_weights_of_another_network_are_refused(self, settings):
        with pytest.raises(UserError):
            load_weights(small_model(**settings), filled_state(), "weights.pth")


class TestLoadPretrained:
    def test_weights_that_fit_are_loaded_without_a_word(self, form):
        model, state = small_model(), filled_state()
        assert load_pretrained(model, form(state), "weights.pth") == []
        assert same_tensors(to_published(model.state_dict()), state)

    def test_another_number_of_classes_starts_the_head_afresh_and_says_so(self, form):
        model, state = small_model(num_classes=9), filled_state()
        head = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
        (sentence,) = load_pretrained(model, form(state), "weights.pth")
        assert all(words in sentence for words in ("weights.pth", "7 classes", "9 classes", "head"))
        assert same_tensors(model.head.state_dict(), head)
        loaded = to_published(model.state_dict())
        assert all(torch.equal(loaded[name], state[name]) for name in state if not name.startswith("head."))

    def test_weights_without_a_head_start_it_afresh_and_say_so(self, form):
        state = {name: tensor for name, tensor in filled_state().items() if not name.startswith("head.")}
        model = small_model()
        (sentence,) = load_pretrained(model, form(state), "weights.pth")
        assert "no head" in sentence
        assert torch.equal(model.norm.weight, state["norm4.weight"])

    @pytest.mark.parametrize("channels", [1, 2, 4, 6])
    def test_other_input_channels_are_adapted_as_timm_does_and_said(self, form, channels):
        model, state = small_model(in_chans=channels), filled_state()
        (sentence,) = load_pretrained(model, form(state), "weights.pth")
        assert "3 channels" in sentence
        assert f"network {channels}" in sentence
        adapted = adapt_input_conv(channels, state["conv_stem.proj1.weight"])
        assert torch.equal(model.stem.conv1.weight, adapted)
        assert torch.equal(model.stem.conv1.bias, state["conv_stem.proj1.bias"])

    def test_one_channel_sums_the_three(self):
        model, state = small_model(in_chans=1), filled_state()
        load_pretrained(model, state, "weights.pth")
        summed = state["conv_stem.proj1.weight"].sum(1, keepdim=True)
        torch.testing.assert_close(model.stem.conv1.weight, nn.Parameter(summed))

    @pytest.mark.parametrize("channels", [3, 4])
    def test_a_network_of_grey_images_sees_the_same_in_colour_images_of_greys(self, channels):
        model, grey = small_model(in_chans=channels), small_model(in_chans=1)
        state = filled_state(in_chans=1)
        grey.load_state_dict(state)
        (sentence,) = load_pretrained(model, state, "weights.pth")
        assert (
            sentence
            == f"weights.pth takes 1 channels, the network {channels}: the first convolution was shared out to them"
        )
        images = torch.rand(2, 1, 64, 64)
        torch.testing.assert_close(model.eval()(images.expand(-1, channels, -1, -1)), grey.eval()(images))

    def test_classes_and_channels_may_differ_together(self):
        sentences = load_pretrained(small_model(num_classes=9, in_chans=1), filled_state(), "weights.pth")
        assert len(sentences) == 2

    def test_the_weights_that_were_given_stay_as_they_are(self, form):
        given = form(filled_state())
        tensors = given.get("model", given)
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        load_pretrained(small_model(num_classes=9, in_chans=4), given, "weights.pth")
        assert same_tensors(tensors, before)

    @pytest.mark.parametrize("name", [QKV_PUBLISHED, "conv_stem.proj1.weight", "head.bias"])
    def test_any_other_missing_tensor_is_named(self, name):
        state = filled_state()
        del state[name]
        ours = {QKV_PUBLISHED: QKV, "head.bias": "head.fc.bias"}.get(name, "stem.conv1.weight")
        with pytest.raises(UserError, match=ours):
            load_pretrained(small_model(), state, "weights.pth")

    def test_an_extra_tensor_is_named_although_the_head_differs(self):
        state = {**filled_state(), "neck.weight": torch.zeros(3)}
        with pytest.raises(UserError, match=r"neck\.weight"):
            load_pretrained(small_model(num_classes=9), state, "weights.pth")

    def test_a_misshapen_tensor_is_named_although_the_head_differs(self):
        state = {**filled_state(), QKV_PUBLISHED: torch.zeros(120, 41)}
        with pytest.raises(UserError, match=QKV):
            load_pretrained(small_model(num_classes=9), state, "weights.pth")

    def test_the_fresh_head_gives_the_loss_of_guessing(self):
        model = small_model(num_classes=9).eval()
        load_pretrained(model, filled_state(), "weights.pth")
        with torch.inference_mode():
            loss = nn.functional.cross_entropy(model(images(4, 32, 32)), torch.tensor([0, 3, 5, 8]))
        assert loss.item() == pytest.approx(math.log(9), abs=0.3)


@pytest.mark.slow
class TestCompiledBlocks:
    @pytest.fixture
    def compiled(self, monkeypatch):
        """What was compiled, by tracing alone: without the minutes that generating code takes."""
        torch.compiler.reset()
        graphs = []

        def backend(graph, inputs, options):
            graphs.append(graph)
            return aot_eager(graph, inputs)

        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        return graphs

    @staticmethod
    def model(**settings):
        torch.manual_seed(0)
        shape = {"embed_dims": (40,) * 4, "depths": (2, 1, 3, 1), "mlp_ratios": (1,) * 4, "num_classes": 3}
        return GroupMixFormer(**{**shape, **settings}).double().train()

    def step(self, model):
        torch.manual_seed(1)
        out = model(torch.randn(2, 3, 64, 64).double())
        out.square().sum().backward()
        return out, [parameter.grad for parameter in model.parameters()], list(model.buffers())

    def test_blocks_of_a_stage_share_what_is_compiled(self, compiled):
        model = self.model()
        compile_blocks(model)
        self.step(model)
        assert len(compiled) == 4

    def test_drop_paths_of_many_rates_are_compiled_no_more_often(self, compiled):
        model = self.model(drop_path_rate=0.3)
        compile_blocks(model)
        self.step(model)
        assert len(compiled) == 1 + 3 * 4  # the first block's rate is 0; of the others three parts in each stage

    def test_batches_of_any_size_are_compiled_beyond_what_torch_stops_at(self, compiled):
        model = self.model()
        compile_blocks(model)
        for size in (1, 2, 3):
            model(torch.randn(size, 3, 64, 64).double())
        assert len(compiled) == 3 * 4  # where torch compiles a function 8 times only

    @pytest.fixture
    def ranks(self):
        """A process group of this process alone."""
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("distributed", [False, True], ids=["alone", "in DDP"])
    @pytest.mark.parametrize("recompute", ["", "all"])
    def test_they_train_as_the_others_do(self, compiled, recompute, distributed, ranks):
        steps = []
        for compile_it in (False, True):
            model = self.model(drop_path_rate=0.3)
            model.set_grad_checkpointing(bool(recompute))
            if compile_it:
                compile_blocks(model)
            steps.append(self.step(DistributedDataParallel(model) if distributed else model))
        assert compiled
        torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-11)

    def test_a_recomputed_block_trains_as_the_others_do_with_the_code_that_is_generated(self):
        torch.compiler.reset()
        steps = []
        for compile_it in (False, True):
            model = self.model(embed_dims=(40,), depths=(1,), mlp_ratios=(1,))
            block = model.stages[0].blocks[0]
            block.drop_path1 = block.drop_path2 = DropPath(0.3)
            model.set_grad_checkpointing()
            if compile_it:
                compile_blocks(model)
            steps.append(self.step(model))
        torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-11)

    def test_tokens_are_not_laid_out_as_images_would_be(self, monkeypatch):
        told, model = [], self.model()
        monkeypatch.setattr(nn.Module, "compile", lambda part, **settings: told.append(settings))
        compile_blocks(model)
        assert {settings["options"]["layout_optimization"] for settings in told} == {False}
        assert torch._inductor.config.layout_optimization  # of other networks

    def test_norms_over_all_ranks_leave_recomputation_outside_of_what_is_compiled(self):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model())
        compile_blocks(model)
        names = {name.rpartition(".")[2] for name, part in model.named_modules() if part._compiled_call_impl}
        assert names == {"cpe", "attn", "mlp"}
