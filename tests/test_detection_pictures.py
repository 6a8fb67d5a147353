"""Pictures of what is in images, and of what was found there."""

from unittest import mock

import pytest
import torch
from helpers_detection import CATEGORIES
from PIL import Image
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

from detection import pictures
from detection.coco import as_coco
from detection.pictures import draw, save_pictures
from utils.errors import UserError


@pytest.fixture
def save(tmp_path):
    """Writes grey images under names, draws each with one object of a segmentation, and gives the pictures' names."""

    def save_images(names, segmentation, with_masks, sizes=None, results=(), most=99):
        for name, size in zip(names, sizes or [(40, 30)] * len(names), strict=True):
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, "grey").save(path)
        images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
        marks = [
            {"id": number + 1, "image_id": number, "category_id": 5, "bbox": [4, 4, 9, 9], "segmentation": segmentation}
            for number in range(len(names))
        ]
        categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
        coco = as_coco({"images": images, "annotations": marks, "categories": categories})
        save_pictures(tmp_path / "out", tmp_path / "images", coco, results, most, 0.5, with_masks)
        return sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "out").rglob("*.png"))

    return save_images


def test_images_whose_names_are_alike_have_pictures_of_their_own(save):
    names = ["a/b.png", "a-b.png", "a-b.jpg", "../b.png"]
    assert save(names, [[4, 4, 12, 4, 12, 12]], with_masks=True) == [
        "out/comparisons/000-b.png",
        "out/comparisons/001-a-b.png",
        "out/comparisons/002-a-b.png",
        "out/comparisons/003-b.png",
        "out/overview.png",
    ]


def test_only_the_first_images_are_drawn_and_only_what_is_sure_enough(save, tmp_path):
    found = [
        {"image_id": 0, "category_id": 5, "bbox": [column, 4, 9, 9], "score": value}
        for column, value in ((2, 0.5), (20, 0.49))
    ]
    assert save(["a.png", "b.png", "c.png"], [], with_masks=False, results=found, most=2) == [
        "out/comparisons/000-a.png",
        "out/comparisons/001-b.png",
        "out/overview.png",
    ]
    sure = draw(torch.full((3, 30, 40), 128, dtype=torch.uint8), found[:1], CATEGORIES, with_masks=False)
    with Image.open(tmp_path / "out/comparisons/000-a.png") as picture:
        assert torch.equal(F.pil_to_tensor(picture)[..., -sure.shape[2] :], sure)


def test_the_overview_shows_the_first_comparisons_whole_in_the_middle_of_cells_of_one_size(save, tmp_path):
    names = [f"{number:02d}.png" for number in range(17)]
    save(names, [], with_masks=False, sizes=[(300, 20), (20, 300), *[(40, 30)] * 15])
    with Image.open(tmp_path / "out/overview.png") as overview:
        sheet = F.pil_to_tensor(overview)
    assert sheet.shape == (3, 5 * (224 + 10) + 10, 3 * (458 + 10) + 10)
    for left, wanted in ((10, (458, 15)), (478, (30, 224))):
        places = (sheet[:, 10:234, left : left + 458] != 255).any(dim=0).nonzero().flip(1)
        first, last = places.amin(0), places.amax(0)
        assert (last - first + 1).tolist() == pytest.approx(wanted, abs=1)
        assert (first + last).tolist() == pytest.approx([457, 223], abs=2)


def test_a_folder_that_cannot_be_made_is_named(save, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match=r"out cannot be made \(.*\): name another folder"):
        save(["a.png"], [], with_masks=False)


@pytest.mark.parametrize("with_masks", [False, True])
def test_a_mask_is_drawn_inside_its_box_where_masks_are(with_masks):
    pixels = torch.full((3, 600, 600), 128, dtype=torch.uint8)
    mark = {"bbox": [50, 50, 500, 500], "category_id": 5, "segmentation": [[300, 300, 400, 300, 400, 400, 300, 400]]}
    drawn = draw(pixels, [mark], CATEGORIES, with_masks)
    assert (drawn[:, 350, 350] != 128).any() == with_masks
    assert (drawn[:, 50, 300] != 128).any()  # the box


def test_boxes_and_masks_are_drawn_at_their_places_in_an_enlarged_picture():
    pixels = torch.full((3, 144, 300), 128, dtype=torch.uint8)
    mark = {"bbox": [20, 40, 60, 50], "category_id": 5, "segmentation": [[30, 70, 60, 70, 60, 80, 30, 80]]}
    boxes, both = (draw(pixels, [mark], CATEGORIES, with_masks) for with_masks in (False, True))
    assert both.shape == (3, 288, 600)
    for places, wanted in (((boxes != 128), [80, 40, 180, 160]), ((both != boxes), [140, 60, 160, 120])):
        _, rows, columns = places.nonzero(as_tuple=True)
        assert [rows.min(), columns.min(), rows.max(), columns.max()] == pytest.approx(wanted, abs=1)


def test_a_box_of_negative_extent_is_drawn_as_one_of_none():
    pixels = torch.full((3, 300, 300), 128, dtype=torch.uint8)
    boxes = [[50, 40, width, 60] for width in (-9, 0)]
    turned, empty = (draw(pixels, [{"bbox": box, "category_id": 5}], CATEGORIES, with_masks=False) for box in boxes)
    assert torch.equal(turned, empty) and (turned != pixels).any()


def test_marks_have_their_categorys_colour_and_its_name_and_how_sure_they_are(monkeypatch):
    drawn = mock.Mock(wraps=draw_bounding_boxes)
    monkeypatch.setattr(pictures, "draw_bounding_boxes", drawn)
    names = {number: f"class {number}" for number in range(40)}
    mark = {"bbox": [4, 4, 9, 9], "category_id": 3}
    marks = [mark, {**mark, "iscrowd": 1}, {**mark, "iscrowd": 0, "category_id": 39}, {**mark, "score": 0.876}]
    draw(torch.zeros(3, 30, 40, dtype=torch.uint8), marks, names, with_masks=False)
    _, _, labels, colours = drawn.call_args.args
    assert labels == ["class 3", "class 3 (crowd)", "class 39", "class 3 0.88"]
    assert colours[0] == colours[1] == colours[3] == (214, 39, 40) and colours[2] == colours[0]


def test_masks_that_are_not_scored_are_not_drawn_and_may_be_of_any_form(save):
    assert save(["a.png"], [[4, 4]], with_masks=False) == ["out/comparisons/000-a.png", "out/overview.png"]
