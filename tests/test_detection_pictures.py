"""Pictures of what is in images, and of what was found there."""

import pytest
import torch
from helpers_detection import CATEGORIES
from PIL import Image

from detection.coco import as_coco
from detection.pictures import draw, save_pictures


@pytest.fixture
def save(tmp_path):
    """Writes grey images under names, draws each with one object of a segmentation, and gives the pictures' names."""

    def save_images(names, segmentation, with_masks):
        for name in names:
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), "grey").save(path)
        images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
        marks = [
            {"id": number + 1, "image_id": number, "category_id": 5, "bbox": [4, 4, 9, 9], "segmentation": segmentation}
            for number in range(len(names))
        ]
        categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
        coco = as_coco({"images": images, "annotations": marks, "categories": categories})
        save_pictures(tmp_path / "out", tmp_path / "images", coco, [], len(names), 0.5, with_masks)
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


@pytest.mark.parametrize("with_masks", [False, True])
def test_a_mask_is_drawn_inside_its_box_where_masks_are(with_masks):
    pixels = torch.full((3, 600, 600), 128, dtype=torch.uint8)
    mark = {"bbox": [50, 50, 500, 500], "category_id": 5, "segmentation": [[300, 300, 400, 300, 400, 400, 300, 400]]}
    drawn = draw(pixels, [mark], CATEGORIES, with_masks)
    assert (drawn[:, 350, 350] != 128).any() == with_masks
    assert (drawn[:, 50, 300] != 128).any()  # the box


def test_masks_that_are_not_scored_are_not_drawn_and_may_be_of_any_form(save):
    assert save(["a.png"], [[4, 4]], with_masks=False) == ["out/comparisons/000-a.png", "out/overview.png"]
