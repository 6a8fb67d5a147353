"""What training and evaluation do to an image."""

import random

import numpy as np
import pytest
import torch
from helpers_unit import configured, noise
from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torchvision import transforms as torch_transforms

from data.transforms import eval_transform, image_mode, train_transform
from utils.errors import UserError
from utils.seeding import seed_everything

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


def grey_config(**values):
    return configured(MODEL__GMA__IN_DIM=1, DATA__MEAN=[0.3], DATA__STD=[0.4], **values)


def pixels(image):
    """[C, H, W] of an image, literally."""
    return torch.tensor(np.array(image)).reshape(*image.size[::-1], -1).permute(2, 0, 1)


def part(transform, kind):
    """The only part of a transform of a kind."""
    (found,) = [step for step in transform.augment.transforms if isinstance(step, kind)]
    return found


def applied(transform, image, seed=0):
    seed_everything(seed)
    return transform.augment(transform.decode(image))


# Evaluation


def test_the_short_side_is_resized_in_the_recipes_proportion_at_every_size():
    for size in range(32, 1025):
        steps = eval_transform(configured(DATA__IMG_SIZE=size)).augment.transforms
        assert [type(step) for step in steps[:2]] == [torch_transforms.Resize, torch_transforms.CenterCrop]
        assert steps[0].size == int(256 / 224 * size)
        assert tuple(steps[1].size) == (size, size)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("width", "height"), [(300, 500), (500, 300), (64, 64), (31, 47)])
def test_evaluation_resizes_the_short_side_and_crops_the_centre(width, height, interpolation):
    config = configured(DATA__IMG_SIZE=64, DATA__INTERPOLATION=interpolation)
    image = noise(1, (width, height))
    short = int(256 / 224 * 64)
    scaled = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    left, top = (int(round((side - 64) / 2)) for side in scaled)  # noqa: RUF046
    wanted = image.resize(scaled, FILTERS[interpolation]).crop((left, top, left + 64, top + 64))
    assert torch.equal(applied(eval_transform(config), image), pixels(wanted))


@pytest.mark.parametrize(("width", "height"), [(300, 500), (500, 300), (20, 64)])
def test_without_cropping_the_whole_image_is_squashed(width, height):
    config = configured(DATA__IMG_SIZE=64, TEST__CROP=False)
    image = noise(1, (width, height))
    wanted = pixels(image.resize((64, 64), Image.Resampling.BICUBIC))
    assert torch.equal(applied(eval_transform(config), image), wanted)


def test_a_grey_image_stays_one_channel():
    config = grey_config(DATA__IMG_SIZE=32, TEST__CROP=False)
    image = noise(1, (32, 32)).convert("L")
    assert torch.equal(applied(eval_transform(config), image), pixels(image))


def test_evaluation_draws_nothing_at_random():
    transform, image = eval_transform(configured(DATA__IMG_SIZE=48)), noise(1, (70, 60))
    assert torch.equal(applied(transform, image, 1), applied(transform, image, 2))


# Training


def test_the_recipes_augmentation_is_made_of_timms_parts():
    transform = train_transform(configured())
    assert [type(step) for step in transform.augment.transforms] == [
        RandomResizedCropAndInterpolation,
        torch_transforms.RandomHorizontalFlip,
        RandAugment,
        MaybePILToTensor,
    ]
    crop = part(transform, RandomResizedCropAndInterpolation)
    assert (tuple(crop.size), tuple(crop.scale)) == ((224, 224), (0.08, 1.0))
    assert tuple(crop.ratio) == pytest.approx((3 / 4, 4 / 3))
    assert crop.interpolation.value == "bicubic"
    assert part(transform, torch_transforms.RandomHorizontalFlip).p == 0.5
    operations = part(transform, RandAugment)
    assert operations.num_layers == 2
    assert {(op.magnitude, op.magnitude_std) for op in operations.ops} == {(9, 0.5)}
    assert "PosterizeIncreasing" in {op.name for op in operations.ops}


def test_colour_jitter_stands_in_for_automatic_augmentation():
    jitter = part(train_transform(configured(AUG__AUTO_AUGMENT="none")), torch_transforms.ColorJitter)
    assert jitter.brightness == jitter.contrast == jitter.saturation == pytest.approx((0.6, 1.4))
    assert jitter.hue is None


def test_what_is_set_to_nothing_is_left_out():
    config = configured(AUG__AUTO_AUGMENT="none", AUG__COLOR_JITTER=0.0, AUG__HFLIP=0.0)
    assert [type(step) for step in train_transform(config).augment.transforms] == [
        RandomResizedCropAndInterpolation,
        MaybePILToTensor,
    ]


@pytest.mark.parametrize(
    ("name", "kind"), [("rand-m5-n3", RandAugment), ("augmix-m3-w2", AugMixAugment), ("original", AutoAugment)]
)
def test_other_automatic_augmentations_are_timms_too(name, kind):
    assert part(train_transform(configured(AUG__AUTO_AUGMENT=name)), kind)


def still(**values):
    """A training transform of 32 x 32 images that changes nothing but what the values ask for."""
    fixed = {"DATA__IMG_SIZE": 32, "AUG__AUTO_AUGMENT": "none", "AUG__COLOR_JITTER": 0.0, "AUG__HFLIP": 0.0}
    fixed |= {"AUG__SCALE": [1.0, 1.0], "AUG__RATIO": [1.0, 1.0]}
    return train_transform(configured(**{**fixed, **values}))


def test_an_image_that_nothing_changes_keeps_its_pixels():
    image = noise(1, (32, 32))
    assert torch.equal(applied(still(), image), pixels(image))


def test_a_flip_mirrors_the_image():
    image = noise(1, (32, 32))
    assert torch.equal(applied(still(AUG__HFLIP=1.0), image), pixels(image).flip(-1))


def test_the_crops_size_follows_its_bounds():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 256, 3)))  # brighter downwards
    spans = []
    for seed in range(40):
        rows = applied(still(AUG__SCALE=[0.25, 0.5]), ramp, seed)[0].float().mean(1)
        spans.append(float(rows.max() - rows.min()) / 255)
    assert 0.45 < min(spans) < max(spans) < 0.72  # sides of 0.5 to 0.71 of the image


def test_training_depends_on_the_seed_only():
    transform, image = train_transform(configured(DATA__IMG_SIZE=32, AUG__AUTO_AUGMENT="rand-m5-mstd0.5")), noise(1)
    outputs = [applied(transform, image, seed) for seed in range(8)]
    assert all(output.shape == (3, 32, 32) for output in outputs)
    again = [applied(transform, image, seed) for seed in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 8


@pytest.mark.parametrize(
    "name", ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "original", "originalr", "v0", "augmix-m3"]
)
@pytest.mark.parametrize("make", [configured, grey_config], ids=["RGB", "grey"])
def test_automatic_augmentation_survives_its_strongest_draws(name, make, monkeypatch):
    monkeypatch.setattr(random, "gauss", lambda mu, sigma: mu + 2 * sigma)
    config = make(DATA__IMG_SIZE=32, AUG__AUTO_AUGMENT=name)
    transform, image = train_transform(config), noise(1, (32, 32)).convert(image_mode(config))
    for seed in range(150):
        assert applied(transform, image, seed).shape == (config.MODEL.GMA.IN_DIM, 32, 32)


@pytest.mark.parametrize(
    "name",
    ["rnad-m9", "rand-x9", "augmix-q3", "originally", "rand_m9", "AugMix", "rand-mX", "rand-m9-inc", "original-mstdx"],
)
def test_an_unknown_automatic_augmentation_is_refused_by_its_key(name):
    with pytest.raises(UserError, match=r"AUG\.AUTO_AUGMENT") as caught:
        train_transform(configured(AUG__AUTO_AUGMENT=name))
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


# Channels


def test_images_are_grey_or_in_colour():
    assert image_mode(configured()) == "RGB"
    assert image_mode(grey_config()) == "L"
    with pytest.raises(UserError, match=r"MODEL\.GMA\.IN_DIM"):
        image_mode(configured(MODEL__GMA__IN_DIM=4))
