"""Runs beside one another: the table of what differs, the best scores, the picture, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tools.runs.comparing import Run, draw_comparison
from utils.config import default_config
from utils.console import markdown_table

PROGRAM = "tools/compare_runs.py"
UPDATES = 4  # of an epoch


def make_run(folder, scores, changes=None, epochs=3):
    """Writes what train.py writes into a run's folder, with scores by their keys of every epoch."""
    config = default_config()
    config.TAG = folder.name
    for key, value in (changes or {}).items():
        *parts, last = key.split(".")
        part = config
        for name in parts:
            part = part[name]
        part[last] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump())
    lines = []
    for epoch in range(epochs):
        updates = range(epoch * UPDATES + 1, (epoch + 1) * UPDATES + 1)
        lines += [{"update": at, "epoch": epoch, "loss": 3 / at, "lr": 0.1 / at, "grad_norm": None} for at in updates]
        reached = {key: values[epoch] for key, values in scores.items()}
        lines.append({"update": (epoch + 1) * UPDATES, "epoch": epoch, **reached, "loss": 2 / (epoch + 1)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    first = make_run(tmp_path / "net/first", {"acc1": [10.0, 30.0, 20.0], "ema_acc1": [5.0, 6.0, 7.0]})
    changes = {"TRAIN.BASE_LR": 0.25, "AUG.MIXUP": 0.0, "DATA.DATA_PATH": "elsewhere"}
    return first, make_run(tmp_path / "net/second", {"acc1": [40.0, 40.0, 39.0]}, changes)


def rows_of(text):
    """Rows of the printed table by their first column; cells are two blanks apart."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_only_keys_that_differ_are_told_with_the_best_of_each_score(call, runs):
    result = call(PROGRAM, *runs)
    assert result.code == 0, result.stderr
    assert result.stdout.split()[:2] == ["first", "second"]
    rows = rows_of(result.stdout)
    assert rows.pop("first") == ["second"]
    assert rows == {
        "epochs scored": ["3", "3"],
        "best acc1": ["30.000 after 2", "40.000 after 1"],  # the first of equals
        "best ema_acc1": ["7.000 after 3", "-"],
        "TRAIN.BASE_LR": ["0.0005", "0.25"],
        "AUG.MIXUP": ["0.8", "0.0"],
        "DATA.DATA_PATH": ["''", "elsewhere"],
    }


def test_markdown_holds_the_same_table(call, runs, tmp_path):
    printed = call(PROGRAM, *runs, "--markdown", tmp_path / "t.md").stdout
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[:2] == ["|  | first | second |", "| --- | ---: | ---: |"]
    cells = {line.split(" | ")[0].removeprefix("| "): line.rstrip(" |").split(" | ")[1:] for line in lines[2:]}
    rows = rows_of(printed)
    del rows["first"]
    assert cells == rows


def test_a_bar_in_a_value_is_no_edge_of_a_cell():
    assert markdown_table([("", "a"), ("AUG.NAME", "x|y")]).splitlines()[-1] == "| AUG.NAME | x\\|y |"


def test_runs_of_different_tasks_are_compared_each_by_its_own_scores(call, runs, tmp_path):
    other = make_run(tmp_path / "seg/first", {"miou": [50.0, 61.5, None], "box_ap": [1.0, 2.0, 3.0]})
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings["SEGMENTATION"] = {"CROP": 96}
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    result = call(PROGRAM, *runs, other, "--png", tmp_path / "c.png")
    rows = rows_of(result.stdout)
    assert rows["net/first"] == ["net/second", "seg/first"]  # as much of the path as tells them apart
    assert rows["best miou"] == ["-", "-", "61.500 after 2"]
    assert rows["best box_ap"] == ["-", "-", "3.000 after 3"]
    assert rows["best acc1"][2] == "-"
    assert rows["SEGMENTATION.CROP"] == ["-", "-", "96"]
    assert (tmp_path / "c.png").is_file()


def test_a_run_that_began_with_a_later_epoch_scored_only_its_own(call, runs):
    metrics = runs[0] / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[-UPDATES - 1 :]))
    rows = rows_of(call(PROGRAM, *runs).stdout)
    assert rows["epochs scored"] == ["1", "3"]
    assert rows["best acc1"][0] == "20.000 after 3"


def test_equal_configurations_are_told_of(call, runs, tmp_path):
    again = make_run(tmp_path / "net/again", {"acc1": [1.0, 2.0, 3.0]})
    result = call(PROGRAM, runs[0], again)
    assert result.code == 0
    assert result.stdout.splitlines()[-1] == "the configurations are equal"
    assert "the configurations" not in call(PROGRAM, *runs).stdout


# The picture


def curves(loss=1.0, **scores):
    updates = [{"epoch": number / 8, "loss": loss, "lr": 0.1} for number in range(1, 17)]
    lines = [{"epoch": epoch, "update": epoch, "loss": loss, **scores} for epoch in (1, 2)]
    return Run({}, updates, lines)


def colours(path):
    """The colours of a picture that are not grey."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    return {tuple(pixel) for pixel in np.unique(pixels[np.ptp(pixels, 1) > 100], axis=0)}


def drawn(path, *runs):
    draw_comparison([f"run {number}" for number in range(len(runs))], runs, path)
    return Image.open(path).size, colours(path)


def test_every_run_has_its_colour(tmp_path):
    blue, orange, green = (31, 119, 180), (255, 127, 14), (44, 160, 44)
    _, two = drawn(tmp_path / "2.png", curves(acc1=1), curves(acc1=2))
    _, three = drawn(tmp_path / "3.png", curves(acc1=1), curves(acc1=2), curves(acc1=3))
    assert {blue, orange} <= two and green not in two
    assert {blue, orange, green} <= three
    _, many = drawn(tmp_path / "12.png", *(curves(acc1=number) for number in range(12)))
    assert len(many) > 12


def test_every_score_has_its_panel_and_what_no_run_has_has_none(tmp_path):
    few, _ = drawn(tmp_path / "few.png", curves(acc1=1), curves(acc1=2, ema_acc1=3))  # 4 panels
    more, _ = drawn(tmp_path / "more.png", curves(acc1=1), curves(miou=2, box_ap=3, mask_ap=4))  # 7 panels
    without, _ = drawn(tmp_path / "none.png", curves(acc1=None), curves(acc1=None))  # 3 panels
    assert without[1] < few[1] < more[1]


def test_a_moving_average_is_drawn_beside_the_weights(tmp_path):
    drawn(tmp_path / "plain.png", curves(acc1=1), curves(acc1=2))
    drawn(tmp_path / "ema.png", curves(acc1=1, ema_acc1=8), curves(acc1=2))
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "ema.png").read_bytes()


def test_long_runs_and_single_epochs_can_be_drawn(tmp_path):
    updates = [{"epoch": number / 99, "loss": 1.0, "lr": 0.1} for number in range(5000)]
    long = Run({}, updates, [{"epoch": 1, "acc1": 5}])
    size, found = drawn(tmp_path / "long.png", long, curves(acc1=3))
    assert size[0] > 800 and len(found) >= 2


def test_dollars_in_a_runs_name_are_drawn_as_they_are(tmp_path):
    draw_comparison(["$_{$", "other"], [curves(), curves()], tmp_path / "dollars.png")


# What is refused


def refused(call, *words):
    result = call(PROGRAM, *words)
    assert result.code == 2 and len(result.stderr.splitlines()) == 1 and result.stdout == ""
    return result.errors[0]


def test_a_folder_that_is_no_run_and_a_run_without_a_score_are_refused(call, runs, tmp_path):
    assert f"{tmp_path} holds no run (config.yaml and metrics.jsonl)" in refused(call, runs[0], tmp_path)
    fresh = make_run(tmp_path / "fresh", {}, epochs=0)
    assert f"{fresh} has scored no epoch yet" in refused(call, runs[0], fresh)
    (fresh / "metrics.jsonl").write_text('{"update": 1, "epoch": 0, "loss": 1.0, "lr": 0.1}\n')
    assert f"{fresh} has scored no epoch yet" in refused(call, runs[0], fresh)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "TRAIN: ["),
        ("config.yaml", "text"),
        ("metrics.jsonl", '{"epoch": 0}\n'),
        ("metrics.jsonl", "5\n"),
    ],
)
def test_damaged_files_are_told_of(call, runs, name, text):
    (runs[1] / name).write_text(text)
    assert f"{runs[1]} cannot be read as a run (" in refused(call, *runs)


def test_one_run_alone_or_twice_is_refused(call, runs):
    assert "name the runs to compare it with" in refused(call, runs[0])
    twice = refused(call, *runs, runs[0].parent / ".." / "net" / "first")
    assert twice.endswith("is named twice: name it once")


def test_files_that_cannot_be_written_are_refused_before_anything_is_read(call, runs, tmp_path):
    for flag in ("--png", "--markdown"):
        assert flag in refused(call, *runs, flag, tmp_path / "none" / "x")
    assert "end the name in .png" in refused(call, *runs, "--png", tmp_path / "x.jpg")
    assert {path.name for path in tmp_path.iterdir()} == {"net"}


@pytest.mark.slow
def test_runs_that_train_py_made_can_be_compared(call, trained, runs):
    result = call(PROGRAM, trained.folder, runs[0])
    assert result.code == 0, result.stderr
    best = max(line["acc1"] for line in trained.evaluations())
    assert rows_of(result.stdout)["best acc1"][0].startswith(f"{best:.3f} after ")
    assert rows_of(result.stdout)["epochs scored"] == ["4", "3"]
    assert Path(trained.folder).name in result.stdout
