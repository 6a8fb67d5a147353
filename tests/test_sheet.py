"""Contact sheets: where pictures and captions go, whatever the images and the texts are."""

import numpy as np
import pytest
from helpers_unit import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from utils.errors import UserError
from utils.sheet import PLAIN, RIGHT, WRONG, contact_sheet, write_png

SIZE = 64
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F", "PA", "La", "RGBa")


def colour(sheet, box):
    """The colours of a part of a sheet."""
    return {colour for _, colour in sheet.crop(box).getcolors(maxcolors=2**24)}


def plain(rgb, size=(40, 40)):
    return Image.new("RGB", size, rgb)


def dark(*lines):
    return [(line, PLAIN) for line in lines]


def ink(sheet):
    """Pixels that are not white."""
    return int((np.asarray(sheet) != 255).any(axis=2).sum())


def test_pictures_fill_rows_from_the_left_at_equal_distances():
    numbers = [(10 * number, 0, 0) for number in range(5)]
    sheet = contact_sheet([(plain(rgb), []) for rgb in numbers], columns=2, size=SIZE)
    assert sheet.size == (2 * (SIZE + 10) + 10, 3 * (SIZE + 10) + 10)
    for number, rgb in enumerate(numbers):
        left, top = 10 + number % 2 * (SIZE + 10), 10 + number // 2 * (SIZE + 10)
        assert colour(sheet, (left, top, left + SIZE, top + SIZE)) == {rgb}
    assert colour(sheet, (10 + SIZE + 10, sheet.height - SIZE, sheet.width, sheet.height)) == {(255, 255, 255)}


def test_there_are_no_more_columns_than_pictures_and_none_without_pictures():
    assert contact_sheet([(plain(0), [])], columns=7, size=SIZE).size == (SIZE + 20, SIZE + 20)
    assert contact_sheet([], columns=7, size=SIZE).size == (10, 10)


@pytest.mark.parametrize(("size", "wanted"), [((400, 100), (64, 16)), ((1, 500), (1, 64)), ((3, 9), (21, 64))])
def test_shape_of_a_picture_is_kept_and_it_lies_in_the_middle(size, wanted):
    pixels = np.asarray(contact_sheet([(plain((9, 9, 9), size), [])], columns=1, size=SIZE))[10:-10, 10:-10, 0]
    rows, columns = np.nonzero(pixels < 128)
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == wanted
    assert abs(columns.min() - (63 - columns.max())) <= 1
    assert abs(rows.min() - (63 - rows.max())) <= 1


@pytest.mark.parametrize("mode", MODES)
def test_images_of_every_mode_are_drawn(mode):
    sheet = contact_sheet([(Image.new(mode, (30, 20)), dark("a caption"))], columns=1, size=SIZE)
    assert sheet.mode == "RGB" and ink(sheet) > 50


def test_transparent_parts_are_white():
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    sheet = contact_sheet([(image, [])], columns=1, size=SIZE)
    assert colour(sheet, (10, 10, 42, 74)) == {(255, 255, 255)}
    assert colour(sheet, (42, 10, 74, 74)) == {(200, 0, 0)}


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_images_of_more_bits_are_stretched_from_black_to_white(kind):
    values = np.repeat(np.array([[3, 4, 5]], dtype=kind), 3, axis=0)
    pixels = np.asarray(contact_sheet([(Image.fromarray(values), [])], columns=1, size=3))
    assert pixels[10:13, 10:13, 0].tolist() == [[0, 128, 255]] * 3


def test_each_line_has_its_colour():
    picture, lines = plain((255, 255, 255)), [("lllll", RIGHT), ("lllll", WRONG), ("lllll", WRONG)]
    sheet = contact_sheet([(picture, lines)], columns=1, size=SIZE)
    height = (sheet.height - SIZE - 20) // 3
    rows = [np.asarray(sheet)[10 + SIZE + i * height : 10 + SIZE + (i + 1) * height] for i in range(3)]
    darkest = [row.reshape(-1, 3)[row.reshape(-1, 3).sum(1).argmin()] for row in rows]
    assert darkest[0][1] > darkest[0][0] and darkest[1][0] > darkest[1][1] and darkest[2][0] > darkest[2][1]


def test_a_row_is_as_high_as_its_longest_caption():
    one = contact_sheet([(plain(0), dark("a")), (plain(0), dark("a"))], columns=1, size=SIZE)
    more = contact_sheet([(plain(0), dark("a")), (plain(0), dark("a", "b", "c"))], columns=1, size=SIZE)
    line = (one.height - 2 * SIZE - 30) // 2
    assert more.height == one.height + 2 * line


def test_long_captions_end_in_the_cell_and_short_ones_are_whole():
    short = contact_sheet([(plain(0), dark("a name"))], columns=1, size=SIZE)
    long = contact_sheet([(plain(0), dark("a name that goes on " * 9))], columns=1, size=SIZE)
    assert long.size == short.size
    assert colour(long, (SIZE + 11, 0, long.width, long.height)) == {(255, 255, 255)}
    assert ink(long) > ink(short)


@examples(60)
@given(st.lists(st.text(st.characters(codec=None), max_size=60), max_size=3), st.integers(1, 80))
def test_no_text_is_too_strange_and_none_leaves_its_cell(lines, size):
    sheet = contact_sheet([(plain(0), dark(*lines))] * 2, columns=2, size=size)
    assert sheet.size[0] == 2 * (size + 10) + 10


def test_letters_that_the_font_lacks_and_broken_names_of_files_are_drawn_as_something():
    sheet = contact_sheet([(plain(0), dark("猫\ud83d\n\udcff\0"))], columns=1, size=SIZE)
    assert ink(sheet.crop((0, SIZE + 10, sheet.width, sheet.height))) > 10


def test_png_is_written_whole_or_not_at_all(tmp_path):
    sheet = contact_sheet([(plain((1, 2, 3)), dark("a"))], columns=1)
    write_png(sheet, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as read:
        assert read.format == "PNG" and read.tobytes() == sheet.tobytes()
    with pytest.raises(UserError, match="cannot be written"):
        write_png(sheet, tmp_path / "missing" / "sheet.png")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
