"""detection/train.py and detection/test.py as a user starts them: killed and gone on with, on ranks, on bad input."""

import csv
import json
import math
import shutil
import signal
from argparse import Namespace

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from detection.coco import as_coco, categories, read_coco
from detection.metrics import score
from detection.pictures import draw
from detection.scoring import ScoredDetections
from detection.test import write_reports, write_table
from models import GroupMixFormer
from utils import checkpoint

pytest_plugins = ["detection_scenes"]
pytestmark = pytest.mark.slow

PARTS = ("model", "ema", "optimizer", "scaler", "progress", "best", "classes")


def exact(run):
    """The metrics of a run without the speeds, to the last bit."""
    return [{key: repr(value) for key, value in line.items()} for line in run.numbers()]


def pixels_of(path):
    with Image.open(path) as image:
        return F.pil_to_tensor(image)


@pytest.fixture
def scoring_words(trained_detector, coco_tree, tiny_detector):
    """What follows detection/test.py."""
    return ["--cfg", tiny_detector, "--data-path", coco_tree, "--resume", trained_detector.folder / "best.pth"]


def test_a_run_tells_its_scores_and_keeps_its_best(trained_detector):
    scores = [line for line in trained_detector.metrics() if "box_ap" in line]
    assert [line["epoch"] for line in scores] == [0, 1]
    assert {"box_ap", "box_ap50", "mask_ap", "mask_ap75", "ema_box_ap", "ema_mask_ap75"} <= set(scores[0])
    assert all(0 <= line["ema_box_ap"] <= 100 and line["loss"] is None for line in scores)
    best = trained_detector.checkpoint("best.pth")["best"]
    assert best["box_ap"] == max(line["ema_box_ap"] for line in scores)
    assert trained_detector.checkpoint()["classes"] == ["square", "disc", "bar"]
    assert " * box AP " in trained_detector.result.stdout and "best so far: box AP" in trained_detector.result.stdout
    losses = [line["loss"] for line in trained_detector.updates()]
    assert len(losses) == 12 and all(map(math.isfinite, losses))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    start, call, trained_detector, detector_words, tmp_path, differences
):
    words = detector_words(tmp_path / "output")
    fault = {"at": "update 9", "do": "kill", "rank": 0, "mark": str(tmp_path / "killed")}
    killed = start("tests/survival_faults.py", json.dumps([fault]), "detection/train.py", *words)
    assert killed.code == -signal.SIGKILL and "Train: [1/2][3/6]" in killed.stdout
    result = call("detection/train.py", *words)
    assert result.code == 0, result.stderr
    assert "going on from" in result.stdout and "epoch 1, update 2" in result.stdout
    run = type(trained_detector)(result, tmp_path / "output" / "tiny" / "run")
    for part in PARTS:
        assert not differences(run.checkpoint()[part], trained_detector.checkpoint()[part], part)
    assert exact(run) == exact(trained_detector)


def test_two_ranks_train_and_score_every_image_once(start, call, detector_words, coco_tree, tmp_path):
    words = detector_words(tmp_path, "TRAIN.EPOCHS 1 TRAIN.EMA_DECAY 0.0 MODEL.DETECTOR.SCORE_THRESHOLD 0")
    trained = start("detection/train.py", *words, ranks=2)
    assert trained.code == 0, trained.stderr
    reached = [json.loads(line) for line in (tmp_path / "tiny" / "run" / "metrics.jsonl").read_text().splitlines()]
    last = tmp_path / "tiny" / "run" / "last.pth"
    words = [*words[:4], "--resume", last, "--json", tmp_path / "one.json", "--detections", tmp_path / "found.json"]
    alone = call("detection/test.py", *words, "--opts", "MODEL.DETECTOR.SCORE_THRESHOLD", 0)
    assert alone.code == 0, alone.stderr
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["images"] == 7 and one["box_ap"] == reached[-1]["box_ap"] and one["mask_ap"] == reached[-1]["mask_ap"]
    seen = {result["image_id"] for result in json.loads((tmp_path / "found.json").read_text())}
    assert seen == set(read_coco(coco_tree / "annotations" / "instances_val2017.json").imgs)


def test_scoring_writes_what_it_says_in_every_form(call, scoring_words, coco_tree, tmp_path):
    table, detections, pictures = tmp_path / "classes.csv", tmp_path / "found.json", tmp_path / "pictures"
    words = ["--ema", "--json", tmp_path / "score.json", "--classes", table, "--detections", detections]
    words += ["--save-pictures", pictures, "--pictures", 5, "--min-score", 0]
    result = call("detection/test.py", *scoring_words, *words, "--opts", "MODEL.DETECTOR.SCORE_THRESHOLD", 0.0)
    assert result.code == 0, result.stderr
    written = json.loads((tmp_path / "score.json").read_text())
    assert f"box AP {written['box_ap']:.3f}" in result.stdout and f"mask AP {written['mask_ap']:.3f}" in result.stdout
    (row,) = [line.split() for line in result.stdout.splitlines() if line.startswith("mask ")]
    assert row[1] == f"{written['mask_ap']:.3f}" and row[7] == f"{written['mask_ar']:.3f}"
    assert written["images"] == 7 and written["ema"] is True and written["ranks"] == 1

    coco = read_coco(coco_tree / "annotations" / "instances_val2017.json")
    found = json.loads(detections.read_text())
    again = score(coco, found, 7, with_masks=True)
    assert len(found) > 20 and (again.box_ap, again.mask_ap) == (written["box_ap"], written["mask_ap"])

    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["square", "disc", "bar"]
    assert [{name: str(value) for name, value in of_class.items()} for of_class in written["classes"]] == rows
    assert [float(row["box_ap"]) for row in rows] == pytest.approx(again.box_ap_of_classes, nan_ok=True)

    assert sorted(path.name for path in pictures.iterdir()) == ["comparisons", "overview.png"]
    names = sorted(path.name for path in (pictures / "comparisons").iterdir())
    assert names == [f"{number:03d}-{number:03d}.png" for number in range(5)]
    image = coco.dataset["images"][0]
    marks = [result for result in found if result["image_id"] == image["id"]]
    shown = draw(pixels_of(coco_tree / "val2017" / image["file_name"]), marks, categories(coco), with_masks=True)
    assert torch.equal(pixels_of(pictures / "comparisons" / names[0])[..., -shown.shape[2] :], shown)


def test_pictures_show_masks_where_the_detector_finds_masks(call, coco_tree, tiny_detector, tmp_path):
    coco = read_coco(coco_tree / "annotations" / "instances_val2017.json")
    image, names = coco.dataset["images"][0], categories(coco)
    pixels = pixels_of(coco_tree / "val2017" / image["file_name"])
    for name, with_masks in (("mask_rcnn", True), ("faster_rcnn", False)):
        words = ["--cfg", tiny_detector, "--data-path", coco_tree, "--random-weights", "--save-pictures"]
        result = call("detection/test.py", *words, tmp_path / name, "--opts", "MODEL.DETECTOR.NAME", name)
        assert result.code == 0, result.stderr
        assert len(list((tmp_path / name / "comparisons").iterdir())) == 7
        shown = pixels_of(tmp_path / name / "comparisons" / "000-000.png")
        truth, nothing = (draw(pixels, marks, names, with_masks) for marks in (coco.imgToAnns[image["id"]], []))
        assert torch.equal(shown[..., : truth.shape[2]], truth)
        assert torch.equal(shown[..., -truth.shape[2] :], nothing)  # of which random weights are sure


def test_scores_are_computed_in_the_precision_that_is_asked_for(call, scoring_words, tmp_path):
    result = call("detection/test.py", *scoring_words, "--precision", "bf16", "--json", tmp_path / "score.json")
    assert result.code == 0, result.stderr
    assert "images/s, bf16 on 1 x cpu" in result.stdout
    assert json.loads((tmp_path / "score.json").read_text())["precision"] == "bf16"


def test_train_scores_with_eval_as_test_does(call, scoring_words):
    trained, tested = (
        call(f"detection/{name}.py", *scoring_words, *flags) for name, *flags in (("train", "--eval"), ("test",))
    )
    assert trained.code == tested.code == 0, trained.stderr + tested.stderr
    line = next(line for line in tested.stdout.splitlines() if line.startswith(" * box AP"))
    assert line in trained.stdout


def test_a_run_starts_from_a_classifiers_checkpoint(call, detector_words, tmp_path):
    torch.manual_seed(3)
    network = GroupMixFormer(embed_dims=(40,) * 4, depths=(1,) * 4, mlp_ratios=(1,) * 4, num_classes=5)
    torch.save({"model": network.state_dict()}, tmp_path / "classifier.pth")
    opts = "TRAIN.EPOCHS 1 TRAIN.BASE_LR 0 TRAIN.WARMUP_LR 0 TRAIN.EMA_DECAY 0 MODEL.FREEZE_STATISTICS True"
    words = detector_words(tmp_path, f"{opts} MODEL.DETECTOR.NAME retinanet")
    result = call("detection/train.py", *words, "--pretrained", tmp_path / "classifier.pth")
    assert result.code == 0, result.stderr
    assert "classifier.pth the backbone is taken, without final norm and head: all else starts afresh" in result.stdout
    assert "MODEL.FREEZE_STATISTICS" not in result.stdout
    weights = checkpoint.load(tmp_path / "tiny" / "run" / "last.pth")["model"]
    kept = {name: value for name, value in network.state_dict().items() if not name.startswith(("head.", "norm."))}
    assert all(torch.equal(weights[f"detector.backbone.body.{name}"], value) for name, value in kept.items())


def test_frozen_statistics_of_fresh_weights_are_told_of(call, detector_words, tmp_path):
    words = detector_words(tmp_path, "TRAIN.EPOCHS 1 MODEL.DETECTOR.NAME retinanet MODEL.FREEZE_STATISTICS True")
    result = call("detection/train.py", *words)
    assert "MODEL.FREEZE_STATISTICS keeps the batch norms' statistics as they are" in result.stdout


def test_broken_images_are_replaced_and_listed_where_that_is_asked_for(call, coco_tree, tiny_detector, tmp_path):
    tree = shutil.copytree(coco_tree, tmp_path / "tree")
    (tree / "train2017" / "001.png").write_bytes(b"no image")
    words = ["--cfg", tiny_detector, "--data-path", tree, "--output", tmp_path, "--tag", "run"]
    opts = ["--opts", "TRAIN.EPOCHS", "1", "TRAIN.EMA_DECAY", "0", "MODEL.DETECTOR.NAME", "retinanet"]
    stopped = call("detection/train.py", *words, *opts)
    assert stopped.code == 2 and "001.png is broken" in stopped.errors[0]
    result = call("detection/train.py", *words, *opts, "DATA.ON_ERROR", "skip", "DATA.MAX_BROKEN", "0.5")
    assert result.code == 0, result.stderr
    assert "001.png is broken" in (tmp_path / "tiny" / "run" / "broken.txt").read_text()


def test_a_class_with_nothing_to_find_has_an_empty_cell_in_the_table(tmp_path):
    coco = as_coco(
        {
            "images": [{"id": 1, "file_name": "a.png", "width": 50, "height": 50}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 2, "bbox": [9, 9, 20, 20], "area": 400, "iscrowd": 0}
            ],
            "categories": [{"id": 2, "name": "square"}, {"id": 5, "name": "disc"}],
        }
    )
    scored = ScoredDetections(score(coco, [], 1, with_masks=False), [], coco, 1.0)
    (tmp_path / "link.csv").symlink_to(tmp_path / "a.csv")  # which a report goes through
    write_reports(Namespace(json=None, detections=None, classes=tmp_path / "link.csv"), scored, {})
    assert (tmp_path / "a.csv").read_text() == "class,box_ap\nsquare,0.0\ndisc,\n"


def test_a_table_of_classes_may_have_any_letters(tmp_path, ascii_locale):
    write_table(tmp_path / "a.csv", [{"class": "Käse", "box_ap": 1.0}])
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "class,box_ap\nKäse,1.0\n"


BAD = [
    ("train", ["--opts", "DATA.IMG_SIZE", "800"], "unknown key DATA.IMG_SIZE"),
    ("train", ["--opts", "MODEL.DETECTOR.NAME", "yolo"], "choose one of mask_rcnn, faster_rcnn, retinanet"),
    ("train", ["--opts", "DATA.SHORT_SIDES", "[800]"], "above DATA.LONG_SIDE 64"),
    ("train", ["--data-path", "nowhere"], "instances_train2017.json cannot be read"),
    ("test", [], "no weights to score"),
    ("test", ["--random-weights", "--json", "nowhere/score.json"], "--json nowhere/score.json: name a file"),
    ("test", ["--random-weights", "--classes", "nowhere/a.csv"], "--classes nowhere/a.csv: name a file"),
    ("test", ["--random-weights", "--detections", "nowhere/a.json"], "--detections nowhere/a.json: name a file"),
    ("test", ["--random-weights", "--save-pictures", "README.md"], "README.md is a file: name a folder"),
    ("test", ["--random-weights", "--pictures", "0"], "draw at least 1"),
    ("test", ["--random-weights", "--min-score", "2"], "--min-score 2.0: give a score from 0 to 1"),
]


@pytest.mark.parametrize(("program", "flags", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_told_of_in_one_line(call, detector_words, tmp_path, program, flags, message):
    result = call(f"detection/{program}.py", *detector_words(tmp_path / "output"), *flags)
    assert result.code == 2 and len(result.stderr.splitlines()) == 1
    assert message in result.errors[0]
    assert not (tmp_path / "output").exists()


def test_weights_of_another_detector_are_refused(call, scoring_words):
    result = call("detection/test.py", *scoring_words, "--opts", "MODEL.DETECTOR.NAME", "retinanet")
    assert result.code == 2 and "does not fit the network" in result.errors[0]


def test_classes_that_the_checkpoint_does_not_know_are_refused(call, scoring_words, coco_tree, tmp_path):
    tree = shutil.copytree(coco_tree, tmp_path / "tree")
    path = tree / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"disc"', '"ring"'))
    result = call("detection/test.py", *scoring_words, "--data-path", tree)
    assert result.code == 2 and "the checkpoint does not know the classes ring" in result.errors[0]


def test_classes_that_the_data_lacks_are_left_out_and_told_of(call, scoring_words, coco_tree, tmp_path):
    tree, found = shutil.copytree(coco_tree, tmp_path / "tree"), []
    path = tree / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    for part, key in (("categories", "id"), ("annotations", "category_id")):
        content[part] = [entry for entry in content[part] if entry[key] != 5]  # the second of the three
    path.write_text(json.dumps(content))
    for data in (coco_tree, tree):
        words = ["--data-path", data, "--detections", tmp_path / "found.json"]
        result = call("detection/test.py", *scoring_words, *words, "--opts", "MODEL.DETECTOR.SCORE_THRESHOLD", 0.0)
        assert result.code == 0, result.stderr
        found.append(json.loads((tmp_path / "found.json").read_text()))
    assert "2 of the checkpoint's 3 classes are in the data; matched by name" in result.stdout
    assert found[1] == [mark for mark in found[0] if mark["category_id"] != 5] != found[0]
    assert {mark["category_id"] for mark in found[1]} == {2, 90}
