"""COCO-format data as batches: what of it is kept, how it is numbered and augmented, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from helpers_detection import CATEGORIES, add_crowd, configured, write_coco
from helpers_unit import ALONE, batch_here_and_spawned, equal
from PIL import Image
from pycocotools.coco import COCO

from detection.coco import categories, decode_mask, encode_mask, read_coco, silence
from detection.data import CocoSource, Packed, build_eval_data, build_train_data
from detection.task import detection
from utils.errors import UserError

pytest_plugins = ["detection_scenes"]


def annotations(root, split="train2017"):
    return root / "annotations" / f"instances_{split}.json"


def edited(root, split, edit):
    """Changes a file of annotations."""
    content = json.loads(annotations(root, split).read_text())
    edit(content)
    annotations(root, split).write_text(json.dumps(content))


@pytest.fixture
def tree(tmp_path):
    """A tree of its own, to be changed."""
    for split in ("train2017", "val2017"):
        write_coco(tmp_path, split, 4, seed=3)
    return tmp_path


def source_of(root, with_masks=True, split="train2017"):
    return CocoSource(root / split, read_coco(annotations(root, split)), with_masks)


def test_categories_with_gaps_are_numbered_in_the_order_of_their_ids(tree):
    edited(tree, "train2017", lambda content: content["categories"].reverse())
    content = json.loads(annotations(tree).read_text())
    source, numbers = source_of(tree), {category: number for number, category in enumerate(CATEGORIES)}
    assert source.classes == ["square", "disc", "bar"]
    for index, image in enumerate(content["images"]):
        wanted = [numbers[a["category_id"]] for a in content["annotations"] if a["image_id"] == image["id"]]
        assert source.read(index)[0].objects["labels"].tolist() == wanted


def test_an_image_without_objects_is_kept_with_empty_ones(tree):
    picture, _ = source_of(tree).read(3)
    assert len(source_of(tree)) == 4
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in picture.objects.items()}
    width, height = picture.image.size
    assert shapes == {
        "boxes": ((0, 4), torch.float32),
        "labels": ((0,), torch.int64),
        "masks": ((0, height, width), torch.uint8),
    }


def test_crowds_are_no_objects_to_learn_but_stay_in_the_truth(tree):
    before = len(source_of(tree).read(0)[0].objects["labels"])
    edited(tree, "train2017", add_crowd)
    assert len(source_of(tree).read(0)[0].objects["labels"]) == before
    assert [a["iscrowd"] for a in read_coco(annotations(tree)).dataset["annotations"]][-1] == 1


def test_boxes_are_cut_to_the_image_and_those_of_which_nothing_is_left_are_dropped(tree):
    boxes = [[-5, -6, 15, 16], [60, 10, 10, 10], [70, 10, 9, 9], [3, 3, 0, 8], [1, 2, 3, 4]]  # of an image of 64 x 48

    def edit(content):
        first = content["annotations"][0]
        content["annotations"] = [{**first, "bbox": box} for box in boxes]

    edited(tree, "train2017", edit)
    objects = source_of(tree).read(0)[0].objects
    assert objects["boxes"].tolist() == [[0, 0, 10, 10], [60, 10, 64, 20], [1, 2, 4, 6]]
    assert len(objects["masks"]) == len(objects["labels"]) == 3


def test_masks_of_every_form_are_pycocotools_masks(tree):
    polygons = [[5.0, 4.0, 30.5, 6.0, 20.0, 40.0], [40, 30, 60, 30, 60, 45, 40, 45]]
    with silence():
        coco = COCO(str(annotations(tree)))
    width, height = coco.dataset["images"][0]["width"], coco.dataset["images"][0]["height"]
    image = coco.dataset["images"][0]["id"]
    whole = coco.annToMask({"image_id": image, "segmentation": polygons})
    column_by_column = whole.flatten(order="F")
    changes = np.flatnonzero(np.diff(np.concatenate([[0], column_by_column]))).tolist()
    runs = np.diff([0, *changes, len(column_by_column)]).tolist()
    assert 0 < whole.sum() < whole.size
    for form in (polygons, {"size": [height, width], "counts": runs}, encode_mask(whole)):
        assert (decode_mask(form, width, height) == whole).all()


@pytest.mark.parametrize(
    "lose",
    [
        lambda annotation, key: annotation.pop(key),
        lambda annotation, key: annotation.update({key: None}),
        lambda annotation, key: annotation.update({key: math.nan}),
    ],
    ids=["missing", "null", "NaN"],
)
def test_what_scoring_takes_for_granted_is_filled_in(tree, lose):
    def edit(content):
        for annotation in content["annotations"]:
            for key in ("id", "iscrowd", "area"):
                lose(annotation, key)

    edited(tree, "train2017", edit)
    for number, annotation in enumerate(read_coco(annotations(tree)).dataset["annotations"], 1):
        _, _, width, height = annotation["bbox"]
        assert (annotation["id"], annotation["iscrowd"], annotation["area"]) == (number, 0, width * height)


def test_sides_of_images_may_be_written_as_fractions(tree):
    wanted = source_of(tree).read(0)[0].objects["masks"]

    def edit(content):
        for image in content["images"]:
            image.update(width=float(image["width"]), height=float(image["height"]))

    edited(tree, "train2017", edit)
    assert torch.equal(source_of(tree).read(0)[0].objects["masks"], wanted)
    assert len(source_of(tree).read(3)[0].objects["masks"]) == 0


def test_boxes_and_masks_are_flipped_with_their_image_and_by_the_seed_alone(coco_tree):
    data = build_train_data(configured("AUG.HFLIP", 0.5, data=coco_tree), ALONE)
    samples, flips = data.loader.dataset, set()
    for index in range(3):
        plain, _ = samples.source.read(index)
        for seed in range(8):
            picture, _, complaint = samples[index, seed]
            again, _, _ = samples[index, seed]
            assert torch.equal(picture.image, again.image) and complaint == ""
            width = picture.image.shape[-1]
            boxes, whole = picture.objects["boxes"], plain.objects["boxes"]
            is_flipped = not torch.equal(boxes, whole)
            flips.add(is_flipped)
            mirrored = torch.stack([width - whole[:, 2], whole[:, 1], width - whole[:, 0], whole[:, 3]], dim=1)
            assert torch.equal(boxes, mirrored if is_flipped else whole)
            masks = plain.objects["masks"]
            assert torch.equal(picture.objects["masks"], masks.flip(-1) if is_flipped else masks)
            for (x1, y1, x2, y2), mask in zip(boxes.long().tolist(), picture.objects["masks"], strict=True):
                assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0
    assert flips == {False, True}


def test_pixels_are_flipped_with_their_objects(coco_tree):
    samples = build_train_data(
        configured("AUG.HFLIP", 1.0, "AUG.COLOR_JITTER", 0.0, data=coco_tree), ALONE
    ).loader.dataset
    picture, _, _ = samples[0, 5]
    plain = torch.from_numpy(np.array(samples.source.read(0)[0].image)).permute(2, 0, 1)
    assert torch.equal(picture.image, plain.flip(-1))


def test_batches_are_the_same_for_any_number_of_loader_processes(coco_tree):
    def batches(workers):
        data = build_train_data(configured("DATA.NUM_WORKERS", workers, data=coco_tree), ALONE)
        data.set_epoch(1)
        return [(batch.images, batch.targets, numbers.tolist()) for batch, numbers, _ in data.loader]

    for (images, targets, numbers), (others, other_targets, other_numbers) in zip(batches(0), batches(1), strict=True):
        assert numbers == other_numbers
        assert all(map(torch.equal, images, others))
        for objects, other_objects in zip(targets, other_targets, strict=True):
            assert all(torch.equal(objects[name], other_objects[name]) for name in objects)


@pytest.mark.parametrize("steps", [1, 2])
def test_images_of_an_update_are_all_upright_or_all_not(tmp_path, steps):
    write_coco(tmp_path, "train2017", 24, seed=3)  # a third of them upright
    data = build_train_data(configured("TRAIN.ACCUMULATION_STEPS", steps, data=tmp_path), ALONE)
    upright = [image.shape[1] > image.shape[2] for batch, _, _ in data.loader for image in batch.images]
    updates = [set(upright[start : start + 2 * steps]) for start in range(0, 24, 2 * steps)]
    assert sorted(updates, key=max) == [{False}] * (8 // steps) + [{True}] * (4 // steps)


def test_loaders_may_have_processes_that_are_spawned(coco_tree):
    for build in (build_train_data, build_eval_data):
        assert equal(*batch_here_and_spawned(build(configured(data=coco_tree), ALONE).loader))


def test_a_broken_image_is_a_complaint_beside_a_blank_one(tree):
    (tree / "train2017" / "001.png").write_bytes(b"no image")
    picture, _, complaint = build_train_data(configured(data=tree), ALONE).loader.dataset[1, 0]
    assert "001.png is broken" in complaint
    assert picture.image.unique().tolist() == [0] and len(picture.objects["boxes"]) == 0


def test_an_image_that_is_too_narrow_to_be_scaled_is_a_complaint(tree):
    Image.new("RGB", (1, 5000)).save(tree / "train2017" / "000.png")
    edited(tree, "train2017", lambda content: content["images"][0].update(width=1, height=5000))
    _, _, complaint = build_train_data(configured("DATA.LONG_SIDE", 1333, data=tree), ALONE).loader.dataset[0, 0]
    assert "000.png is broken (it is 1 x 5000, of which DATA.LONG_SIDE 1333 leaves not a pixel's width)" in complaint


def test_another_sample_takes_a_broken_ones_place_where_that_is_asked_for(tree):
    (tree / "train2017" / "001.png").write_bytes(b"no image")
    samples = build_train_data(configured("DATA.ON_ERROR", "skip", data=tree), ALONE).loader.dataset
    picture, _, complaint = samples[1, 0]
    assert "001.png is broken" in complaint and picture.number != 1
    assert len(picture.objects["labels"]) == len(samples.source.read(picture.number)[0].objects["labels"])


def test_an_image_of_another_size_than_its_annotations_say_is_broken(tree):
    edited(tree, "train2017", lambda content: content["images"][0].update(width=50))
    _, _, complaint = build_train_data(configured(data=tree), ALONE).loader.dataset[0, 0]
    assert "000.png is broken (it is 64 x 48, its annotations are for 50 x 48)" in complaint


def test_evaluation_changes_nothing_and_takes_images_one_by_one(coco_tree):
    data = build_eval_data(configured("DATA.BATCH_SIZE", 4, data=coco_tree), ALONE)
    seen = [(batch.images, numbers.tolist()) for batch, numbers, _ in data.loader]
    assert [numbers for _, numbers in seen] == [[number] for number in range(7)]
    for (image,), (number,) in seen:
        plain = np.array(data.loader.dataset.source.read(number)[0].image)
        assert torch.equal(image, torch.from_numpy(plain).permute(2, 0, 1))


def test_a_packed_list_gives_back_what_it_was_made_of():
    items = [{"a": [1, 2.5, "x"]}, None, (), "text" * 100]
    packed = Packed(items)
    assert list(packed) == items and len(packed) == 4
    assert list(Packed([])) == []


# What is refused


def drop(part):
    return lambda content: content.pop(part)


def refuse(part, place, **values):
    return lambda content: content[part][place].update(values)


BAD = [
    (drop("annotations"), "holds no list of annotations"),
    (lambda content: content["images"][1].pop("width"), r"images\[1\] has no width"),
    (lambda content: content["annotations"][2].pop("bbox"), r"annotations\[2\] has no bbox"),
    (refuse("annotations", 1, category_id=3), r"annotations\[1\] has category_id 3, of none of the categories"),
    (refuse("annotations", 1, image_id=3), r"annotations\[1\] has image_id 3, of none of the images"),
    (refuse("annotations", 0, bbox=[1, 2, 3]), r"annotations\[0\] has bbox \[1, 2, 3\]"),
    (refuse("annotations", 0, bbox=[1, math.nan, 3, 4]), r"annotations\[0\] has bbox \[1, None, 3, 4\]"),
    (refuse("annotations", 0, area="9"), r"annotations\[0\] has area '9': give a number"),
    (refuse("annotations", 0, image_id=[1]), r"annotations\[0\] has image_id \[1\]: give a number or text"),
    (refuse("images", 1, file_name=5), r"images\[1\] has file_name 5: give text"),
    (refuse("images", 0, id=[1]), r"images\[0\] has id \[1\]: give a number or text"),
    (refuse("categories", 1, name=None), r"categories\[1\] has no name"),
    (refuse("categories", 0, name="disc"), "several categories of the name disc"),
    (refuse("categories", 0, id=5), "3 categories of 2 ids"),
    (lambda content: content["annotations"][0].pop("segmentation"), r"annotations\[0\] has no segmentation"),
]


@pytest.mark.parametrize(("edit", "message"), BAD, ids=[message for _, message in BAD])
def test_annotations_that_cannot_work_are_refused_by_name(tree, edit, message):
    edited(tree, "train2017", edit)
    with pytest.raises(UserError, match=message) as error:
        build_train_data(configured(data=tree), ALONE)
    assert "instances_train2017.json" in str(error.value)


@pytest.mark.parametrize(
    "polygons", [[[1, 2, 3, 4]], [[1, 2, 3, 4, 5, math.nan]], [1, 2, 3, 4, 5, 6]], ids=["2 points", "NaN", "flat"]
)
def test_polygons_that_cannot_be_drawn_are_refused(tree, polygons):
    edited(tree, "train2017", refuse("annotations", 1, segmentation=polygons))
    with pytest.raises(UserError, match=r"annotations\[1\] .* no list of polygons of 3 points or more"):
        build_train_data(configured(data=tree), ALONE)


def test_boxes_alone_are_enough_for_detectors_without_masks(tree):
    def edit(content):
        for annotation in content["annotations"]:
            del annotation["segmentation"]

    edited(tree, "train2017", edit)
    for name in ("retinanet", "faster_rcnn"):
        data = build_train_data(configured("MODEL.DETECTOR.NAME", name, data=tree), ALONE)
        assert "masks" not in data.loader.dataset[0, 0][0].objects


def test_what_is_missing_is_named(tree):
    with pytest.raises(UserError, match="name the data with --data-path"):
        build_train_data(configured(), ALONE)
    with pytest.raises(UserError, match=r"instances_none\.json cannot be read"):
        build_train_data(configured("DATA.TRAIN_ANNOTATIONS", "annotations/instances_none.json", data=tree), ALONE)
    with pytest.raises(UserError, match=r"images2017 is no folder"):
        build_train_data(configured("DATA.TRAIN_IMAGES", "images2017", data=tree), ALONE)
    with pytest.raises(UserError, match="do not fill a batch of 9"):
        build_train_data(configured("DATA.BATCH_SIZE", 9, data=tree), ALONE)
    annotations(tree).write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        build_train_data(configured(data=tree), ALONE)


def test_validation_data_with_nothing_to_find_is_refused(tree):
    edited(tree, "val2017", lambda content: content.update(annotations=[]))
    with pytest.raises(UserError, match="has no object to find"):
        build_eval_data(configured(data=tree), ALONE)


def test_categories_to_learn_and_to_score_must_be_the_same(tree):
    edited(tree, "val2017", lambda content: content["categories"].append({"id": 91, "name": "ring"}))
    config = configured(data=tree)
    with pytest.raises(UserError, match=r"\(only in validation: ring\): give both files the same categories"):
        detection(config).open_data(config, ALONE)


def test_classes_are_named_in_the_order_of_their_ids(tree):
    assert categories(read_coco(annotations(tree))) == CATEGORIES
