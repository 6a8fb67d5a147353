"""segmentation/train.py and test.py, run as a user runs them."""

import json
import re
from unittest import mock

import numpy as np
import pytest
import torch
from helpers_segmentation import CLASSES
from helpers_unit import ROOT
from PIL import Image

from models import GroupMixFormer
from segmentation import data

pytest_plugins = ["segments"]
pytestmark = pytest.mark.slow


@pytest.fixture
def score(call, segmentation_words, segmented, tmp_path):
    """Runs test.py on the best checkpoint: `score(*flags, opts=...)` gives what --json says."""

    def run(*flags, opts="", code=0):
        words = segmentation_words(tmp_path, opts)
        report = tmp_path / "score.json"
        weights = [] if "--pretrained" in flags else ["--resume", segmented.folder / "best.pth"]
        result = call("segmentation/test.py", *words, *weights, "--json", report, *flags)
        assert result.code == code, result.stderr
        return json.loads(report.read_text()) if code == 0 else result

    return run


def test_a_run_leaves_what_classification_leaves_and_scores_every_epoch(segmented):
    evaluations = [line for line in segmented.metrics() if "miou" in line]
    assert [line["update"] for line in evaluations] == [3, 6, 9]
    assert set(evaluations[0]) >= {"macc", "aacc", "loss", "ema_miou", "ema_macc", "ema_aacc", "ema_loss"}
    names = {path.name for path in segmented.folder.iterdir()}
    assert names >= {"last.pth", "best.pth", "curves.png", "config.yaml", "log_rank0.txt", "metrics.jsonl", "runs"}
    state = segmented.checkpoint("best.pth")
    assert state["classes"] == CLASSES
    assert state["best"]["miou"] == max(line[name] for line in evaluations for name in ("miou", "ema_miou"))


def test_the_saved_configuration_is_the_same_run(call, segmented):
    config = segmented.folder / "config.yaml"
    result = call("segmentation/train.py", "--cfg", config)
    assert result.code == 0, result.stderr
    assert "going on from" in result.stdout


def test_the_best_checkpoint_scores_what_training_said(score, segmented):
    best = segmented.checkpoint("best.pth")["best"]
    found = score()
    assert (found["miou"], found["ema"]) == (best["miou"], best["of"] == "ema")
    assert found["images"] == 5
    assert list(found["classes"]) == CLASSES
    ious = [scores["iou"] for scores in found["classes"].values() if scores["iou"] is not None]
    assert sum(ious) / len(ious) == pytest.approx(found["miou"])


@pytest.mark.parametrize(("which", "flag"), [("model", "sliding_window"), ("ema", "multi_scale")])
def test_what_is_reported_is_what_is_asked_for_and_printed(call, segmentation_words, segmented, tmp_path, which, flag):
    words = [*segmentation_words(tmp_path), "--resume", segmented.folder / "best.pth", "--weights", which]
    words += [f"--{flag.replace('_', '-')}", "--json", tmp_path / "score.json"]
    result = call("segmentation/test.py", *words)
    assert result.code == 0, result.stderr
    found = json.loads((tmp_path / "score.json").read_text())
    asked = {name: found[name] for name in ("ema", "sliding_window", "multi_scale")}
    assert asked == {"ema": which == "ema", "sliding_window": False, "multi_scale": False, flag: True}
    assert f" * mIoU {found['miou']:.3f} mAcc {found['macc']:.3f} aAcc {found['aacc']:.3f}\n" in result.stdout
    for name, scores in found["classes"].items():
        assert f"{name:24} IoU {scores['iou']:7.3f} Acc {scores['acc']:7.3f}\n" in result.stdout


def test_other_looks_score_otherwise_and_their_trivial_forms_alike(score):
    plain = score()
    assert score("--sliding-window", opts="TEST.WINDOW 200 TEST.STRIDE 200")["loss"] == plain["loss"]
    trivial = score("--multi-scale", opts="TEST.SCALES [1.0] TEST.FLIP False")
    assert (trivial["loss"], trivial["multi_scale"]) == (plain["loss"], True)
    assert score("--sliding-window")["loss"] != plain["loss"]
    assert score("--multi-scale")["loss"] != plain["loss"]


def test_pictures_of_every_image_are_written(score, pairs, tmp_path):
    score("--save-pictures", tmp_path / "pictures")
    for path in (pairs / "images/validation").iterdir():
        with Image.open(tmp_path / "pictures/labels" / path.name) as labels, Image.open(path) as image:
            assert labels.mode == "P"
            assert labels.size == image.size
            assert set(np.unique(labels)) <= {1, 2, 3}
        with Image.open(tmp_path / "pictures/comparisons" / path.name) as comparison:
            assert comparison.width > comparison.height
    assert (tmp_path / "pictures/overview.png").is_file()


def test_images_are_listed_once_for_scores_and_pictures(score, tmp_path, monkeypatch):
    listed = mock.Mock(wraps=data.PairSource)
    monkeypatch.setattr(data, "PairSource", listed)
    score("--save-pictures", tmp_path / "pictures", "--pictures", 1)
    assert listed.call_count == 1


def test_training_starts_from_a_classifier_and_says_what_it_leaves_out(call, segmentation_words, tmp_path):
    network = GroupMixFormer(
        num_classes=5, embed_dims=(40,) * 4, depths=(1,) * 4, mlp_ratios=(2,) * 4, drop_path_rate=0.2
    )
    torch.save({"model": network.state_dict()}, tmp_path / "classifier.pth")
    words = segmentation_words(tmp_path, "TRAIN.EPOCHS 1 TRAIN.BASE_LR 0.0 TRAIN.EMA_DECAY 0.0")
    result = call("segmentation/train.py", *words, "--pretrained", tmp_path / "classifier.pth")
    assert result.code == 0, result.stderr
    assert "classifier.pth the backbone is taken, without final norm and head: all else starts afresh" in result.stdout
    state = torch.load(tmp_path / "tiny/run/last.pth", weights_only=True)["model"]
    for name, parameter in network.named_parameters():
        if not name.startswith(("norm.", "head.")):
            assert torch.equal(state[f"encoder.model.model.{name}"], parameter)


def test_training_goes_on_from_a_segmenter_with_semantic_fpn_refused(call, segmentation_words, segmented, tmp_path):
    words = segmentation_words(tmp_path, "MODEL.DECODER.NAME fpn MODEL.DECODER.CHANNELS 128")
    result = call("segmentation/train.py", *words, "--pretrained", segmented.folder / "best.pth")
    assert result.code == 2
    assert re.search(r"best\.pth does not fit the network: it lacks decoder\.", result.errors[0])


def test_evaluation_and_throughput_by_flag(call, segmentation_words, segmented, tmp_path):
    words = segmentation_words(tmp_path)
    result = call("segmentation/train.py", *words, "--eval", "--resume", segmented.folder / "best.pth")
    assert re.search(r" \* mIoU \d+\.\d{3} mAcc \d+\.\d{3} aAcc \d+\.\d{3}", result.stdout)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resume", "nowhere.pth"], "nowhere.pth is no file"),
        (["--random-weights", "--opts", "AUG.MIXUP", "0.8"], "unknown key AUG.MIXUP"),
        (["--random-weights", "--json", "nowhere/score.json"], "--json nowhere/score.json: name a file"),
        ([], "no weights to score: add --pretrained FILE or --resume FILE"),
        (["--random-weights", "--opts", "MODEL.GMA.NUM_CLASSES", "4"], "the data has 3 classes but"),
        (["--random-weights", "--save-pictures", str(ROOT / "LICENSE")], "LICENSE is a file: name a folder"),
        (["--random-weights", "--pictures", "0"], "draw at least 1"),
        (["--random-weights", "--data-path", ""], "DATA.DATA_PATH is empty: name the data with --data-path"),
    ],
)
def test_wrong_words_end_in_one_line(call, segmentation_words, tmp_path, flags, said):
    result = call("segmentation/test.py", *segmentation_words(tmp_path), *flags)
    assert result.code == 2
    (error,) = result.errors
    assert said in error


def test_a_checkpoint_of_other_classes_is_refused(call, segmentation_words, segmented, pairs, tmp_path):
    other = tmp_path / "data"
    other.mkdir()
    for name in ("images", "annotations"):
        (other / name).symlink_to(pairs / name)
    differ = "the classes of the checkpoint and the data differ"
    for names, said in (
        ("a\nred\nblue", f"{differ} (only in the checkpoint: ground; only in the data: a): use the same classes.txt"),
        ("ground\nred\nblue\nd", f"{differ} (only in the data: d)"),
        ("red\nground\nblue", f"{differ} (the same ones in another order)"),
    ):
        (other / "classes.txt").write_text(names)
        words = [*segmentation_words(tmp_path), "--data-path", other, "--resume", segmented.folder / "best.pth"]
        result = call("segmentation/test.py", *words)
        assert result.code == 2
        assert said in result.errors[0]


def test_two_ranks_train_and_score_every_image_once(start, call, segmentation_words, tmp_path):
    words = segmentation_words(tmp_path, "TRAIN.EPOCHS 1 TRAIN.EMA_DECAY 0.0 DATA.BATCH_SIZE 2")
    result = start("segmentation/train.py", *words, ranks=2)
    assert result.code == 0, result.stderr
    found = []
    for ranks in (1, 2):
        report = tmp_path / f"{ranks}.json"
        flags = ["--resume", tmp_path / "tiny/run/last.pth", "--json", report]
        flags += ["--save-pictures", tmp_path / str(ranks), "--pictures", 2]
        result = (
            start("segmentation/test.py", *words, *flags, ranks=2)
            if ranks == 2
            else call("segmentation/test.py", *words, *flags)
        )
        assert result.code == 0, result.stderr
        values = json.loads(report.read_text())
        assert values.pop("ranks") == ranks
        values.pop("images_per_s")
        found.append((values.pop("loss"), values))
        for folder, count in (("labels", 5), ("comparisons", 2)):
            assert len(list((tmp_path / str(ranks) / folder).iterdir())) == count
        assert (tmp_path / str(ranks) / "overview.png").is_file()
    assert found[0][1] == found[1][1]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    (trained,) = [line for line in map(json.loads, (tmp_path / "tiny/run/metrics.jsonl").open()) if "miou" in line]
    assert trained["miou"] == found[0][1]["miou"]
