"""The network: what it computes, counts, accepts and refuses."""

import copy
import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import GroupMixAttention, GroupMixFormer
from models.groupmixformer import RECOMPUTE, attention_context
from models.published import from_published, to_published
from tests import reference
from tests.fixtures.fill import fill, images

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = ((2, 224, 224), (1, 256, 192))
PARAMETERS = {
    "miny": 5_733_120,
    "tiny": 10_949_152,
    "small": 22_421_320,
    "base": 45_827_272,
    "large": 71_833_648,
}
FLOPS = {
    "miny": 1_349_779_632,
    "tiny": 3_720_156_744,
    "small": 5_164_300_528,
    "base": 17_551_568_864,
    "large": 38_246_340_584,
}
deterministic = settings(derandomize=True, deadline=None, max_examples=20)


def small_model(seed: int = 0, **kwargs) -> GroupMixFormer:
    torch.manual_seed(seed)
    settings = {"embed_dims": (40,) * 4, "depths": (1,) * 4, "mlp_ratios": (4,) * 4, "num_classes": 7}
    return GroupMixFormer(**{**settings, **kwargs})


def uneven_model() -> GroupMixFormer:
    """A float64 network whose stages all differ, with filled weights."""
    model = small_model(embed_dims=(40, 80, 40, 120), depths=(2, 1, 2, 1), mlp_ratios=(4, 2, 3, 1))
    model.load_state_dict(fill(to_published(model.state_dict())))
    return model.double()


def relative_error(actual: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest expected magnitude, or over `floor` where that is larger."""
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=floor)).item()


@pytest.fixture(scope="module", params=["miny", "tiny", "small"])
def published_answers(request):
    """A published network, its filled weights, and what it must answer."""
    model = timm.create_model(f"groupmixformer_{request.param}").eval()
    return model, fill(to_published(model.state_dict())), np.load(FIXTURES / f"golden_{request.param}.npz")


class TestPublishedAnswers:
    @pytest.mark.parametrize(
        ("dtype", "tolerance", "checkpoint"),
        [(torch.float32, 2e-6, True), (torch.float64, 1e-12, False)],
        ids=["float32-checkpoint", "float64-bare"],
    )
    def test_logits_and_stages_are_the_published_ones(self, published_answers, dtype, tolerance, checkpoint):
        model, state, golden = published_answers
        model.to(dtype).load_state_dict({"model": state} if checkpoint else state)
        errors = {}
        for batch, height, width in SIZES:
            size = f"{batch}x{height}x{width}"
            with torch.inference_mode():
                features, stages = model.forward_intermediates(images(batch, height, width).to(dtype))
                answers = {f"logits_{size}": model.forward_head(features)}
            answers |= {f"stage{i}_mean_{size}": stage.mean((2, 3)) for i, stage in enumerate(stages)}
            errors |= {name: relative_error(x, torch.from_numpy(golden[name])) for name, x in answers.items()}
        assert set(errors) == set(golden.files)
        assert max(errors.values()) < tolerance, errors


class TestCounts:
    @pytest.mark.slow
    @pytest.mark.parametrize("variant", PARAMETERS)
    def test_parameters_and_flops_are_exact(self, variant):
        model = timm.create_model(f"groupmixformer_{variant}")
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[variant]
        analysis = FlopCountAnalysis(model.eval(), torch.zeros(1, 3, 224, 224)).unsupported_ops_warnings(False)
        assert analysis.total() == FLOPS[variant]
        if variant == "small":
            assert dict(analysis.by_operator()) == {
                "conv": 495_735_744,
                "linear": 4_576_371_200,
                "einsum": 61_009_200,
                "layer_norm": 20_007_680,
                "batch_norm": 11_176_704,
            }


class TestAgainstTheLiteralForm:
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
    @pytest.mark.parametrize(("height", "width"), [(33, 47), (32, 32), (65, 40)])
    def test_outputs_gradients_and_statistics_agree(self, height, width, training):
        model = uneven_model().train(training)
        state = {name: tensor.clone() for name, tensor in to_published(model.state_dict()).items()}
        names = to_published(dict(model.named_parameters()))
        for name in names:
            state[name].requires_grad_()
        x = images(3, height, width, seed=height).double().requires_grad_()
        literal_x = x.detach().clone().requires_grad_()
        weights = images(3, 1, 7, seed=1).double().sum(1)[:, 0]  # of each logit in the loss

        features, stages = model.forward_intermediates(x)
        logits = model.forward_head(features)
        expected = reference.network(state, literal_x, training)
        outputs = [logits, features, *stages]
        for ours, theirs in zip(outputs, [expected.logits, expected.features, *expected.stages], strict=True):
            assert relative_error(ours, theirs) < 1e-10

        (logits * weights).sum().backward()
        (expected.logits * weights).sum().backward()
        largest = max(state[name].grad.abs().max().item() for name in names)
        # A bias in front of a batch norm that trains has no gradient but rounding errors: these are held to the floor.
        errors = {
            name: relative_error(parameter.grad, state[name].grad, floor=1e-4 * largest)
            for name, parameter in names.items()
        }
        assert max(errors.values()) < 1e-10, max(errors, key=errors.get)
        assert relative_error(x.grad, literal_x.grad) < 1e-10

        after = to_published(model.state_dict())
        if training:
            assert {name for name in state if "running" in name or "tracked" in name} == set(expected.running)
            assert all(after[name] == 1 for name in after if name.endswith("num_batches_tracked"))
        for name in expected.running:
            assert relative_error(after[name], expected.running[name]) < 1e-10, name
        if not training:
            assert all(torch.equal(after[name], state[name]) for name in state)

    def test_attention_agrees_at_another_width_and_bias(self):
        torch.manual_seed(0)
        attention = GroupMixAttention(80, qkv_bias=False).double().eval()
        names = {f"att.{name}": tensor for name, tensor in attention.state_dict().items()}
        block = "stages.0.blocks.0.attn."
        published = to_published({block + name[4:]: tensor for name, tensor in names.items()})
        filled = fill(published)
        ours = {name.removeprefix(block): tensor for name, tensor in from_published(filled).items()}
        attention.load_state_dict(ours)
        weights = reference.Weights({k: v.double() for k, v in filled.items()}, training=False)
        weights = weights.under("groupmixformer_backbone.0.gma_stage.0.att")
        x = torch.randn(2, 5, 9, 80, dtype=torch.float64)
        expected = reference.group_mix_attention(weights, x.reshape(2, 45, 80), 5, 9).reshape(2, 5, 9, 80)
        assert relative_error(attention(x), expected) < 1e-12


class TestAttentionAlone:
    def test_it_serves_in_another_network(self):
        class Other(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Conv2d(3, 40, 8, stride=8)
                self.mix = GroupMixAttention(40)

            def forward(self, x):
                return self.mix(self.embed(x).permute(0, 2, 3, 1))

        torch.manual_seed(0)
        model = Other()
        out = model(images(2, 33, 47))
        assert out.shape == (2, 4, 5, 40)
        out.square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    @pytest.mark.parametrize(
        ("dim", "num_heads", "windows"),
        [(20, 4, ((3, 1), (5, 3))), (10, 2, ((9, 2),)), (60, 12, ((3, 4), (5, 4), (7, 2), (11, 2)))],
    )
    def test_other_heads_and_windows(self, dim, num_heads, windows):
        torch.manual_seed(0)
        attention = GroupMixAttention(dim, num_heads, windows)
        assert attention(torch.randn(2, 6, 5, dim)).shape == (2, 6, 5, dim)

    def test_the_scale_is_that_of_a_head_of_the_full_width(self):
        assert GroupMixAttention(80).scale == pytest.approx((80 / 8) ** -0.5)

    def test_the_output_follows_the_scale(self):
        x = torch.randn(1, 4, 4, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        outputs = []
        for scale in (0.0, 0.5, 1.0):
            torch.manual_seed(0)
            outputs.append(GroupMixAttention(40, qk_scale=scale).double().eval()(x))
        torch.testing.assert_close(outputs[2] - outputs[1], outputs[1] - outputs[0])
        assert not torch.equal(outputs[0], outputs[1])

    def test_dropout_follows_the_projection(self):
        attention = GroupMixAttention(40, proj_drop=1.0)
        x = torch.ones(1, 3, 3, 40)
        assert attention.train()(x).eq(0).all()
        assert not attention.eval()(x).eq(0).any()


class TestSizes:
    def test_every_size_works_and_stages_round_up(self):
        model = small_model().eval()
        for height in range(32, 71):
            width = 102 - height
            with torch.inference_mode():
                features, stages = model.forward_intermediates(torch.zeros(1, 3, height, width))
                assert model.forward_head(features).shape == (1, 7)
            sizes = [tuple(stage.shape[2:]) for stage in stages]
            assert sizes == [(math.ceil(height / s), math.ceil(width / s)) for s in (4, 8, 16, 32)]

    def test_images_smaller_than_a_token_work(self):
        model = small_model().eval()
        assert model(torch.zeros(1, 3, 1, 5)).shape == (1, 7)

    def test_an_image_does_not_see_the_others_of_its_batch(self):
        model, x = small_model().double().eval(), images(3, 40, 40).double()
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]))

    def test_other_numbers_of_stages(self):
        model = small_model(embed_dims=(40, 80), depths=(1, 2), mlp_ratios=(1, 2)).eval()
        assert [info["reduction"] for info in model.feature_info] == [4, 8]
        assert model.forward_features(torch.zeros(1, 3, 33, 64)).shape == (1, 80, 5, 8)


class TestImpossibleSettings:
    @deterministic
    @given(st.integers(-100, 500))
    @example(0)
    @example(-40)
    @example(40)
    def test_a_width_must_be_a_positive_multiple_of_forty(self, dim):
        if dim > 0 and dim % 40 == 0:
            GroupMixAttention(dim, device="meta")
            return
        with pytest.raises(ValueError, match=rf"width {dim} is not .* 40 ") as caught:
            GroupMixAttention(dim, device="meta")
        assert "8 heads" in str(caught.value)
        with pytest.raises(ValueError, match=rf"width {dim} is not "):
            small_model(embed_dims=(40, 40, dim, 40), device="meta")

    @pytest.mark.parametrize(
        ("kwargs", "words"),
        [
            ({"num_heads": 4}, ["4 heads", "8", "2 of 3x3, 3 of 5x5, 3 of 7x7"]),
            ({"num_heads": 0}, ["0 heads", "8"]),
            ({"windows": ((3, 2), (5, 3))}, ["8 heads", "5", "2 of 3x3, 3 of 5x5"]),
            ({"num_heads": 3, "windows": ((3, 3),)}, ["40", "15", "3 heads"]),
        ],
    )
    def test_heads_must_fit_windows_and_width(self, kwargs, words):
        with pytest.raises(ValueError, match="heads") as caught:
            GroupMixAttention(40, **kwargs)
        assert all(word in str(caught.value) for word in words)

    @pytest.mark.parametrize(
        ("kwargs", "words"),
        [
            ({"depths": (1, 1, 1)}, ["embed_dims [40, 40, 40, 40]", "depths [1, 1, 1]", "mlp_ratios [4, 4, 4, 4]"]),
            ({"embed_dims": (40, 40)}, ["embed_dims [40, 40]", "depths [1, 1, 1, 1]"]),
            ({"mlp_ratios": (4,) * 5}, ["mlp_ratios [4, 4, 4, 4, 4]"]),
            ({"embed_dims": (), "depths": (), "mlp_ratios": ()}, ["embed_dims []"]),
            ({"depths": (1, 1, 0, 1)}, ["depths [1, 1, 0, 1]", "at least one block"]),
            ({"mlp_ratios": (4, 4, 0, 4)}, ["mlp_ratios [4, 4, 0, 4]", "above 0"]),
            ({"embed_dims": (40, 40, 44, 40)}, ["width 44", "40"]),
            ({"num_heads": 10}, ["10 heads", "8"]),
        ],
    )
    def test_the_network_names_the_numbers(self, kwargs, words):
        with pytest.raises(ValueError, match=r"\d|\[") as caught:
            small_model(**kwargs)
        assert all(word in str(caught.value) for word in words)
        assert "\n" not in str(caught.value)


class TestFreshWeights:
    def test_linear_layers_are_narrow_normals_without_bias(self):
        model = small_model(embed_dims=(40, 80, 160, 160))
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        assert len(linears) == 4 * 4 + 1
        for linear in linears:
            deviations = 4 / (2 * linear.weight.numel()) ** 0.5  # of the estimate itself, four of them
            assert linear.weight.std().item() == pytest.approx(0.02, rel=deviations)
            assert abs(linear.weight.mean().item()) < 0.02 * 4 / linear.weight.numel() ** 0.5
            assert linear.bias.eq(0).all()

    def test_norms_are_one_and_zero(self):
        norms = [m for m in small_model().modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)]
        assert len(norms) == 2 + 4 + 4 * (2 + 4 + 1) + 1
        assert all(norm.weight.eq(1).all() and norm.bias.eq(0).all() for norm in norms)

    def test_convolutions_keep_pytorchs_own_start(self):
        for conv in (m for m in small_model().modules() if isinstance(m, nn.Conv2d)):
            bound = conv.weight[0].numel() ** -0.5  # uniform up to it
            assert conv.weight.abs().max().item() <= bound
            assert conv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)

    def test_norms_have_the_published_epsilons(self):
        stage = small_model().stages[0].blocks[0]
        assert stage.norm1.eps == stage.norm2.eps == 1e-6
        assert stage.attn.aggregator.local.norm.eps == 1e-5
        norms = [m for m in small_model().modules() if isinstance(m, nn.BatchNorm2d)]
        assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}

    def test_batch_norms_are_plain(self):
        norms = [m for m in small_model().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert {type(norm) for norm in norms} == {nn.BatchNorm2d}


class TestRegularisation:
    def test_drop_path_grows_linearly_from_zero_to_its_rate(self):
        model = small_model(depths=(2, 1, 3, 2), drop_path_rate=0.35)
        for branch in ("drop_path1", "drop_path2"):
            branches = [getattr(block, branch) for stage in model.stages for block in stage.blocks]
            rates = [getattr(branch, "drop_prob", 0.0) for branch in branches]
            assert rates == pytest.approx([0.35 * i / 7 for i in range(8)])

    def test_drop_path_drops_both_branches_of_a_block(self):
        block = small_model(depths=(1, 1, 1, 2), drop_path_rate=1.0).stages[3].blocks[1].train()
        x = torch.randn(3, 4, 4, 40, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(block(x), block.cpe(x))

    def test_without_rates_training_draws_nothing_at_random(self):
        model = small_model().train()
        x = images(2, 64, 64)
        before = torch.get_rng_state()
        torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), before)

    def test_dropout_rates_reach_their_layers(self):
        model = small_model(drop_rate=0.3, proj_drop_rate=0.2)
        rates = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
        assert rates.pop("head.drop") == 0.3
        assert len(rates) == 4 * 3
        assert set(rates.values()) == {0.2}


class Operators(TorchDispatchMode):
    """Counts the operators that run inside it, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class TestBackwardPass:
    def test_gradients_of_parts_are_put_together_and_not_added_to_zeros(self):
        model = small_model().train()
        with Operators() as operators:
            model(images(2, 32, 32)).sum().backward()
        assert operators.counts["select_backward"] == 0
        assert operators.counts["stack"] > 0


def training_step(recompute: str, compiled: bool = False, **settings):
    """Output, gradients and statistics of one training step."""
    model = small_model(**settings).double().train()
    model.set_grad_checkpointing(bool(recompute), recompute or "all")
    torch.compiler.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    torch.manual_seed(1)
    out = step(images(3, 64, 64).double())
    out.square().sum().backward()
    return out, {name: parameter.grad for name, parameter in model.named_parameters()}, dict(model.named_buffers())


class TestAttentionContext:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_many_tokens_lose_no_weight_in_half_precision(self, dtype):
        torch.manual_seed(0)
        k = torch.randn(1, 66_800, 2, 4, dtype=torch.float64).mul(4).to(dtype)  # 800 x 1333 pixels, most weights tiny
        v = torch.randn(1, 66_800, 2, 4, dtype=torch.float64).add(1).to(dtype)
        weights = k.double().exp() / k.double().exp().sum(1, keepdim=True)
        exact = torch.einsum("bnhk,bnhv->bhkv", weights, v.double())
        with torch.autocast("cpu", dtype):
            context = attention_context(k, v)
        assert context.dtype == dtype
        assert relative_error(context, exact) < 2 * torch.finfo(dtype).eps

    def test_of_keys_the_softmax_alone_is_kept_for_the_way_back(self):
        kept = {}
        k, v = (torch.randn(2, 9, 3, 4, requires_grad=True) for _ in range(2))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
        ):
            attention_context(k, v)
        assert sum(tensor.numel() for tensor in kept.values()) == k.numel() + v.numel()

    def test_shapes_of_half_networks_can_be_told_without_computing(self):
        model = small_model().half().to("meta")
        assert model(torch.empty(2, 3, 64, 64, dtype=torch.float16, device="meta")).shape == (2, 7)

    def test_sums_of_large_values_stay_finite_in_fp16(self):
        context = attention_context(torch.zeros(1, 4096, 1, 2).half(), torch.full((1, 4096, 1, 2), 60_000.0).half())
        assert torch.equal(context, torch.full((1, 1, 2, 2), 60_000.0).half())


class TestActivationCheckpointing:
    @pytest.mark.slow
    @pytest.mark.parametrize("recompute", RECOMPUTE)
    @pytest.mark.parametrize(
        ("compiled", "settings"),
        [
            (False, {"depths": (2, 1, 1, 2), "drop_path_rate": 0.5}),
            (True, {"embed_dims": (40, 40), "depths": (1, 1), "mlp_ratios": (1, 1)}),
        ],
        ids=["eager", "compiled"],
    )
    def test_output_gradients_and_statistics_are_those_without(self, compiled, settings, recompute):
        out, gradients, buffers = training_step("", **settings)
        out2, gradients2, buffers2 = training_step(recompute, compiled, **settings)
        torch.testing.assert_close(out2, out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients2, gradients, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(buffers2, buffers, rtol=1e-12, atol=1e-12)
        assert all(buffers2[name] == 1 for name in buffers2 if name.endswith("num_batches_tracked"))

    def test_every_block_is_computed_again_in_the_backward_pass(self):
        model = small_model().train()
        model.set_grad_checkpointing()
        calls = []
        for stage in model.stages:
            stage.blocks[0].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
        out = model(images(2, 32, 32))
        assert len(calls) == 4
        out.sum().backward()
        assert len(calls) == 8

    def test_products_and_convolutions_are_not_computed_again_where_only_what_is_cheap_is(self):
        model, x = small_model().train(), images(2, 32, 32)
        counts = {}
        for recompute in ("", *RECOMPUTE):
            model.set_grad_checkpointing(bool(recompute), recompute or "all")
            with Operators() as operators:
                model(x).sum().backward()
            counts[recompute] = operators.counts
        for name in ("addmm", "convolution"):
            assert counts["cheap"][name] == counts[""][name] < counts["all"][name]
        for name in ("native_layer_norm", "gelu"):
            assert counts[""][name] < counts["cheap"][name] == counts["all"][name]

    def test_what_cannot_be_recomputed_is_refused(self):
        with pytest.raises(ValueError, match="recompute is 'dear': choose one of all, cheap"):
            small_model().set_grad_checkpointing(True, "dear")

    def test_statistics_still_move_in_the_next_step(self):
        model = small_model().train()
        model.set_grad_checkpointing()
        for _ in range(2):
            model(images(2, 64, 64)).sum().backward()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(norm.track_running_stats and norm.num_batches_tracked == 2 for norm in norms)

    def test_one_forward_pass_serves_several_backward_passes(self):
        model = small_model().train()
        model.set_grad_checkpointing()
        x = images(2, 32, 32).requires_grad_()
        out = model(x).sum()
        first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(norm.num_batches_tracked == 1 for norm in norms)

    def test_a_second_backward_pass_is_refused_where_products_are_kept(self):
        model = small_model().train()
        model.set_grad_checkpointing(recompute="cheap")
        out = model(images(2, 32, 32)).sum()
        out.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="backward an extra time"):
            out.backward()

    def test_it_can_be_turned_off_again(self):
        model = small_model()
        model.set_grad_checkpointing()
        model.set_grad_checkpointing(False)
        assert not any(block.recompute for stage in model.stages for block in stage.blocks)

    def test_evaluation_is_unchanged(self):
        model, x = small_model().eval(), images(1, 48, 48)
        expected = model(x)
        model.set_grad_checkpointing()
        assert torch.equal(model(x), expected)


class TestLoading:
    @pytest.fixture(params=["ours", "published", "checkpoint"])
    def form(self, request):
        if request.param == "checkpoint":
            return lambda state: {"model": state}
        return dict if request.param == "published" else from_published

    def test_every_tensor_is_loaded_and_keys_are_reported(self, form):
        model = small_model()
        state = fill(to_published(model.state_dict()))
        result = model.load_state_dict(form(state))
        assert result.missing_keys == result.unexpected_keys == []
        assert all(torch.equal(tensor, state[name]) for name, tensor in to_published(model.state_dict()).items())

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"groupmixformer_backbone.2.gma_stage.0.att.proj.bias": None}, "stages.2.blocks.0.attn.proj.bias"),
            ({"head.weight": None}, "head.fc.weight"),
            ({"norm4.running_mean": None}, "norm.running_mean"),
            ({"neck.weight": torch.zeros(3)}, "neck.weight"),
            ({"norm4.weight": torch.zeros(41)}, "norm.weight"),
            (
                {"patch_embed_layers.1.proj.conv1.weight": torch.zeros(40, 1, 5, 5)},
                "stages.1.patch_embed.conv_dw.weight",
            ),
        ],
        ids=["missing", "missing-head", "missing-statistics", "extra", "misshapen", "misshapen-kernel"],
    )
    def test_what_does_not_fit_is_named(self, form, change, named):
        model = small_model()
        state = {**fill(to_published(model.state_dict())), **change}
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(form(state))
        assert named in str(caught.value)

    def test_loading_may_be_lenient_when_asked(self, form):
        model = small_model()
        state = fill(to_published(model.state_dict()))
        del state["head.bias"]
        result = model.load_state_dict(form({**state, "neck.weight": torch.zeros(3)}), strict=False)
        assert result.missing_keys == ["head.fc.bias"]
        assert result.unexpected_keys == ["neck.weight"]

    def test_the_given_state_is_left_alone(self):
        model = small_model()
        state = {"model": fill(to_published(model.state_dict()))}
        names = list(state["model"])
        model.load_state_dict(state)
        assert list(state) == ["model"]
        assert list(state["model"]) == names

    def test_tensors_may_be_assigned_to_a_network_without_storage(self):
        state = fill(to_published(small_model().state_dict()))
        expected, model = small_model(), small_model(device="meta")
        expected.load_state_dict(state)
        model.load_state_dict(state, assign=True)
        x = images(1, 32, 32)
        assert torch.equal(model.eval()(x), expected.eval()(x))


class TestCopies:
    def test_a_state_dict_gives_the_same_network(self):
        model, other, x = small_model(), small_model(seed=1), images(2, 48, 48)
        assert not torch.equal(model.eval()(x), other.eval()(x))
        assert other.load_state_dict(model.state_dict()).missing_keys == []
        assert torch.equal(model(x), other(x))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_a_copy_is_the_same_network_and_apart(self, copied, checkpointing):
        model, x = small_model(drop_path_rate=0.1).eval(), images(2, 48, 48)
        model.set_grad_checkpointing(checkpointing)
        expected = model(x)
        expected.sum().backward()
        other = copied(model)
        assert torch.equal(other(x), expected)
        nn.init.zeros_(other.head.fc.weight)
        assert torch.equal(model(x), expected)


class TestDevicesAndTypes:
    def test_meta_construction_by_argument_and_by_context(self):
        by_argument = small_model(device="meta", drop_path_rate=0.2)
        with torch.device("meta"):
            by_context = small_model(drop_path_rate=0.2)
        for model in (by_argument, by_context):
            assert all(tensor.is_meta for tensor in model.state_dict().values())
            assert model.stages[3].blocks[0].drop_path1.drop_prob == pytest.approx(0.2)
            assert model(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 7)
        shapes = {name: tensor.shape for name, tensor in small_model().state_dict().items()}
        assert {name: tensor.shape for name, tensor in by_argument.state_dict().items()} == shapes

    def test_parameters_are_made_in_the_wanted_type(self):
        model = small_model(dtype=torch.float64)
        assert all(t.dtype in (torch.float64, torch.long) for t in model.state_dict().values())
        assert model(images(2, 64, 64).double()).dtype == torch.float64
        attention = GroupMixAttention(40, dtype=torch.bfloat16, device="meta")
        assert {parameter.dtype for parameter in attention.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
    def test_autocast_is_finite_and_near(self, dtype, tolerance):
        model, x = uneven_model().float().eval(), images(2, 48, 64)
        expected = model(x)
        with torch.autocast("cpu", dtype):
            out = model(x)
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert relative_error(out, expected) < tolerance
        out.float().square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_autocast_keeps_one_copy_of_the_tokens_for_all_segments(self):
        x, saved = torch.randn(2, 8, 8, 40, requires_grad=True), []
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
            ),
            torch.autocast("cpu", torch.bfloat16),
        ):
            GroupMixAttention(40)(x)
        copies = [t for t in saved if t.numel() == x.numel() and torch.equal(t.reshape(x.shape), x.bfloat16())]
        assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1

    def test_autocast_leaves_double_precision_alone(self):
        attention, x = GroupMixAttention(40).double().eval(), torch.randn(2, 8, 8, 40).double()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(attention(x), attention(x))
        assert attention(x).dtype == torch.float64

    def test_a_local_branch_that_autocast_leaves_in_float32_does_not_make_all_tokens_so(self):
        attention, types = GroupMixAttention(40), []
        attention.aggregator.local.register_forward_hook(lambda module, inputs, output: output.float())
        attention.proj.register_forward_pre_hook(lambda module, inputs: types.append(inputs[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            attention(torch.randn(2, 8, 8, 40))
        assert types == [torch.bfloat16]

    @pytest.mark.parametrize("training", [False, True])
    def test_memory_format_does_not_change_the_answer(self, training):
        model, x = uneven_model().train(training), images(2, 33, 65).double()
        expected = model(x)
        moved = uneven_model().train(training).to(memory_format=torch.channels_last)
        out = moved(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)

    def test_channels_last_images_stay_so_through_every_stage(self):
        model = small_model().eval().to(memory_format=torch.channels_last)
        stages = model.forward_intermediates(
            images(2, 96, 96).to(memory_format=torch.channels_last), intermediates_only=True
        )
        assert all(stage.is_contiguous(memory_format=torch.channels_last) for stage in stages)


@pytest.mark.gpu
class TestOnTheGpu:
    @pytest.fixture(autouse=True)
    def exact_float32(self):
        """Full float32 products, as on the CPU, for the length of a test."""
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        yield
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before

    @pytest.fixture
    def expected(self):
        """A filled network, images, and its answer on the CPU."""
        model, x = uneven_model().float().eval(), images(4, 96, 65)
        with torch.inference_mode():
            return model, x, model(x)

    def test_the_answer_is_that_of_the_cpu(self, expected):
        model, x, answer = expected
        with torch.inference_mode():
            assert relative_error(model.cuda()(x.cuda()).cpu(), answer) < 1e-4

    def test_a_training_step_is_that_of_the_cpu(self):
        results = []
        for device in ("cpu", "cuda"):
            model = uneven_model().to(device).train()
            out = model(images(4, 64, 64).double().to(device))
            out.square().sum().backward()
            gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            running = torch.cat([b.flatten().double() for b in model.buffers()])
            results.append([out.cpu(), gradient.cpu(), running.cpu()])
        for on_cpu, on_gpu in zip(*results, strict=True):
            assert relative_error(on_gpu, on_cpu) < 1e-8

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_autocast_is_finite_and_near(self, expected, dtype, tolerance, memory_format):
        model, x, answer = expected
        model.cuda().to(memory_format=memory_format)
        with torch.autocast("cuda", dtype):
            out = model(x.cuda().to(memory_format=memory_format))
        assert out.isfinite().all()
        assert relative_error(out.cpu(), answer) < tolerance
        out.float().square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_channels_last_gives_the_same_answer(self, expected):
        model, x, answer = expected
        model.cuda().to(memory_format=torch.channels_last)
        with torch.inference_mode():
            out = model(x.cuda().to(memory_format=torch.channels_last))
        assert relative_error(out.cpu(), answer) < 1e-4

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_the_compiled_network_is_one_graph_and_gives_the_same_answer(self, expected, checkpointing):
        model, x, answer = expected
        model.cuda().set_grad_checkpointing(checkpointing)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True)
        assert relative_error(compiled(x.cuda()).detach().cpu(), answer) < 1e-4
        compiled.train()
        compiled(x.cuda()).square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(norm.num_batches_tracked == 1 for norm in norms)

    def test_checkpointing_gives_the_same_gradients_under_mixed_precision(self):
        gradients = []
        for checkpointing in (False, True):
            model = small_model(drop_path_rate=0.5, depths=(1, 1, 1, 2)).cuda().train()
            model.set_grad_checkpointing(checkpointing)
            torch.manual_seed(1)
            with torch.autocast("cuda", torch.bfloat16):
                out = model(images(4, 64, 64).cuda())
            out.float().square().sum().backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        assert relative_error(gradients[1], gradients[0]) < 1e-2
