"""Label maps with a palette, and comparisons side by side."""

from unittest import mock

import numpy as np
import pytest
import torch
from helpers_segmentation import CLASSES, pair, write_pairs
from helpers_unit import CPU
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from segmentation import pictures
from segmentation.data import PairSource
from segmentation.labels import IGNORE, MOST_CLASSES, to_classes
from segmentation.metrics import SegmentationSums
from segmentation.pictures import PictureSums, draw_comparison, draw_overview, label_map_image, palette
from utils.errors import OneRankError

pytest_plugins = ["segments"]


def test_every_class_has_a_colour_of_its_own_that_is_not_black():
    colours = palette(MOST_CLASSES)
    assert len({tuple(colour) for colour in colours.tolist()}) == MOST_CLASSES
    assert (colours.max(axis=1) > 100).all()
    assert np.array_equal(colours[:20], palette(20))


def test_neighbouring_classes_look_different():
    colours = palette(150).astype(int)
    assert np.abs(np.diff(colours, axis=0)).sum(axis=1).min() > 100


@pytest.mark.parametrize("reduce", [True, False])
def test_label_maps_are_read_back_as_the_classes_that_they_are_of(tmp_path, reduce):
    classes = np.array([[0, 1, 2], [2, IGNORE, 0]], np.uint8)
    label_map_image(classes, 3, reduce).save(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert np.array_equal(to_classes(image, 3, reduce), classes)
        shown = np.asarray(image.convert("RGB"))
    assert np.array_equal(shown[0], palette(3))
    assert shown[1, 1].tolist() == [0, 0, 0]


def panels(figure):
    return {axis.get_title(): axis.images[0].get_array() for axis in figure.axes}


def test_a_comparison_shows_image_truth_prediction_and_errors():
    pixels, labels = pair(0)
    truth = to_classes(Image.fromarray(labels), 3, True)
    prediction = np.where(truth == IGNORE, 1, truth).astype(np.uint8)
    prediction[10:14, 20:30] = (truth[10:14, 20:30] + 1) % 3
    figure = draw_comparison(Image.fromarray(pixels), truth, prediction, CLASSES)
    share = 100 * 40 / (truth != IGNORE).sum()
    image, shown_truth, shown_prediction, errors = panels(figure).values()
    assert list(panels(figure))[3] == f"errors: {share:.1f} %"
    assert np.array_equal(image, pixels)
    assert shown_truth[0, 0].tolist() == [0, 0, 0]
    assert np.array_equal(shown_prediction, palette(3)[prediction])
    red = (errors == (230, 40, 40)).all(axis=2)
    assert red.sum() == 40
    assert red[10:14, 20:30].all()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == CLASSES


def test_a_comparison_of_a_grey_image_without_labels_is_grey_and_names_what_was_predicted():
    truth, prediction = np.full((20, 20), IGNORE, np.uint8), np.ones((20, 20), np.uint8)
    figure = draw_comparison(Image.new("L", (20, 20), 90), truth, prediction, CLASSES)
    assert list(panels(figure)) == ["image", "truth", "prediction", "errors: 0.0 %"]
    assert (panels(figure)["image"] == np.full((20, 20, 3), 90)).all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [CLASSES[1]]


def test_a_comparison_names_the_classes_that_occur_and_the_largest_at_most():
    names = [f"class {number}" for number in range(150)]
    classes = np.zeros((30, 30), np.uint8)
    classes.flat[:300] = np.arange(300) % 30 + 60
    figure = draw_comparison(Image.new("L", (30, 30)), classes, classes, names)
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[0] == "class 0"
    assert len(texts) == 24
    assert all(60 <= int(text.split()[1]) < 90 for text in texts[1:])


@pytest.mark.parametrize("size", [(300, 40), (40, 300), (20, 20)])
def test_names_and_panels_stay_inside_the_picture(size):
    classes = np.arange(size[0] * size[1]).reshape(size[::-1]).astype(np.uint8) % 20
    names = [f"a rather long name {number}" for number in range(20)]
    figure = draw_comparison(Image.new("RGB", size), classes, classes, names)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.legends[0].get_window_extent()
    width, height = canvas.get_width_height()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= min(axis.get_window_extent().y0 for axis in figure.axes) <= height


def test_names_with_dollar_signs_are_drawn_as_they_are():
    classes = np.zeros((20, 20), np.uint8)
    figure = draw_comparison(Image.new("L", (20, 20)), classes, classes, [r"$100 \or $200"])
    FigureCanvasAgg(figure).draw()  # would fail at a formula that is none


class OneClass:
    """Answers with the same class everywhere."""

    @staticmethod
    def of(targets):
        logits = torch.zeros(len(targets), 3, *targets.shape[1:])
        logits[:, 2] = 1
        return logits


@pytest.mark.parametrize("reduce", [True, False])
def test_label_maps_and_the_first_comparisons_are_written_beside_an_unchanged_score(
    pairs, tmp_path, monkeypatch, reduce
):
    drawn = mock.Mock(wraps=draw_comparison)
    monkeypatch.setattr(pictures, "draw_comparison", drawn)
    source, plain = PairSource(pairs, "validation"), SegmentationSums(3, CPU)
    sums = PictureSums(SegmentationSums(3, CPU), source, iter([3, 1]), tmp_path / "out", 3, CLASSES, reduce)
    for index in (3, 1):
        (image, label_map), _ = source.read(index)
        targets = torch.from_numpy(to_classes(label_map, 3, True))[None]
        plain.add(OneClass.of(targets), targets)
        sums.add(OneClass.of(targets), targets)
    assert sums.total() == plain.total()
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert found == ["comparisons/01.png", "labels/01.png", "labels/03.png"]
    with Image.open(tmp_path / "out/labels/03.png") as written:
        assert written.size == (97, 33)
        assert np.asarray(written).min() == np.asarray(written).max() == 2 + reduce
    ((shown, truth, prediction, names),) = [call.args for call in drawn.call_args_list]
    assert np.array_equal(shown, image) and np.array_equal(truth, targets[0])
    assert prediction.shape == truth.shape and (prediction == 2).all() and names == CLASSES


def test_a_picture_that_cannot_be_written_ends_scoring_at_once_on_whichever_rank_it_is(pairs, tmp_path):
    (tmp_path / "labels/04.png/in the way").mkdir(parents=True)
    plain, targets = SegmentationSums(3, CPU), torch.zeros(1, 48, 48, dtype=torch.uint8)
    sums = PictureSums(plain, PairSource(pairs, "validation"), iter([4, 0]), tmp_path, 0, CLASSES, True)
    with pytest.raises(OneRankError, match=r"labels/04\.png cannot be written"):
        sums.add(OneClass.of(targets), targets)
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["04.png"]


def test_a_folder_of_pictures_that_cannot_be_made_is_named(pairs, tmp_path):
    (tmp_path / "labels").touch()
    targets = torch.zeros(1, 48, 48, dtype=torch.uint8)
    source = PairSource(pairs, "validation")
    sums = PictureSums(SegmentationSums(3, CPU), source, iter([0]), tmp_path, 0, CLASSES, True)
    with pytest.raises(OneRankError, match=r"labels cannot be made \(.*\): choose another --save-pictures"):
        sums.add(OneClass.of(targets), targets)


@pytest.mark.parametrize(("images", "compared", "rows"), [(5, 2, 2), (3, 24, 3)])
def test_the_overview_has_no_more_rows_than_there_are_comparisons(tmp_path, images, compared, rows):
    write_pairs(tmp_path, "validation", [(20, 10)] * images, seed=0)
    (tmp_path / "comparisons").mkdir()
    for number in range(rows):
        Image.new("RGB", (20, 10)).save(tmp_path / f"comparisons/0{number}.png")
    draw_overview(tmp_path, PairSource(tmp_path, "validation"), compared)
    with Image.open(tmp_path / "overview.png") as overview:
        assert overview.size == (20, 10 * rows)


def test_the_overview_has_the_first_comparisons_below_one_another(pairs, tmp_path):
    source = PairSource(pairs, "validation")
    (tmp_path / "comparisons").mkdir()
    for number in range(5):
        Image.new("RGB", (30 + number, 10), (40 * number, 0, 0)).save(tmp_path / f"comparisons/0{number}.png")
    draw_overview(tmp_path, source, 24)
    with Image.open(tmp_path / "overview.png") as overview:
        assert overview.size == (33, 40)
        assert [overview.convert("RGB").getpixel((16, 5 + 10 * row)) for row in range(4)] == [
            (40 * row, 0, 0) for row in range(4)
        ]
