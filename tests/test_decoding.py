"""Image files of every kind as 8-bit RGB or grey."""

import io

import numpy as np
import pytest
from helpers_unit import examples, noise
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.decoding import as_mode

pytestmark = pytest.mark.filterwarnings("error")  # what PIL warns of is not done

ORANGE = (250, 120, 10)
SIZE = (12, 9)


def through_file(image, form="PNG", **options):
    """An image as PIL opens it from a file, not decoded yet."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return Image.open(buffer)


def grey_file(value, mode="I;16", form="PNG"):
    """A file of one grey of many bits."""
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    data = np.full(SIZE[::-1], value, dtype).tobytes()
    return through_file(Image.frombytes(mode, SIZE, data), form)


def palette(transparent):
    image = Image.new("P", SIZE)
    image.putpalette([*ORANGE, 0, 0, 0])
    return through_file(image, **({"transparency": b"\x40\xff"} if transparent else {}))


OPAQUE = {
    "RGB": lambda: through_file(Image.new("RGB", SIZE, ORANGE)),
    "RGB JPEG": lambda: through_file(Image.new("RGB", SIZE, ORANGE), "JPEG"),
    "CMYK JPEG": lambda: through_file(Image.new("RGB", SIZE, ORANGE).convert("CMYK"), "JPEG"),
    "CMYK TIFF": lambda: through_file(Image.new("RGB", SIZE, ORANGE).convert("CMYK"), "TIFF"),
    "YCbCr": lambda: Image.new("RGB", SIZE, ORANGE).convert("YCbCr"),
    "RGBA": lambda: through_file(Image.new("RGBA", SIZE, (*ORANGE, 255))),
    "RGBA half transparent": lambda: through_file(Image.new("RGBA", SIZE, (*ORANGE, 128))),
    "palette": lambda: palette(transparent=False),
    "palette with transparency": lambda: palette(transparent=True),
    "GIF": lambda: through_file(Image.new("RGB", SIZE, ORANGE), "GIF"),
    "WebP": lambda: through_file(Image.new("RGB", SIZE, ORANGE), "WEBP", lossless=True),
}
GREYS = {
    "grey": lambda: through_file(Image.new("L", SIZE, 120)),
    "grey JPEG": lambda: through_file(Image.new("L", SIZE, 120), "JPEG"),
    "grey with alpha": lambda: through_file(Image.new("LA", SIZE, (120, 60))),
    "16-bit PNG": lambda: grey_file(120 * 257),
    "16-bit TIFF": lambda: grey_file(120 * 257, form="TIFF"),
    "16-bit big-endian TIFF": lambda: grey_file(120 * 257, "I;16B", "TIFF"),
    "32-bit TIFF": lambda: grey_file(120 * 257, "I", "TIFF"),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_every_kind_of_coloured_image_comes_in_the_mode_asked_for(kind):
    for mode in ("RGB", "L"):
        found = as_mode(OPAQUE[kind](), mode)
        wanted = np.asarray(Image.new("RGB", SIZE, ORANGE).convert(mode), dtype=int)
        assert (found.mode, found.size) == (mode, SIZE)
        assert np.abs(np.asarray(found, dtype=int) - wanted).max() <= 3


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", GREYS)
def test_every_kind_of_grey_image_comes_in_the_mode_asked_for(kind, mode):
    found = as_mode(GREYS[kind](), mode)
    assert (found.mode, found.size) == (mode, SIZE)
    assert set(np.asarray(found).ravel()) == {120}


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_two_tones_are_black_and_white(mode):
    image = Image.new("1", SIZE)
    image.putpixel((3, 4), 1)
    found = np.asarray(as_mode(through_file(image), mode))
    assert set(found.ravel()) == {0, 255}
    assert (found[4, 3] == 255).all()


def test_numbers_of_no_known_range_are_refused():
    with pytest.raises(ValueError, match="floating-point numbers"):
        as_mode(through_file(Image.fromarray(np.full(SIZE[::-1], 0.5, np.float32)), "TIFF"), "RGB")


@given(value=st.integers(0, 65535), form=st.sampled_from(["PNG", "TIFF"]))
@examples(60)
def test_sixteen_bits_are_scaled_to_eight(value, form):
    assert set(np.asarray(as_mode(grey_file(value, form=form), "L")).ravel()) == {value // 257}


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (32768, 127), (65535, 255)])
def test_black_mid_grey_and_white_of_sixteen_bits_stay_what_they_are(value, grey):
    assert set(np.asarray(as_mode(grey_file(value), "RGB")).ravel()) == {grey}


@pytest.mark.parametrize(("value", "grey"), [(-5, 0), (-(2**31), 0), (65536, 255), (2**31 - 1, 255)])
def test_values_beyond_sixteen_bits_are_cut_off_instead_of_wrapped(value, grey):
    assert set(np.asarray(as_mode(grey_file(value, "I", "TIFF"), "L")).ravel()) == {grey}


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_image_of_the_mode_asked_for_is_not_changed(mode):
    image = noise(3).convert(mode)
    assert as_mode(through_file(image), mode).tobytes() == image.tobytes()


@pytest.mark.parametrize(("form", "is_turned"), [("JPEG", False), ("PNG", False), ("WEBP", False), ("TIFF", True)])
def test_only_tiff_files_are_turned_by_their_orientation(form, is_turned):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    file = through_file(noise(0, SIZE), form, exif=exif)
    assert file.size == as_mode(file, "RGB").size == (SIZE[::-1] if is_turned else SIZE)


def test_an_image_is_decoded_whole():
    buffer = io.BytesIO()
    noise(0).save(buffer, "PNG")
    cut = Image.open(io.BytesIO(buffer.getvalue()[:-200]))
    with pytest.raises(OSError, match="truncated"):
        as_mode(cut, "RGB")
