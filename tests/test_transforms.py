"""What training and evaluation do to an image."""

import random

import numpy as np
import pytest
import torch
from helpers_unit import configured, noise
from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
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


def normalised(image, config):
    """[C, H, W] of an image, literally."""
    values = torch.tensor(np.array(image), dtype=torch.float32).reshape(*image.size[::-1], -1) / 255
    return ((values - torch.tensor(config.DATA.MEAN)) / torch.tensor(config.DATA.STD)).permute(2, 0, 1)


def part(transform, kind):
    """The only part of a transform of a kind."""
    (found,) = [step for step in transform.transforms if isinstance(step, kind)]
    return found


def applied(transform, image, seed=0):
    seed_everything(seed)
    return transform(image)


# Evaluation


def test_the_short_side_is_resized_in_the_recipes_proportion_at_every_size():
    for size in range(32, 1025):
        steps = eval_transform(configured(DATA__IMG_SIZE=size)).transforms
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
    found = eval_transform(config)(image)
    torch.testing.assert_close(found, normalised(wanted, config), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(300, 500), (500, 300), (20, 64)])
def test_without_cropping_the_whole_image_is_squashed(width, height):
    config = configured(DATA__IMG_SIZE=64, TEST__CROP=False)
    image = noise(1, (width, height))
    found = eval_transform(config)(image)
    wanted = normalised(image.resize((64, 64), Image.Resampling.BICUBIC), config)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_grey_image_stays_one_channel():
    config = grey_config(DATA__IMG_SIZE=32, TEST__CROP=False)
    image = noise(1, (32, 32)).convert("L")
    torch.testing.assert_close(eval_transform(config)(image), normalised(image, config), rtol=0, atol=1e-5)


def test_evaluation_draws_nothing_at_random():
    transform, image = eval_transform(configured(DATA__IMG_SIZE=48)), noise(1, (70, 60))
    assert torch.equal(applied(transform, image, 1), applied(transform, image, 2))


# Training


def test_the_recipes_augmentation_is_made_of_timms_parts():
    transform = train_transform(configured())
    assert [type(step) for step in transform.transforms] == [
        RandomResizedCropAndInterpolation,
        torch_transforms.RandomHorizontalFlip,
        RandAugment,
        MaybeToTensor,
        torch_transforms.Normalize,
        RandomErasing,
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
    erasing = part(transform, RandomErasing)
    assert (erasing.probability, erasing.max_count, erasing.per_pixel) == (0.25, 1, True)


def test_colour_jitter_stands_in_for_automatic_augmentation():
    jitter = part(train_transform(configured(AUG__AUTO_AUGMENT="none")), torch_transforms.ColorJitter)
    assert jitter.brightness == jitter.contrast == jitter.saturation == pytest.approx((0.6, 1.4))
    assert jitter.hue is None


def test_what_is_set_to_nothing_is_left_out():
    config = configured(AUG__AUTO_AUGMENT="none", AUG__COLOR_JITTER=0.0, AUG__HFLIP=0.0, AUG__REPROB=0.0)
    assert [type(step) for step in train_transform(config).transforms] == [
        RandomResizedCropAndInterpolation,
        MaybeToTensor,
        torch_transforms.Normalize,
    ]


@pytest.mark.parametrize(
    ("name", "kind"), [("rand-m5-n3", RandAugment), ("augmix-m3-w2", AugMixAugment), ("original", AutoAugment)]
)
def test_other_automatic_augmentations_are_timms_too(name, kind):
    assert part(train_transform(configured(AUG__AUTO_AUGMENT=name)), kind)


def still(**values):
    """A training transform of 32 x 32 images that changes nothing but what the values ask for."""
    fixed = {"DATA__IMG_SIZE": 32, "AUG__AUTO_AUGMENT": "none", "AUG__COLOR_JITTER": 0.0, "AUG__HFLIP": 0.0}
    fixed |= {"AUG__REPROB": 0.0, "AUG__SCALE": [1.0, 1.0], "AUG__RATIO": [1.0, 1.0]}
    return train_transform(configured(**{**fixed, **values}))


def test_an_image_that_nothing_changes_is_only_normalised():
    image = noise(1, (32, 32))
    torch.testing.assert_close(still()(image), normalised(image, configured()), rtol=0, atol=1e-5)


def test_a_flip_mirrors_the_image():
    image = noise(1, (32, 32))
    assert torch.equal(still(AUG__HFLIP=1.0)(image), still()(image).flip(-1))


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_fills_in_its_mode(mode):
    image = noise(1, (32, 32))
    changed = applied(still(AUG__REPROB=1.0, AUG__REMODE=mode), image) != still()(image)
    erased = applied(still(AUG__REPROB=1.0, AUG__REMODE=mode), image)[:, changed.any(0)]
    assert 0 < erased.shape[1] < 32 * 32
    different = len(torch.unique(erased[0]))
    assert {"pixel": different > 5, "rand": different == 1, "const": bool((erased == 0).all())}[mode]


def test_the_crops_size_follows_its_bounds():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 256, 3)))  # brighter downwards
    spans = []
    for seed in range(40):
        rows = applied(still(AUG__SCALE=[0.25, 0.5]), ramp, seed)[0].mean(1)
        spans.append(float(rows.max() - rows.min()) * configured().DATA.STD[0])
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


@pytest.mark.parametrize("name", ["rnad-m9", "rand-x9", "augmix-q3", "originally", "rand_m9", "AugMix"])
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
