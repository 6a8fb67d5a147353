"""Depthwise convolution: its gradients in bfloat16 on CPUs, and where it is a convolution like any other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers_unit import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from models.depthwise import DepthwiseConv2d, depthwise_conv2d
from tests.reference import depthwise as plain
from tests.test_groupmixformer import small_model


def inputs(kernel, height=9, width=11, channels=8, bias=True, dtype=torch.bfloat16, channels_last=True):
    """An image, a kernel and a bias whose gradients are wanted; their numbers are bfloat16's in every type."""
    generator = torch.Generator().manual_seed(kernel + 10 * height + 100 * width)
    shapes = [(2, channels, height, width), (channels, 1, kernel, kernel), *([(channels,)] if bias else [])]
    tensors = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes]
    if channels_last:
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    return [tensor.requires_grad_() for tensor in tensors]


def output_and_gradients(convolve, tensors):
    """The output, and the gradient of each tensor for one and the same gradient of the output."""
    out = convolve(*tensors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return out, torch.autograd.grad(out, tensors, grad)


def small_network():
    return small_model(embed_dims=(40, 40), depths=(1, 1), mlp_ratios=(1, 1))


class WeightGradients(TorchDispatchMode):
    """Notes the kernels whose weights' gradients are computed."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default and args[-1][1]:
            self.sizes.append(tuple(args[2].shape[2:]))
        return func(*args, **(kwargs or {}))


def network_gradients(network, forward):
    """Gradients of all parameters after a step in bfloat16, and the most columns of a kernel that learn at once."""
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = forward(x).float().square().sum()
    with WeightGradients() as taken:
        loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}, max(w for _, w in taken.sizes)


def assert_equal(gradients, expected):
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())


@examples(40)
@given(
    kernel=st.sampled_from([1, 3, 5, 7, 9]),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    channels=st.sampled_from([1, 3, 16, 24]),
    bias=st.booleans(),
    channels_last=st.booleans(),
)
def test_gradients_in_bfloat16_are_those_of_float64_rounded(kernel, height, width, channels, bias, channels_last):
    settings = (kernel, height, width, channels, bias)
    _, exact = output_and_gradients(plain, inputs(*settings, dtype=torch.float64))
    out, gradients = output_and_gradients(depthwise_conv2d, inputs(*settings, channels_last=channels_last))
    assert torch.equal(out, plain(*inputs(*settings, channels_last=channels_last)))
    for gradient, value in zip(gradients, exact, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), value, rtol=2**-8, atol=2**-8 * value.abs().max().item())


@pytest.mark.parametrize("kernel", [5, 7])
def test_weights_learn_three_columns_at_a_time(kernel):
    tensors = inputs(kernel)
    out = depthwise_conv2d(*tensors)
    with WeightGradients() as taken:
        out.sum().backward()
    assert [rows for rows, _ in taken.sizes] == [kernel] * len(taken.sizes)
    assert sum(columns for _, columns in taken.sizes) == kernel
    assert max(columns for _, columns in taken.sizes) == 3


def test_no_wide_kernel_of_the_network_learns_at_once_under_autocast():
    network = small_network()
    _, columns = network_gradients(network, network)
    assert columns == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_types_are_those_of_a_convolution_bit_for_bit(dtype):
    out, gradients = output_and_gradients(depthwise_conv2d, inputs(7, dtype=dtype))
    expected, expected_gradients = output_and_gradients(plain, inputs(7, dtype=dtype))
    assert torch.equal(out, expected)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected_gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_may_be_dilated(dtype):
    def dilated(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=4, dilation=2, groups=8)

    layer = DepthwiseConv2d(8, 5, dilation=2)
    x, weight, bias = inputs(5, dtype=dtype)
    out, gradients = output_and_gradients(lambda *tensors: depthwise_conv2d(*tensors, dilation=2), [x, weight, bias])
    expected, expected_gradients = output_and_gradients(dilated, [x, weight, bias])
    assert torch.equal(out, expected)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected_gradients, strict=True))
    assert torch.equal(layer(x.float()), dilated(x.float(), layer.weight, layer.bias))


def test_images_that_need_no_gradient_get_none():
    x, weight, bias = inputs(5)
    with WeightGradients() as taken:
        depthwise_conv2d(x.detach(), weight, bias).sum().backward()
    assert x.grad is None
    assert len(taken.sizes) == 2
    assert torch.equal(bias.grad, torch.full_like(bias, 2 * 9 * 11))


def test_frozen_weights_let_gradients_through():
    x, weight, bias = inputs(5)
    expected = torch.autograd.grad(plain(x, weight, bias).sum(), x)[0]
    with WeightGradients() as taken:
        gradient = torch.autograd.grad(depthwise_conv2d(x, weight.detach(), bias.detach()).sum(), x)[0]
    assert torch.equal(gradient, expected)
    assert not taken.sizes


def test_gradients_of_each_image_can_be_taken_at_once():
    x, weight, bias = inputs(5)

    def loss(weight, image):
        return depthwise_conv2d(image[None], weight, bias).float().square().sum()

    of_one = torch.func.grad(loss)
    at_once = torch.func.vmap(of_one, (None, 0))(weight, x)
    torch.testing.assert_close(at_once, torch.stack([of_one(weight, image) for image in x]))


def test_a_trace_shows_a_convolution():
    traced = torch.jit.trace(depthwise_conv2d, inputs(7), check_trace=False)
    assert "aten::_convolution" in str(traced.graph)
    assert "_LearnedInStrips" not in str(traced.graph)


def test_a_symbolic_trace_shows_a_convolution_and_computes_the_same():
    traced = torch.fx.symbolic_trace(depthwise_conv2d, concrete_args={"bias": None, "dilation": 1})
    assert F.conv2d in [node.target for node in traced.graph.nodes]
    tensors = inputs(7, bias=False)
    assert torch.equal(traced(*tensors, None, 1), depthwise_conv2d(*tensors))


def test_parameters_learn_in_float32_under_autocast_as_in_plain_convolutions(monkeypatch):
    network = small_network()
    gradients, _ = network_gradients(network, network)
    for module in ("models.groupmixformer", "models.depthwise"):
        monkeypatch.setattr(f"{module}.depthwise_conv2d", plain)
    twin = small_network()
    expected, columns = network_gradients(twin, twin)
    assert columns == 7
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-2 * expected[name].abs().max().item())


@pytest.mark.slow
def test_the_compiled_network_is_one_graph_with_the_same_gradients():
    network = small_network()
    twin = copy.deepcopy(network)
    torch.compiler.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    gradients, columns = network_gradients(twin, compiled)
    assert columns == 3
    assert_equal(gradients, network_gradients(network, network)[0])


@pytest.mark.parametrize("recompute", ["all", "cheap"])
def test_recomputing_gives_the_same_gradients(recompute):
    network = small_network()
    twin = copy.deepcopy(network)
    twin.set_grad_checkpointing(recompute=recompute)
    gradients, columns = network_gradients(twin, twin)
    assert columns == 3
    assert_equal(gradients, network_gradients(network, network)[0])


def test_types_must_fit_as_those_of_a_convolution():
    x, weight, bias = inputs(5)
    with pytest.raises(RuntimeError, match="should be the same"):
        depthwise_conv2d(x, weight.detach().float().requires_grad_(), bias.float())
