"""The charts of a scoring report: every class is seen, at any number of them."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from utils.reporting.calibration import calibrate
from utils.reporting.charts import draw_confusion, draw_reliability
from utils.reporting.outcomes import Outcomes


def outcomes_of(targets, predictions):
    targets, predictions = np.array(targets), np.array(predictions)
    sure = np.full(len(targets), 0.9)
    return Outcomes(targets, predictions, sure, sure, targets == predictions)


@pytest.fixture
def written(monkeypatch):
    """Text that was drawn into axes and beside them, in the order of drawing."""
    found, plain = [], Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda axes, x, y, s, **style: found.append((x, y, s)) or plain(axes, x, y, s, **style)
    )
    return found


def colours(path):
    """Which pixels are blue, and which are orange."""
    red, _, blue = np.moveaxis(np.asarray(Image.open(path).convert("RGB")).astype(int), 2, 0)
    return blue - red > 20, red - blue > 20


def test_few_classes_have_numbers_in_their_cells(tmp_path, written):
    draw_confusion(tmp_path / "m.png", outcomes_of([0, 0, 1, 1, 1], [0, 1, 1, 1, 1]), ["cat", "dog"])
    assert written == [(0, 0, "1"), (1, 0, "1"), (1, 1, "3")]


def test_what_was_said_beyond_the_classes_with_images_stands_in_the_last_column(tmp_path, written):
    draw_confusion(tmp_path / "m.png", outcomes_of([3, 3, 5], [3, 0, 7]), [f"class {i}" for i in range(9)])
    assert written == [(0, 0, "1"), (2, 0, "1"), (2, 1, "1")]


@pytest.mark.parametrize(("classes", "side"), [(61, 16), (100, 10), (1000, 2)])
def test_each_of_many_classes_has_the_same_number_of_pixels(tmp_path, classes, side):
    numbers = np.arange(classes)
    predictions = numbers.copy()
    predictions[[0, 20]] = 40
    draw_confusion(tmp_path / "m.png", outcomes_of(numbers, predictions), [""] * classes)
    legend = round(80 * max(side * classes / 1000, 1)) + side * classes
    blue, orange = (mask[:, :legend] for mask in colours(tmp_path / "m.png"))
    assert blue.sum() == (classes - 2) * side**2
    (rows, columns), cell = orange.nonzero(), list(range(side)) * side
    assert sorted(rows - rows.min()) == sorted([*cell, *(20 * side + place for place in cell)])
    assert sorted(columns - columns.min()) == sorted(2 * cell)


def test_more_than_a_thousand_classes_share_pixels(tmp_path):
    numbers = np.arange(1001)
    draw_confusion(tmp_path / "m.png", outcomes_of(numbers, numbers), [""] * 1001)
    assert max(Image.open(tmp_path / "m.png").size) < 1300


@pytest.mark.parametrize("name", ["$x$", "$\\frac$", "a_b^{c", "a<b>", "x" * 99, "", "Größe"])
def test_any_name_can_be_drawn(tmp_path, name):
    draw_confusion(tmp_path / "m.png", outcomes_of([0], [0]), [name])
    assert Image.open(tmp_path / "m.png").width < 900


@pytest.mark.parametrize("classes", [1, 2, 25, 26, 60])
def test_any_number_of_named_classes_can_be_drawn(tmp_path, classes):
    numbers = np.arange(classes)
    draw_confusion(tmp_path / "m.png", outcomes_of(numbers, numbers[::-1]), [f"class {i}" for i in numbers])
    assert Image.open(tmp_path / "m.png").width < 2000


@pytest.mark.parametrize("are_right", [[True] * 4, [False] * 4, [True, True, False, False]])
def test_reliability_says_its_error_and_its_bins(tmp_path, are_right, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda _axes, title, **_style: titles.append(title))
    bins = calibrate(np.array(are_right), np.array([0.3, 0.6, 0.6, 1.0]))
    draw_reliability(tmp_path / "r.png", bins)
    assert titles == [f"ECE {bins.expected_error:.2%} in 15 bins of equal width"]
    assert Image.open(tmp_path / "r.png").size == (560, 640)
