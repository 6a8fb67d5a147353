"""What is done to a batch on the device."""

import pytest
import torch
from helpers_unit import CPU, configured
from timm.data.random_erasing import RandomErasing
from torchvision import transforms as torch_transforms

from data.finish import Normalize, NormalizeAndErase
from utils.seeding import seed_everything

WITHOUT_ERASING = {"AUG__REPROB": 0.0}


def every_value(channels=3):
    """Images in which each channel has each of the 256 values."""
    values = torch.arange(256, dtype=torch.uint8)
    return torch.stack([values.roll(shift).view(16, 16) for shift in range(2 * channels)]).view(2, channels, 16, 16)


def as_loaded(images):
    """The same images as a loader gives them: [B, H, W, C] in memory."""
    return images.contiguous(memory_format=torch.channels_last)


def erased(images, seed, **values):
    finish = NormalizeAndErase(configured(**values), CPU)
    seed_everything(seed)
    return finish(images)


@pytest.mark.parametrize("is_channels_last", [True, False])
@pytest.mark.parametrize("finish", [Normalize, NormalizeAndErase])
def test_pixels_are_normalised_to_the_bits_that_torchvision_gives(finish, is_channels_last):
    config = configured(**WITHOUT_ERASING, CHANNELS_LAST=is_channels_last)
    normalise = torch_transforms.Normalize(torch.tensor(config.DATA.MEAN), torch.tensor(config.DATA.STD))
    to_tensor = torch_transforms.ToTensor()
    for images in (every_value(), as_loaded(every_value())):
        wanted = torch.stack([normalise(to_tensor(image.permute(1, 2, 0).numpy())) for image in images])
        found = finish(config, CPU)(images)
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


def test_grey_pixels_are_normalised():
    config = configured(**WITHOUT_ERASING, MODEL__GMA__IN_DIM=1, DATA__MEAN=[0.3], DATA__STD=[0.4])
    images = every_value(1)
    assert torch.equal(Normalize(config, CPU)(images), (images / 255 - 0.3) / 0.4)


@pytest.mark.parametrize(
    ("is_channels_last", "layout"), [(True, torch.channels_last), (False, torch.contiguous_format)]
)
def test_images_come_in_the_layout_asked_for(is_channels_last, layout):
    finish = Normalize(configured(CHANNELS_LAST=is_channels_last), CPU)
    for images in (every_value(), as_loaded(every_value())):
        assert finish(images).is_contiguous(memory_format=layout)


def test_the_pixels_of_the_batch_are_left_alone():
    images = every_value()
    erased(images, 0, AUG__REPROB=1.0)
    assert torch.equal(images, every_value())


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("count", [1, 3])
def test_erasing_is_timms(mode, count):
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = erased(images, 0, AUG__REPROB=0.0)
    seed_everything(5)
    RandomErasing(0.5, mode=mode, max_count=count, device="cpu")(wanted)
    assert torch.equal(erased(images, 5, AUG__REPROB=0.5, AUG__REMODE=mode, AUG__RECOUNT=count), wanted)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_fills_in_its_mode(mode):
    images = torch.full((4, 3, 32, 32), 77, dtype=torch.uint8)
    before = erased(images, 0, AUG__REPROB=0.0)
    after = erased(images, 0, AUG__REPROB=1.0, AUG__REMODE=mode)
    for image, whole in zip(after, before, strict=True):
        changed = (image != whole).any(0)
        assert 0 < changed.sum() < 32 * 32
        different = len(image[0, changed].unique())
        assert {"pixel": different > 5, "rand": different == 1, "const": bool((image[:, changed] == 0).all())}[mode]


def test_erasing_is_left_to_chance():
    images = torch.full((200, 3, 32, 32), 77, dtype=torch.uint8)
    whole = erased(images, 0, AUG__REPROB=0.0)
    share = (erased(images, 0, AUG__REPROB=0.25) != whole).flatten(1).any(1).float().mean()
    assert 0.15 < share < 0.35


@pytest.mark.gpu
def test_a_gpu_gives_the_bits_of_the_cpu_and_erases_by_the_seed_too():
    images, gpu = every_value(), torch.device("cuda")
    config = configured(**WITHOUT_ERASING)
    assert torch.equal(Normalize(config, gpu)(images.to(gpu)).cpu(), Normalize(config, CPU)(images))
    erase, outputs = NormalizeAndErase(configured(AUG__REPROB=1.0), gpu), []
    for _ in range(2):
        seed_everything(3)
        outputs.append(erase(images.to(gpu)))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], Normalize(config, gpu)(images.to(gpu)))
