"""How near fast loading stays to the pixels of PIL and timm, and what it must share with them to the last one."""

import io
import random
import re

import numpy as np
import pytest
import torch
from helpers_unit import configured, noise
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from sklearn.datasets import load_sample_image
from timm.data import create_transform

from data.transforms import eval_transform, train_transform
from utils.seeding import seed_everything

SEEDS = range(40)


def picture(size, number=0):
    """An image with the smoothness of a photograph: blurred noise under finer noise."""
    coarse = noise(number, (max(size[0] // 12, 2), max(size[1] // 12, 2))).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(coarse, noise(number + 1, size), 0.08)


def jpeg(size, mode="RGB", **options):
    buffer = io.BytesIO()
    picture(size).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def loaded(config, file, seed):
    """[H, W, C] of a training image, as its worker makes it."""
    transform = train_transform(config)
    seed_everything(seed)
    return transform.augment(transform.decode(Image.open(io.BytesIO(file)))).permute(1, 2, 0)


def both(file, seed, size=64, **values):
    """A training image as loaded exactly, and fast."""
    return [
        loaded(configured(DATA__IMG_SIZE=size, DATA__LOADING=name, **values), file, seed).int()
        for name in ("exact", "fast")
    ]


STILL = {"AUG__AUTO_AUGMENT": "none", "AUG__COLOR_JITTER": 0.0}


# Exact


@pytest.mark.parametrize("augmentation", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", None])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_exact_loading_gives_the_pixels_of_timms_own_pipeline(augmentation, mode):
    file = jpeg((150, 110), mode)
    timm = create_transform(
        64,
        is_training=True,
        color_jitter=0.4,
        auto_augment=augmentation,
        interpolation="bicubic",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    config = configured(DATA__IMG_SIZE=64, DATA__MEAN=[0.0] * 3, AUG__AUTO_AUGMENT=augmentation or "none")
    for seed in SEEDS:
        seed_everything(seed)
        wanted = timm(Image.open(io.BytesIO(file)).convert("RGB"))
        found = loaded(config, file, seed).permute(2, 0, 1)
        assert found.dtype == torch.uint8
        assert torch.equal(found / 255, wanted)


# Fast


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(150, 110), (65, 91), (40, 30), (64, 64), (127, 127)])
def test_fast_loading_is_within_two_levels_of_exact_where_it_decodes_at_full_size(size, interpolation):
    file = jpeg(size)
    for seed in SEEDS:
        exact, fast = both(file, seed, **STILL, DATA__INTERPOLATION=interpolation)
        assert exact.shape == fast.shape == (64, 64, 3)
        assert (exact - fast).abs().max() <= 2


@pytest.mark.parametrize("size", [(300, 224), (600, 450), (1201, 907)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_fast_loading_of_large_images_is_within_five_levels_of_exact_on_average(size, options):
    file = jpeg(size, **options)
    for seed in SEEDS:
        exact, fast = both(file, seed, **STILL)
        assert (exact - fast).abs().float().mean() <= 5


@pytest.mark.parametrize(("name", "most"), [("flower.jpg", 1), ("china.jpg", 4)])  # a soft one and one of fine patterns
def test_fast_loading_of_photographs_is_near_exact(name, most):
    half = load_sample_image(name)
    half = np.concatenate([half, half[:, ::-1]], 1)
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([half, half[::-1]])).save(buffer, "JPEG", quality=90)  # 1280 x 854
    for seed in range(20):
        exact, fast = both(buffer.getvalue(), seed, 224, **STILL)
        difference = (exact - fast).abs()
        assert difference.float().mean() <= most
        assert difference.max() <= 50


def test_fast_loading_decodes_at_a_smaller_size_only_what_is_twice_as_large_as_needed(monkeypatch):
    scales = []
    draft = JpegImageFile.draft

    def noting(image, mode, size):
        width, drafted = image.width, draft(image, mode, size)
        scales.append(drafted[1][2] / width)
        return drafted

    monkeypatch.setattr(JpegImageFile, "draft", noting)
    config = configured(DATA__IMG_SIZE=64, DATA__LOADING="fast", AUG__SCALE=[1.0, 1.0], AUG__RATIO=[1.0, 1.0], **STILL)
    for side, wanted in ((127, []), (128, [1 / 2]), (255, [1 / 2]), (256, [1 / 4]), (1100, [1 / 8])):
        scales.clear()
        loaded(config, jpeg((side, side)), 0)
        assert scales == wanted


@pytest.mark.parametrize("size", [(90, 70), (300, 260)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
def test_fast_loading_refuses_what_exact_loading_refuses_with_the_same_words(size, options):
    file = jpeg(size, **options)
    for end in range(0, len(file), len(file) // 60):
        said = []
        for name in ("exact", "fast"):
            with pytest.raises((OSError, SyntaxError)) as caught:
                loaded(configured(DATA__IMG_SIZE=32, DATA__LOADING=name, **STILL), file[:end], 0)
            said.append(re.sub("0x[0-9a-f]+", "", str(caught.value)))
        assert said[0] == said[1]


@pytest.mark.parametrize(
    ("form", "mode"),
    [("PNG", "RGB"), ("PNG", "LA"), ("PNG", "I;16"), ("GIF", "P"), ("TIFF", "CMYK"), ("JPEG", "L"), ("JPEG", "CMYK")],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_fast_loading_takes_images_of_every_kind(form, mode, channels):
    buffer = io.BytesIO()
    image = picture((150, 110))
    (image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)).save(buffer, form)
    values = {"MODEL__GMA__IN_DIM": channels, **STILL}
    for seed in SEEDS:
        exact, fast = both(buffer.getvalue(), seed, **values)
        assert exact.shape == fast.shape == (64, 64, channels)
        assert (exact - fast).abs().max() <= 2


@pytest.mark.parametrize("augmentation", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "none"])
def test_fast_and_exact_loading_draw_the_same(augmentation):
    file, states = jpeg((150, 110)), {}
    for name in ("exact", "fast"):
        config = configured(DATA__IMG_SIZE=64, DATA__LOADING=name, AUG__AUTO_AUGMENT=augmentation)
        for seed in SEEDS:
            loaded(config, file, seed)
            state = random.random(), float(np.random.random()), float(torch.rand(()))
            assert states.setdefault(seed, state) == state


def test_evaluation_is_always_exact():
    image, outputs = picture((300, 260)), []
    for name in ("exact", "fast"):
        transform = eval_transform(configured(DATA__IMG_SIZE=64, DATA__LOADING=name))
        outputs.append(transform.augment(transform.decode(image)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (9, 1), (1, 60)])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_fast_loading_of_a_few_pixels_is_exact_loading_where_none_are_drawn(size, mode):
    buffer = io.BytesIO()
    image = picture((60, 60)).resize(size)
    (image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)).save(buffer, "PNG")
    for seed in SEEDS:
        exact, fast = both(buffer.getvalue(), seed, **STILL)
        assert (exact - fast).abs().max() <= 2
