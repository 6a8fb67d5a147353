"""Whole images, sliding windows, several scales: they agree where they must, and look where they say."""

import pytest
import torch
from helpers_segmentation import tiny
from helpers_unit import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from segmentation.inference import AtScales, SlidingWindow, build_predictor
from segmentation.sizes import scaled_size

SIDES = st.integers(1, 40)


class Recorder(nn.Module):
    """A pixel's logits are its channels and their negatives; keeps the images that it was shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return torch.cat([images, -images], dim=1)


class Contextual(nn.Module):
    """Logits that depend on the place in the image and on all of it."""

    def forward(self, images):
        ramp = torch.arange(images.shape[-1]).expand(images.shape[-2:])
        return torch.cat([images + ramp, images.mean((2, 3), keepdim=True) * images], dim=1)


def noise(height, width, channels=3, seed=0):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(seed))


@examples(30)
@given(height=SIDES, width=SIDES, more=st.integers(0, 9), stride=st.integers(1, 9))
def test_a_window_over_all_of_an_image_is_the_whole_image(height, width, more, stride):
    images, network = noise(height, width), Contextual()
    window = max(height, width) + more
    assert torch.equal(SlidingWindow(network, window, min(stride, window))(images), network(images))


@examples(30)
@given(height=SIDES, width=SIDES, window=st.integers(1, 12), stride=st.integers(1, 12))
def test_windows_cover_every_pixel_and_give_the_mean_of_what_they_say(height, width, window, stride):
    images, network = noise(height, width), Recorder()
    logits = SlidingWindow(network, window, min(stride, window))(images)
    assert torch.allclose(logits, torch.cat([images, -images], dim=1), atol=1e-6)
    assert all(max(seen.shape[-2:]) <= window for seen in network.seen)


def test_windows_are_averaged_literally():
    images, network = noise(7, 9), Contextual()
    total, count = torch.zeros(2, 6, 7, 9), torch.zeros(7, 9)
    for top in (0, 3):
        for left in (0, 3, 5):
            total[..., top : top + 4, left : left + 4] += network(images[..., top : top + 4, left : left + 4])
            count[top : top + 4, left : left + 4] += 1
    assert torch.allclose(SlidingWindow(network, 4, 3)(images), total / count)


@examples(20)
@given(height=SIDES, width=SIDES, short=st.integers(0, 50))
def test_one_scale_of_one_without_mirroring_is_the_single_scale(height, width, short):
    images, network = noise(height, width), Contextual()
    single = AtScales(network, short, 100)(images)
    assert torch.equal(AtScales(network, short, 100, [1.0], False)(images), single)
    twice = AtScales(network, short, 100, [1.0, 1.0], False)(images)
    assert torch.allclose(twice.softmax(1), single.softmax(1), atol=1e-6)


def test_several_scales_and_mirrored_images_give_the_logarithm_of_the_mean_probabilities():
    images, network = noise(20, 30), Recorder()
    answer = AtScales(network, 0, 0, [0.5, 1.0], flip=True)(images)
    assert [tuple(seen.shape[-2:]) for seen in network.seen] == [(10, 15), (10, 15), (20, 30), (20, 30)]
    assert torch.equal(network.seen[3], images.flip(-1))
    assert torch.allclose(answer.exp().sum(dim=1), torch.ones(2, 20, 30))
    half = nn.functional.interpolate(images, size=(10, 15), mode="bilinear", antialias=True)
    back = nn.functional.interpolate(torch.cat([half, -half], dim=1), size=(20, 30), mode="bilinear")
    mirrored = nn.functional.interpolate(torch.cat([half, -half], dim=1).flip(-1), size=(20, 30), mode="bilinear").flip(
        -1
    )
    whole = torch.cat([images, -images], dim=1).softmax(1)
    wanted = (back.softmax(1) + mirrored.softmax(1) + 2 * whole) / 4
    assert torch.allclose(answer.exp(), wanted, atol=1e-5)


def test_one_scale_is_mirrored_too_where_that_is_asked_for():
    images, network = noise(7, 9), Contextual()
    wanted = (network(images).softmax(1) + network(images.flip(-1)).flip(-1).softmax(1)) / 2
    assert torch.allclose(AtScales(network, 0, 0, flip=True)(images).exp(), wanted, atol=1e-6)


def test_what_no_look_believes_at_all_has_a_logarithm_that_is_a_number():
    answer = AtScales(Recorder(), 0, 0, flip=True)(torch.full((1, 1, 4, 4), 200.0))
    assert (answer[:, 0] == 0).all() and answer[:, 1].isfinite().all() and (answer[:, 1] < -80).all()


@pytest.mark.parametrize(
    ("size", "short", "long", "wanted"),
    [
        ((600, 800), 300, 2048, [300, 400]),
        ((800, 600), 300, 2048, [400, 300]),
        ((100, 1000), 100, 500, [50, 500]),
        ((7, 9), 0, 1, [7, 9]),
        ((1, 1000), 100, 500, [1, 500]),
    ],
)
def test_images_are_scaled_by_their_short_side_as_far_as_the_long_one_allows(size, short, long, wanted):
    assert scaled_size(size, short, long) == wanted
    assert scaled_size(size, short, long, 2.0)[0] == pytest.approx(2 * wanted[0], abs=1)


def test_images_are_scaled_to_the_configured_sides_and_answered_at_their_own():
    network = Recorder()
    config = tiny(DATA__SHORT_SIDE=16, DATA__LONG_SIDE=24)
    answer = build_predictor(config, network)(noise(33, 99))
    assert tuple(network.seen[0].shape[-2:]) == (8, 24)
    assert tuple(answer.shape) == (2, 6, 33, 99)


def test_the_configuration_chooses_windows_and_scales():
    network = Recorder()
    config = tiny(TEST__MULTI_SCALE=True, TEST__SLIDING_WINDOW=True, TEST__FLIP=False, TEST__SCALES=[1.0, 2.0])
    build_predictor(config, network)(noise(48, 48))
    assert [tuple(seen.shape[-2:]) for seen in network.seen] == [(32, 32)] * 4 + [(32, 32)] * 25


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, [(48, 48)]),
        ({"TEST__SLIDING_WINDOW": True}, [(32, 32)] * 4),
        ({"TEST__MULTI_SCALE": True}, [(24, 24)] * 2 + [(48, 48)] * 2),
    ],
    ids=["neither", "windows", "scales"],
)
def test_windows_and_scales_are_each_taken_only_where_they_are_asked_for(values, wanted):
    network = Recorder()
    build_predictor(tiny(TEST__FLIP=True, **values), network)(noise(48, 48))
    assert [tuple(seen.shape[-2:]) for seen in network.seen] == wanted
