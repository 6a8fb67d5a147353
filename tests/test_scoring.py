"""test.py and `train.py --eval`: every image counts once, classes are matched by name, and the line can be trusted."""

import itertools
import json
import re
import shutil
import time

import pytest
import torch
from helpers_unit import ALONE, batches, configured, small_network, to_score
from yacs.config import CfgNode

from models.build import build_model
from models.fuse import fuse
from models.published import to_published
from utils import checkpoint, scoring
from utils.config import load_config
from utils.errors import UserError
from utils.precision import Precision

FP32 = Precision("fp32", "cpu")
COUNTS = ("images", "correct1", "correct5")


@pytest.fixture(scope="module")
def weights(trained, tmp_path_factory):
    """A checkpoint that knows some of the validation images and not others, the best one by its trained weights."""
    state, path = trained.checkpoint("ckpt_epoch_2.pth"), tmp_path_factory.mktemp("weights") / "weights.pth"
    checkpoint.save({**state, "best": {**state["best"], "of": "model"}}, path)
    return path


@pytest.fixture(scope="module")
def score(call, tree, tiny_config):
    """Runs test.py inside this process: `score(*flags, data=tree, code=0)`."""

    def run(*flags, data=tree, code=0):
        result = call("test.py", "--cfg", tiny_config, "--data-path", data, *flags)
        assert result.code == code, result.stderr
        return result

    return run


@pytest.fixture
def report(score, tmp_path):
    """The same, and gives what --json wrote."""

    def run(*flags, **kwargs):
        score(*flags, "--json", tmp_path / "report.json", **kwargs)
        return json.loads((tmp_path / "report.json").read_text())

    return run


@pytest.fixture
def some_classes(tree, tmp_path):
    """A tree with some of the validation folders only, and no training folder."""

    def copy(name, wanted):
        for folder in sorted((tree / "val").iterdir()):
            if wanted(folder.name):
                shutil.copytree(folder, tmp_path / name / "val" / folder.name)
        return tmp_path / name

    return copy


def counts(report):
    return {key: report[key] for key in COUNTS}


@pytest.mark.slow
def test_line_and_report_say_what_training_said(trained, weights, score, tmp_path):
    result = score("--resume", weights, "--json", tmp_path / "report.json")
    evaluation = trained.evaluations()[1]
    lines = [line for line in result.stdout.splitlines() if "Acc@1" in line]
    assert lines == [f" * Acc@1 {evaluation['acc1']:.3f} Acc@5 {evaluation['acc5']:.3f}"]
    assert 0 < evaluation["acc1"] < 100
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) >= {"acc1", "acc5", "loss", "images_per_s", *COUNTS}
    assert report["images"] == 17
    assert report["acc1"] == evaluation["acc1"] == 100 * report["correct1"] / 17
    assert report["acc5"] == evaluation["acc5"] == 100 * report["correct5"] / 17
    assert report["loss"] == pytest.approx(evaluation["loss"], rel=1e-5)
    assert report["images_per_s"] > 0 and report["weights"] == str(weights)


@pytest.mark.slow
def test_moving_average_is_scored_where_asked_for(trained, weights, report):
    evaluation = trained.evaluations()[1]
    average, plain = (report("--resume", weights, "--weights", name) for name in ("ema", "model"))
    assert report("--resume", weights, "--ema")["loss"] == average["loss"]
    assert (average["ema"], plain["ema"]) == (True, False)
    assert plain["loss"] == pytest.approx(evaluation["loss"], rel=1e-5)
    assert average["acc1"] == evaluation["ema_acc1"]
    assert average["loss"] == pytest.approx(evaluation["ema_loss"], rel=1e-5)
    assert average["loss"] != pytest.approx(evaluation["loss"], rel=1e-5)


def test_what_the_best_epoch_was_the_best_by_is_scored_and_told(weights, score, tmp_path):
    state, path = checkpoint.load(weights), tmp_path / "chosen.pth"
    for of, flags, scored in [
        ("ema", [], "moving average"), ("ema", ["--weights", "model"], "weights"), ("model", [], "weights"),
    ]:  # fmt: skip
        checkpoint.save({**state, "best": {**state["best"], "of": of}}, path)
        assert f"scoring the {scored} of {path}" in score("--resume", path, *flags).stdout


def test_settings_that_differ_from_those_of_training_and_change_the_answers_are_told(weights, score):
    changes = ["DATA.STD", "[0.2,0.2,0.2]", "TEST.CROP", False, "DATA.BATCH_SIZE", 5, "TRAIN.EPOCHS", 7]
    (said,) = [
        line for line in score("--resume", weights, "--opts", *changes).stdout.splitlines() if "other settings" in line
    ]
    assert "DATA.STD: [" in said and "-> [0.2, 0.2, 0.2], TEST.CROP: True -> False" in said
    assert "BATCH_SIZE" not in said and "EPOCHS" not in said
    assert "other settings" not in score("--resume", weights).stdout


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("config", value) for value in ("resnet", "a: [", {"lr": 1}, 7, None)),
        *(("classes", value) for value in (6, {"amber_columns": 0}, "abcdef", [0, 1, 2, 3, 4, 5], None)),
    ],
)
def test_what_others_call_a_configuration_or_classes_does_no_harm(weights, score, tmp_path, name, value):
    state = torch.load(weights, weights_only=True)
    torch.save({"model": state["model"], name: value}, tmp_path / "others.pth")
    assert "Acc@1" in score("--pretrained", tmp_path / "others.pth").stdout


@pytest.mark.slow
def test_the_network_rewritten_for_inference_scores_the_same(weights, report, monkeypatch):
    rewritten = []
    monkeypatch.setattr(scoring, "fuse", lambda network: rewritten.append(fuse(network)) or rewritten[-1])
    plain, fused = report("--resume", weights), report("--resume", weights, "--fuse")
    assert len(rewritten) == 1
    assert (plain.pop("fused"), fused.pop("fused")) == (False, True)
    assert counts(plain) == counts(fused)
    assert plain["loss"] == pytest.approx(fused["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batch_size_changes_nothing(weights, report, batch_size):
    one, other = report("--resume", weights), report("--resume", weights, "--batch-size", batch_size)
    assert counts(one) == counts(other)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 5), (3, 2)])
def test_number_of_ranks_changes_nothing(weights, report, start, tree, tiny_config, tmp_path, ranks, batch_size):
    words = ["--cfg", tiny_config, "--data-path", tree, "--resume", weights, "--batch-size", batch_size]
    result = start("test.py", *words, "--json", tmp_path / "ranks.json", ranks=ranks)
    assert result.code == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.count("Acc@1") == 1
    one, other = report("--resume", weights), json.loads((tmp_path / "ranks.json").read_text())
    assert counts(one) == counts(other)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.slow
def test_fewer_images_than_ranks_count_once_each(weights, report, start, some_classes, tree, tiny_config, tmp_path):
    data = some_classes("few", lambda name: name == "violet_rows")
    next((data / "val" / "violet_rows").iterdir()).unlink()
    assert len(list(data.rglob("*.*g"))) == 1
    words = ["--cfg", tiny_config, "--data-path", data, "--resume", weights, "--json", tmp_path / "ranks.json"]
    result = start("test.py", *words, ranks=2)
    assert result.code == 0, result.stderr
    one, other = report("--resume", weights, data=data), json.loads((tmp_path / "ranks.json").read_text())
    assert counts(one) == counts(other)
    assert other["images"] == 1


# Classes


@pytest.mark.slow
def test_missing_classes_are_matched_by_name(weights, report, some_classes):
    parts = [
        report("--resume", weights, data=some_classes("rows", lambda name: name.endswith("rows"))),
        report("--resume", weights, data=some_classes("columns", lambda name: name.endswith("columns"))),
    ]
    whole = report("--resume", weights)
    assert {key: parts[0][key] + parts[1][key] for key in COUNTS} == counts(whole)


@pytest.mark.slow
def test_classes_in_another_order_are_matched_by_name(weights, report, tmp_path):
    state = torch.load(weights, weights_only=True)
    order = [3, 0, 5, 1, 4, 2]
    state["classes"] = [state["classes"][number] for number in order]
    for name in ("head.fc.weight", "head.fc.bias"):
        state["model"][name] = state["model"][name][order]
    checkpoint.save(state, tmp_path / "reordered.pth")
    one, other = report("--resume", weights), report("--resume", tmp_path / "reordered.pth")
    assert counts(one) == counts(other)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.slow
def test_classes_that_are_matched_by_name_are_told_of_where_some_are_missing(weights, score, some_classes):
    some = score("--resume", weights, data=some_classes("rows", lambda name: name.endswith("rows")))
    assert "3 of the checkpoint's 6 classes are in the data; matched by name" in some.stdout
    assert "matched by name" not in score("--resume", weights).stdout


@pytest.mark.slow
def test_unknown_classes_are_refused_by_name(weights, score, some_classes):
    data = some_classes("unknown", lambda name: True)
    (data / "val" / "green_rows").rename(data / "val" / "red_rows")
    result = score("--resume", weights, data=data, code=2)
    (error,) = result.errors
    assert "red_rows" in error
    assert "Acc@1" not in result.stdout


@pytest.mark.slow
def test_missing_classes_are_refused_where_the_weights_do_not_name_theirs(weights, score, some_classes, tmp_path):
    torch.save({"model": torch.load(weights, weights_only=True)["model"]}, tmp_path / "nameless.pth")
    (error,) = score(
        "--pretrained", tmp_path / "nameless.pth", data=some_classes("rows", lambda name: "rows" in name), code=2
    ).errors
    assert "3 classes" in error
    assert "6" in error


@pytest.mark.slow
def test_number_of_classes_comes_from_the_checkpoint(weights, report, some_classes):
    rows = some_classes("rows", lambda name: name.endswith("rows"))
    one = report("--resume", weights, data=rows)
    assert counts(report("--resume", weights, "--opts", "MODEL.GMA.NUM_CLASSES", 0, data=rows)) == counts(one)


def test_a_number_of_classes_that_neither_checkpoint_nor_data_tell_is_asked_for(monkeypatch):
    monkeypatch.setattr(scoring, "build_eval_data", lambda *_: to_score([]))
    config, fresh = configured(MODEL__GMA__NUM_CLASSES=0), scoring.Weights("random", "random", {}, None)
    with pytest.raises(UserError, match=r"tells the number of classes: set MODEL\.GMA\.NUM_CLASSES"):
        scoring.score_weights(config, ALONE, FP32, fresh)


@pytest.mark.slow
def test_another_number_of_classes_is_refused(weights, score):
    (error,) = score("--resume", weights, "--opts", "MODEL.GMA.NUM_CLASSES", 1000, code=2).errors
    assert "MODEL.GMA.NUM_CLASSES" in error
    assert "6" in error


# Which weights


@pytest.mark.slow
def test_published_names_are_scored_as_ours(weights, report, tmp_path):
    published = to_published(torch.load(weights, weights_only=True)["model"])
    torch.save({"model": published}, tmp_path / "published.pth")
    assert counts(report("--pretrained", tmp_path / "published.pth")) == counts(report("--resume", weights))


@pytest.mark.slow
def test_published_checkpoint_with_its_pickled_configuration_is_scored(weights, report, tmp_path):
    # The published training code saved its yacs configuration, optimizer and progress beside the weights.
    published = to_published(torch.load(weights, weights_only=True)["model"])
    config = CfgNode({"MODEL": {"NAME": "groupmixformer", "GMA": {"EMBEDDING_DIMS": [40, 40, 40, 40]}}, "TAG": "t"})
    torch.save({"model": published, "epoch": 299, "max_accuracy": 83.4, "config": config}, tmp_path / "published.pth")
    assert counts(report("--pretrained", tmp_path / "published.pth")) == counts(report("--resume", weights))


def test_no_weights_are_an_error(score, tmp_path):
    result = score("--output", tmp_path, code=2)
    (error,) = result.errors
    assert "--pretrained" in error
    assert "--random-weights" in error
    assert "Acc@1" not in result.stdout


@pytest.mark.slow
def test_error_for_no_weights_knows_the_best_of_the_run(trained, score):
    (error,) = score("--output", trained.output, "--tag", "run", code=2).errors
    assert f"--resume {trained.folder / 'best.pth'}" in error


def test_random_weights_are_scored_where_asked_for(report):
    found = report("--random-weights", "--precision", "bf16")
    told = {name: found[name] for name in ("images", "ranks", "precision", "weights", "ema")}
    assert told == {"images": 17, "ranks": 1, "precision": "bf16", "weights": "random", "ema": False}


def test_images_of_a_second_are_those_of_the_whole_time(monkeypatch):
    seconds = iter((3.0, 7.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    _, speed = scoring.score_timed(small_network(), to_score(batches(2, 4), images=8, rounds=2), ALONE, FP32)
    assert speed == 8 / 4


def test_random_weights_follow_the_seed(report):
    losses = [report("--random-weights", "--seed", seed)["loss"] for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_random_weights_are_those_that_training_starts_from(train, tmp_path):
    still = "TRAIN.BASE_LR 0 TRAIN.WARMUP_LR 0 TRAIN.MIN_LR 0 TRAIN.EMA_DECAY 0"
    run = train(tmp_path, opts=f"SEED 5 TRAIN.EPOCHS 1 {still}")
    config, state = load_config(run.folder / "config.yaml"), run.checkpoint()["model"]
    scoring.read_weights(config, "random")
    parameters = dict(build_model(config, 6).named_parameters())
    assert all(torch.equal(parameter, state[name]) for name, parameter in parameters.items())


@pytest.mark.parametrize("also", [["--ema"], ["--resume", __file__], ["--pretrained", __file__]])
def test_random_weights_are_not_called_by_the_name_of_others(score, also):
    (error,) = score("--random-weights", *also, code=2).errors
    assert "--random-weights" in error
    assert str(also[-1]) in error


@pytest.mark.slow
def test_what_a_run_began_with_is_not_scored_with_its_configuration(trained, weights, tree, call, tmp_path):
    config = (trained.folder / "config.yaml").read_text().replace("PRETRAINED: ''", "PRETRAINED: moved.pth")
    assert "moved.pth" in config
    (tmp_path / "config.yaml").write_text(config)
    words = ["test.py", "--cfg", tmp_path / "config.yaml", "--data-path", tree]
    result = call(*words, "--resume", weights)
    assert result.code == 0, result.stderr
    assert f"of {weights}" in result.stdout
    (error,) = call(*words).errors
    assert error.startswith("no weights to score")


@pytest.mark.slow
def test_two_files_of_weights_are_refused(weights, score):
    (error,) = score("--resume", weights, "--pretrained", weights, code=2).errors
    assert "--resume" in error
    assert "--pretrained" in error


@pytest.mark.slow
def test_moving_average_that_is_not_there_is_refused(weights, score, tmp_path):
    state = torch.load(weights, weights_only=True)
    checkpoint.save({**state, "ema": None}, tmp_path / "plain.pth")
    (error,) = score("--resume", tmp_path / "plain.pth", "--ema", code=2).errors
    assert error.endswith("plain.pth holds no moving average: use --weights model")


@pytest.mark.slow
def test_weights_of_another_network_are_refused(weights, score):
    result = score("--resume", weights, "--opts", "MODEL.GMA.EMBEDDING_DIMS", "[40, 40, 40, 80]", code=2)
    (error,) = result.errors
    assert "stages.3" in error
    assert "Acc@1" not in result.stdout


@pytest.mark.parametrize("place", ["missing/report.json", "."])
def test_report_that_cannot_be_written_is_refused_before_scoring(score, tmp_path, place):
    result = score("--random-weights", "--json", tmp_path / place, code=2)
    (error,) = result.errors
    assert str(tmp_path) in error
    assert "Acc@1" not in result.stdout


# Other ways


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--resume", "--pretrained"])
def test_eval_of_train_scores_and_stops(trained, weights, call, some_classes, tiny_config, tmp_path, flag):
    data = some_classes("val only", lambda name: True)
    where = ["--cfg", tiny_config, "--data-path", data, "--output", tmp_path / "output"]
    result = call("train.py", *where, "--eval", flag, weights)
    assert result.code == 0, result.stderr
    evaluation = trained.evaluations()[1]
    assert f" * Acc@1 {evaluation['acc1']:.3f} Acc@5 {evaluation['acc5']:.3f}" in result.stdout
    assert "Train:" not in result.stdout
    assert not (tmp_path / "output").exists()


def test_eval_of_train_without_weights_is_an_error(call, tree, tiny_config, tmp_path):
    result = call("train.py", "--cfg", tiny_config, "--data-path", tree, "--output", tmp_path, "--eval")
    assert result.code == 2
    (error,) = result.errors
    assert error == (
        "no weights to score: add --pretrained FILE or --resume FILE; "
        "test.py --random-weights scores a network that knows nothing"
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_scores_nearly_alike(weights, report, precision):
    one, other = report("--resume", weights), report("--resume", weights, "--precision", precision)
    assert other["images"] == 17
    assert other["loss"] == pytest.approx(one["loss"], rel=0.02)
    assert other["loss"] != one["loss"]


@pytest.fixture
def few_batches(monkeypatch):
    """Makes a measurement one of few batches."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))


@pytest.mark.parametrize("program", ["test.py", "train.py"])
def test_throughput_says_how_it_was_measured(call, tiny_config, program, few_batches):
    result = call(program, "--cfg", tiny_config, "--throughput", "--batch-size", 3, "--precision", "bf16")
    assert result.code == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "throughput" in line]
    assert float(re.search(r"([\d.]+) images/s", line)[1]) > 0
    for condition in ("batch 3", "64 x 64", "bf16", "cpu", "1 CPU thread"):
        assert condition in line


def test_throughput_is_reported_where_a_score_would_be(report, few_batches):
    measured = report("--throughput", "--batch-size", 3, "--fuse")
    assert measured.pop("images_per_s") > 0
    conditions = {"batch_size": 3, "image_size": 64, "precision": "fp32", "device": "cpu", "cpu_threads": 1}
    assert measured == {**conditions, "fused": True}
