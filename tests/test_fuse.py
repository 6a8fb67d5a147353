"""The network rewritten for inference: the same answers, and what is gone from it."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from models.fuse import fuse
from models.groupmixformer import GroupMixFormer, SegmentProjection
from models.published import to_published
from tests import reference
from tests.fixtures.fill import images
from tests.test_groupmixformer import Operators, relative_error

deterministic = settings(derandomize=True, deadline=None, max_examples=12)


def trained_model(seed: int = 0, **kwargs) -> GroupMixFormer:
    """A float64 network whose norms have statistics and weights of their own, and all that has a bias another one."""
    torch.manual_seed(seed)
    shape = {"embed_dims": (40, 80, 40, 40), "depths": (2, 1, 1, 1), "mlp_ratios": (1, 2, 1, 1), "num_classes": 5}
    model = GroupMixFormer(**{**shape, "drop_path_rate": 0.2, **kwargs}).double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
            nn.init.uniform_(module.weight, -1.5, 1.5)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias)
    return model


class TestAnswers:
    @deterministic
    @given(
        seed=st.integers(0, 99),
        height=st.integers(1, 70),
        width=st.integers(1, 70),
        qkv_bias=st.booleans(),
        in_chans=st.sampled_from([1, 3]),
    )
    def test_they_are_the_networks_at_any_size(self, seed, height, width, qkv_bias, in_chans):
        model = trained_model(seed, qkv_bias=qkv_bias, in_chans=in_chans).eval()
        x = images(2, height, width, seed=seed)[:, :in_chans].double()
        assert relative_error(fuse(model)(x), model(x).detach()) < 1e-12

    def test_they_are_the_literal_forms(self):
        model = trained_model()
        x = images(2, 33, 47).double()
        expected = reference.network(to_published(model.state_dict()), x)
        features, stages = fuse(model).forward_intermediates(x)
        for ours, theirs in zip([features, *stages], [expected.features, *expected.stages], strict=True):
            assert relative_error(ours, theirs) < 1e-12

    @pytest.mark.parametrize("variant", ["miny", "small"])
    def test_they_hold_in_float32_for_published_sizes(self, variant):
        torch.manual_seed(0)
        model = timm.create_model(f"groupmixformer_{variant}").eval()
        x = images(1, 96, 64)
        assert relative_error(fuse(model)(x), model(x).detach()) < 1e-5

    def test_they_hold_after_synchronised_batch_norms_and_another_classifier(self):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(trained_model())
        model.reset_classifier(9)
        model.eval()
        x = images(2, 64, 64).double()
        assert fuse(model)(x).shape == (2, 9)
        assert relative_error(fuse(model)(x), model(x).detach()) < 1e-12

    def test_they_are_the_same_of_a_part_a_holder_a_backbone_and_when_rewritten_twice(self):
        model = trained_model().eval()
        image, tokens = images(1, 64, 64).double(), images(1, 16, 40).double()[:, :1].transpose(1, 2)
        tokens = tokens.reshape(1, 4, 4, 40).contiguous()
        backbone = timm.create_model("groupmixformer_miny", features_only=True, depths=(1, 1, 1, 1)).double().eval()
        for network, x in [
            (model.stages[0].blocks[1].attn, tokens),
            (model.stages[0].blocks[1], tokens),
            (nn.Sequential(model, nn.Softmax(1)), image),
            (backbone, image),
            (fuse(model), image),
        ]:
            torch.testing.assert_close(fuse(network)(x), network(x), rtol=1e-10, atol=1e-12)

    def test_they_hold_for_other_and_for_frozen_batch_norms_and_beside_other_norms(self):
        x = images(2, 64, 64).double()
        plain, mixed = trained_model().eval(), trained_model().eval()
        for module in plain.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = 0.1
        frozen = freeze_batch_norm_2d(copy.deepcopy(plain))
        aggregator = mixed.stages[0].blocks[0].attn.aggregator
        aggregator.norm = aggregator.proxies[1].norm = nn.GroupNorm(2, 8).double()
        mixed.stages[1].patch_embed.norm = nn.GroupNorm(2, 80).double()
        for model in (plain, frozen, mixed):
            assert relative_error(fuse(model)(x), model(x).detach()) < 1e-12
        assert not [m for m in fuse(frozen).stages.modules() if isinstance(m, FrozenBatchNorm2d)]

    def test_they_hold_for_dilated_kernels(self):
        model, plain = trained_model().eval(), trained_model().eval()
        block = model.stages[0].blocks[0]
        for conv, dilation in [
            (block.cpe.conv, 2), (block.attn.aggregator.proxies[1].conv_dw, 3), (block.attn.position.convs[0], 2),
        ]:  # fmt: skip
            conv.dilation, conv.padding = (dilation, dilation), (dilation * (conv.kernel_size[0] // 2),) * 2
            x = images(2, 64, 64).double()
            assert relative_error(model(x), plain(x)) > 1e-8
            assert relative_error(fuse(model)(x), model(x).detach()) < 1e-12
            plain = copy.deepcopy(model)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_they_are_as_near_in_half_precision(self, dtype):
        model = trained_model().eval()
        x = images(4, 64, 64).double()
        with torch.no_grad():
            exact = model(x)
            with torch.autocast("cpu", dtype):
                errors = [relative_error(network.float()(x.float()), exact) for network in (fuse(model), model)]
        assert errors[0] < 2 * errors[1] + torch.finfo(dtype).eps

    @pytest.mark.slow
    def test_compiled_they_are_the_same(self):
        model = fuse(trained_model())
        x = images(2, 64, 64).double()
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert relative_error(compiled(x), model(x)) < 1e-12


class TestForm:
    def test_the_last_norm_alone_is_left_of_the_batch_norms(self):
        norms = [n for n, m in fuse(trained_model()).named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms == ["norm"]

    def test_fewer_operators_run(self):
        model, counts = trained_model().eval(), []
        for network in (model, fuse(model)):
            with Operators() as operators, torch.no_grad():
                network(images(1, 64, 64).double())
            counts.append(operators.counts)
        before, after = counts
        assert (before["native_batch_norm"], after["native_batch_norm"]) == (2 + 4 + 4 * 5 + 1, 1)
        assert after["convolution"] == before["convolution"] - 5 * (3 + 2)  # projections of proxies, two of the windows
        assert after["add"] == before["add"] - 5
        assert after.total() < 0.85 * before.total()

    def test_the_network_itself_is_left_as_it_is(self):
        model = trained_model().train()
        before = copy.deepcopy(model.state_dict())
        fused = fuse(model)
        assert model.training and not fused.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not any(parameter.requires_grad for parameter in fused.parameters())
        assert any(isinstance(module, SegmentProjection) for module in model.modules())
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fused.parameters()}
        assert not shared

    def test_nothing_is_recomputed_in_it(self):
        model = trained_model()
        model.set_grad_checkpointing(True)
        assert all(block.recompute for stage in model.stages for block in stage.blocks)
        assert not any(block.recompute for stage in fuse(model).stages for block in stage.blocks)

    def test_it_can_be_saved_copied_and_scripted(self, tmp_path):
        fused, x = fuse(trained_model()), images(1, 32, 32).double()
        torch.jit.script(fused).save(tmp_path / "fused.pt")
        for again in (copy.deepcopy(fused), torch.jit.load(tmp_path / "fused.pt")):
            torch.testing.assert_close(again(x), fused(x))
