"""COCO's average precision: by hand, against pycocotools run on files, and over ranks."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_detection import CATEGORIES, add_crowd, write_coco
from helpers_unit import said_by, start_ranks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.coco import as_coco, encode_mask, read_coco, silence
from detection.metrics import BoxScore, DetectionSums, MaskScore, score
from utils.dist import join_world
from utils.metrics import describe

NAMES = list(CATEGORIES.values())


def truth(*boxes, crowd=None, category=5):
    """One image of 100 x 100 with boxes [x, y, width, height] of one category."""
    annotations = [
        {"id": number, "image_id": 4, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, box in enumerate(boxes, 1)
    ]
    if crowd:
        annotations.append({**annotations[0], "id": 99, "bbox": crowd, "area": crowd[2] * crowd[3], "iscrowd": 1})
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    image = {"id": 4, "file_name": "a.png", "width": 100, "height": 100}
    return as_coco({"images": [image], "annotations": annotations, "categories": categories})


def found(*rows, category=5):
    """Results of rows (score, box)."""
    return [{"image_id": 4, "category_id": category, "bbox": box, "score": value} for value, box in rows]


def ap(coco, results):
    return score(coco, results, 1, with_masks=False).box_ap


def test_one_of_two_objects_found_gives_precision_1_up_to_half_the_recall():
    coco = truth([10, 10, 20, 20], [60, 60, 20, 20])
    hit, miss = (0.9, [10, 10, 20, 20]), (0.8, [10, 60, 20, 20])
    reached = score(coco, found(hit, miss), 1, with_masks=False)
    assert reached.box_ap == pytest.approx(100 * 51 / 101)  # of 101 recalls from 0 to 1
    assert reached.box_ar == pytest.approx(50)
    assert reached.box_ap_small == reached.box_ap and math.isnan(reached.box_ap_large)
    assert reached.images == 1 and math.isnan(reached.loss)


@pytest.mark.parametrize(("size", "name"), [(20, "small"), (50, "medium"), (98, "large")])
def test_an_object_counts_among_those_of_its_size(size, name):
    reached = score(truth([0, 0, size, size]), found((0.9, [0, 0, size, size])), 1, with_masks=False)
    sizes = {each: getattr(reached, f"box_ap_{each}") for each in ("small", "medium", "large")}
    assert [sizes.pop(name), reached.box_ap_of_classes[1], reached.box_ar] == pytest.approx([100, 100, 100])
    assert all(map(math.isnan, sizes.values()))


def test_a_surer_miss_halves_the_precision():
    coco = truth([10, 10, 20, 20])
    assert ap(coco, found((0.9, [10, 60, 20, 20]), (0.8, [10, 10, 20, 20]))) == pytest.approx(50)


def test_a_box_counts_for_the_overlaps_that_it_reaches():
    coco = truth([0, 0, 50, 10])
    reached = score(coco, found((0.9, [0, 0, 36, 10])), 1, with_masks=False)  # overlap 0.72: of 0.5, 0.55, ... 0.7
    assert reached.box_ap == pytest.approx(50)
    assert (reached.box_ap50, reached.box_ap75) == (pytest.approx(100), pytest.approx(0))


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong():
    coco = truth([10, 10, 20, 20], crowd=[50, 0, 50, 100])
    in_crowd, right = (0.95, [60, 30, 20, 20]), (0.9, [10, 10, 20, 20])
    assert ap(coco, found(in_crowd, right)) == pytest.approx(100)
    assert ap(truth([10, 10, 20, 20]), found(in_crowd, right)) == pytest.approx(50)


def test_an_object_found_twice_is_right_once():
    coco = truth([10, 10, 20, 20], [60, 60, 20, 20])
    rows = ((0.9, [10, 10, 20, 20]), (0.8, [10, 10, 20, 20]), (0.7, [60, 60, 20, 20]))
    assert ap(coco, found(*rows)) == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_more_than_ten_objects_of_an_image_count():
    boxes = [[20 * (number % 5), 20 * (number // 5), 15, 15] for number in range(20)]
    reached = score(truth(*boxes), found(*((0.9, box) for box in boxes)), 1, with_masks=False)
    assert reached.box_ar == reached.box_ap_of_classes[1] == pytest.approx(100)


def test_a_masks_size_is_its_own_and_not_its_boxs():
    square, frame = np.zeros((100, 100), np.uint8), np.zeros((100, 100), np.uint8)
    square[10:20, 10:20] = 1
    frame[30:90, 30:90] = 1
    frame[31:89, 31:89] = 0  # 236 pixels in a box of 60 x 60
    coco = truth([10, 10, 10, 10])
    coco.dataset["annotations"][0]["segmentation"] = encode_mask(square)
    wrong, right = found((0.9, [30, 30, 60, 60]), (0.8, [10, 10, 10, 10]))
    results = [{**wrong, "segmentation": encode_mask(frame)}, {**right, "segmentation": encode_mask(square)}]
    reached = score(coco, results, 1, with_masks=True)
    assert reached.mask_ap_small == pytest.approx(50) and reached.box_ap_small == pytest.approx(100)
    boxes = "box AP 50.000 box AP50 50.000 box AP75 50.000"
    assert describe(reached) == f"{boxes} mask AP 50.000 mask AP50 50.000 mask AP75 50.000"
    assert describe(score(coco, results, 1, with_masks=False)) == boxes


def test_nothing_found_scores_0_and_a_class_with_nothing_to_find_no_number():
    reached = score(truth([10, 10, 20, 20]), [], 1, with_masks=False)
    assert reached.box_ap == 0
    assert [math.isnan(value) for value in reached.box_ap_of_classes] == [True, False, True]


# Against pycocotools, on files


def guesses(coco, seed):
    """Objects as a detector finds them, by image number: some as they are, some moved, some made up."""
    generator = np.random.default_rng(seed)
    answers = []
    for image in coco.dataset["images"]:
        height, width = image["height"], image["width"]
        boxes, masks, labels = [], [], []
        for annotation in coco.imgToAnns[image["id"]]:
            for _ in range(generator.integers(0, 3)):
                moved = np.roll(coco.annToMask(annotation), tuple(generator.integers(-4, 5, 2)), (0, 1))
                x, y, w, h = np.array(annotation["bbox"]) + generator.integers(-3, 4, 4)
                boxes.append([x, y, x + max(w, 1), y + max(h, 1)])
                masks.append(moved)
                labels.append(list(CATEGORIES).index(annotation["category_id"]) if generator.random() < 0.8 else 0)
        answers.append(
            {
                "boxes": torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32),
                "labels": torch.tensor(labels, dtype=torch.int64),
                "scores": torch.tensor(generator.random(len(boxes)), dtype=torch.float32),
                "masks": torch.tensor(np.array(masks).reshape(-1, 1, height, width), dtype=torch.float32) * 0.6,
            }
        )
    return answers


def summed(coco, answers, numbers, classes=NAMES, with_masks=True):
    sums = DetectionSums(coco, list(classes), with_masks, is_main=True)
    for number in numbers:
        sums.add([answers[number]], torch.tensor([number]))
    return sums


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Annotations of 24 images, with a crowd, and their file."""
    root = tmp_path_factory.mktemp("many")
    write_coco(root, "val2017", 24, seed=5, edit=add_crowd)
    return root / "annotations" / "instances_val2017.json"


def directly(path, results, kind):
    """pycocotools by itself, on files."""
    content = json.loads(path.read_text())
    for number, annotation in enumerate(content["annotations"], 1):
        annotation["id"] = number
    numbered = path.with_name("numbered.json")
    numbered.write_text(json.dumps(content))
    with silence():
        coco = COCO(str(numbered))
        evaluation = COCOeval(coco, coco.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_scores_are_pycocotools_own_of_the_written_results(many, tmp_path):
    coco = read_coco(many)
    sums = summed(coco, guesses(coco, 1), range(24))
    reached = sums.total()
    assert isinstance(reached, MaskScore) and reached.images == 24
    for kind, name, key in (("bbox", "box", "segmentation"), ("segm", "mask", "bbox")):
        rows = [{field: value for field, value in result.items() if field != key} for result in sums.results]
        (tmp_path / "results.json").write_text(json.dumps(rows))
        wanted = directly(many, tmp_path / "results.json", kind)
        measures = [f"{name}_{part}" for part in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")]
        got = [getattr(reached, measure) for measure in measures]
        assert got == pytest.approx([100 * x if x >= 0 else math.nan for x in wanted[:6]], nan_ok=True, abs=1e-9)
        assert getattr(reached, f"{name}_ar") == pytest.approx(100 * wanted[8], abs=1e-9)
        of_classes = getattr(reached, f"{name}_ap_of_classes")
        assert 0 < got[0] < 100 and np.mean(of_classes) == pytest.approx(got[0])


def test_scoring_again_gives_the_same_score(many):
    coco = read_coco(many)
    assert repr(summed(coco, guesses(coco, 2), range(24)).total()) == repr(
        summed(coco, guesses(coco, 2), reversed(range(24))).total()
    )


def test_results_are_of_cocos_form(many):
    coco = read_coco(many)
    answer = guesses(coco, 3)[0]
    sums = summed(coco, [answer], [0])
    sums.total()
    result = sums.results[0]
    x1, y1, x2, y2 = answer["boxes"][0].tolist()
    assert result["image_id"] == coco.dataset["images"][0]["id"]
    assert result["category_id"] == list(CATEGORIES)[answer["labels"][0]]
    assert result["bbox"] == [x1, y1, x2 - x1, y2 - y1]
    assert result["score"] == answer["scores"][0].item()
    assert result["segmentation"] == encode_mask((answer["masks"][0, 0] >= 0.5).byte().numpy())


def test_classes_are_matched_by_name_and_those_that_the_data_lacks_are_left_out(many):
    coco = read_coco(many)
    answer = {
        "boxes": torch.tensor([[1.0, 2, 30, 40]] * 4),
        "labels": torch.arange(4),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]),
    }
    sums = summed(coco, [answer], [0], classes=["bar", "cat", "square", "disc"], with_masks=False)
    assert isinstance(sums.total(), BoxScore)
    assert [(result["category_id"], round(result["score"], 1)) for result in sums.results] == [
        (90, 0.9),
        (2, 0.7),
        (5, 0.6),
    ]


# Over ranks


def of_two_ranks(path):
    """What a rank of two gets as the score, having scored every other image."""
    coco = read_coco(Path(path))
    with join_world("cpu", 60) as world:
        sums = DetectionSums(coco, NAMES, True, world.is_main)
        answers = guesses(coco, 1)
        for number in range(world.rank, 24, 2):
            sums.add([answers[number]], torch.tensor([number]))
        return repr(sums.total()), len(sums.results)


@pytest.mark.slow
def test_two_ranks_get_the_score_of_one(many):
    coco = read_coco(many)
    alone = summed(coco, guesses(coco, 1), range(24))
    wanted = [repr(alone.total()), len(alone.results)]
    assert [said_by(rank) for rank in start_ranks("test_detection_metrics", "of_two_ranks", many)] == [wanted, wanted]
