"""Effective receptive fields: true gradients, around the pixel that a unit is centred at."""

import pytest
import torch
from helpers_unit import examples
from hypothesis import given
from hypothesis import strategies as st

from models import GroupMixFormer
from models.receptive_fields import middle_pixel, receptive_fields, square_around


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return GroupMixFormer(embed_dims=(40,) * 4, depths=(1,) * 4, num_classes=3, in_chans=2).double().eval()


def noise(images, height, width):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(images, 2, height, width, generator=generator, dtype=torch.float64)


def test_fields_are_the_change_of_the_middle_unit_with_each_pixel(network):
    images, step = noise(2, 40, 33), 1e-5

    def middles(changed):
        outputs = network.forward_intermediates(changed, intermediates_only=True)
        return torch.stack([out[:, :, out.shape[2] // 2, out.shape[3] // 2].sum(1) for out in outputs])

    fields = receptive_fields(network, images, [0, 1, 2, 3])
    assert fields.shape == (4, 40, 33)
    for row, column in [(20, 16), (3, 30), (39, 0)]:
        wanted = torch.zeros(4, dtype=torch.float64)
        for channel in range(2):
            change = torch.zeros_like(images)
            change[:, channel, row, column] = step
            with torch.no_grad():
                slopes = (middles(images + change) - middles(images - change)) / (2 * step)
            wanted += slopes.abs().sum(1)
        torch.testing.assert_close(fields[:, row, column], wanted, rtol=1e-4, atol=1e-9)


def test_fields_of_images_add_up_and_stages_come_as_asked_for(network):
    images = noise(3, 32, 32)
    one_by_one = sum(receptive_fields(network, image[None], [3, 0]) for image in images)
    torch.testing.assert_close(receptive_fields(network, images, [3, 0]), one_by_one)
    torch.testing.assert_close(receptive_fields(network, images, range(4))[[3, 0]], one_by_one)


def test_neither_the_network_nor_the_images_keep_gradients(network):
    images = noise(1, 32, 32)
    receptive_fields(network, images, [1])
    assert not images.requires_grad and all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("recompute", ["all", "cheap"])
def test_networks_that_recompute_have_the_same_fields(network, recompute):
    images = noise(1, 32, 32)
    kept = receptive_fields(network, images, range(4))
    network.set_grad_checkpointing(True, recompute)
    try:
        torch.testing.assert_close(receptive_fields(network, images, range(4)), kept)
    finally:
        network.set_grad_checkpointing(False)


@pytest.mark.parametrize("shape", [(96, 96), (95, 81), (97, 130)])
def test_the_middle_pixel_is_where_the_field_lies(network, shape):
    fields = receptive_fields(network, noise(2, *shape), range(3))
    for stage, field in enumerate(fields):
        near = field > 0.05 * field.max()
        middle = middle_pixel(shape, network.feature_info[stage]["reduction"])
        for axis, pixel in enumerate(middle):
            places = near.any(dim=1 - axis).nonzero()
            assert abs(float(places.min() + places.max()) / 2 - pixel) <= 2 ** (stage + 1)


@examples(60)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([4, 8, 16, 32]))
def test_the_middle_unit_is_counted_as_convolutions_of_stride_two_count(height, width, stride):
    units = [height, width]
    for _ in range(stride.bit_length() - 1):
        units = [(count + 1) // 2 for count in units]
    assert middle_pixel((height, width), stride) == tuple(count // 2 * stride for count in units)


@examples(100)
@given(st.data(), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
def test_the_square_is_the_smallest_that_holds_the_share(data, height, width, share):
    field = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=height * width, max_size=height * width)))
    field = field.reshape(height, width).double()
    middle = (data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1)))
    for radius in range(12):
        top, left = max(middle[0] - radius, 0), max(middle[1] - radius, 0)
        bottom, right = min(middle[0] + radius + 1, height), min(middle[1] + radius + 1, width)
        if field[top:bottom, left:right].sum() >= share * field.sum():
            break
    assert square_around(field, middle, share) == (top, left, bottom, right)
