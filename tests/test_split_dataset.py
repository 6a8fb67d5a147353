"""Splits of one folder of images: who stays together, who goes where, and the folders that are made."""

import csv
import os
import random
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import StratifiedKFold

from tools.datasets.splitting import deal, join
from utils.errors import UserError

PROGRAM = "tools/split_dataset.py"


# Who stays together


@given(st.lists(st.lists(st.integers(0, 12), max_size=3), max_size=25))
def test_items_are_joined_as_by_walking_from_one_to_the_next(keys):
    walked = []
    for start in range(len(keys)):
        seen, waiting = {start}, [start]
        while waiting:
            world = set(keys[waiting.pop()])
            new = {item for item, of_item in enumerate(keys) if item not in seen and world & set(of_item)}
            seen |= new
            waiting += new
        walked.append(min(seen))
    assert join(keys) == walked


# Who goes where


def dealt(classes, shares, groups=None, seed=0):
    names = [f"{of_class}/{number:04d}.png" for number, of_class in enumerate(classes)]
    return deal(names, classes, groups or range(len(names)), shares, seed)


def table(classes, sides, count):
    """Images of each class on each side."""
    return {
        name: [sum(s == side for s, c in zip(sides, classes, strict=True) if c == name) for side in range(count)]
        for name in set(classes)
    }


@settings(max_examples=60)
@given(st.lists(st.integers(5, 23), min_size=1, max_size=5), st.integers(2, 5), st.integers(0, 3))
def test_folds_are_as_even_as_scikit_learns_in_every_class_and_in_all(sizes, folds, seed):
    classes = [f"c{number}" for number, size in enumerate(sizes) for _ in range(size)]
    found = table(classes, dealt(classes, [1 / folds] * folds, seed=seed), folds)
    theirs = [0] * len(classes)
    for fold, (_, val) in enumerate(StratifiedKFold(folds).split(classes, classes)):
        for image in val:
            theirs[image] = fold
    wanted = table(classes, theirs, folds)
    assert {name: sorted(counts) for name, counts in found.items()} == {
        name: sorted(counts) for name, counts in wanted.items()
    }
    totals = [sum(counts) for counts in zip(*found.values(), strict=True)]
    assert max(totals) - min(totals) <= 1


@given(st.lists(st.integers(2, 40), min_size=1, max_size=4), st.floats(0.02, 0.98))
def test_a_share_is_held_out_of_every_class_and_at_least_one_image_is_on_each_side(sizes, share):
    classes = [f"c{number}" for number, size in enumerate(sizes) for _ in range(size)]
    for train, val in table(classes, dealt(classes, [1 - share, share]), 2).values():
        assert train and val
        assert abs(val - share * (train + val)) <= 0.5 + 1e-6 or min(train, val) == 1


@settings(max_examples=60)
@given(st.data())
def test_groups_stay_whole_and_every_class_has_images_on_all_sides(data):
    sides = data.draw(st.integers(2, 4))
    classes, groups = [], []
    for name in "ab":
        for size in data.draw(st.lists(st.integers(1, 9), min_size=sides, max_size=12)):
            groups += [len(classes)] * size
            classes += [name] * size
    found = dealt(classes, [1 / sides] * sides, groups)
    assert all(len({side for side, of in zip(found, groups, strict=True) if of == group}) == 1 for group in set(groups))
    assert all(all(counts) for counts in table(classes, found, sides).values())


def test_groups_of_several_classes_are_divided_evenly():
    generator = random.Random(0)
    groups = [group for group in range(100) for _ in range(generator.randint(1, 6))]
    classes = [generator.choice("abc") for _ in groups]
    for counts in table(classes, dealt(classes, [0.25] * 4, groups), 4).values():
        assert max(counts) - min(counts) <= 3


def test_the_order_of_the_files_does_not_matter_and_the_seed_does():
    classes = [name for name in "ab" for _ in range(20)]
    names = [f"{name}/{number}" for number, name in enumerate(classes)]
    sides = dict(zip(names, deal(names, classes, range(40), [0.5, 0.5], 0), strict=True))
    order = random.Random(0).sample(range(40), 40)
    again = deal([names[i] for i in order], [classes[i] for i in order], range(40), [0.5, 0.5], 0)
    assert sides == dict(zip([names[i] for i in order], again, strict=True))
    assert list(sides.values()) != deal(names, classes, range(40), [0.5, 0.5], 1)


def test_groups_that_cannot_be_divided_are_refused():
    with pytest.raises(UserError, match=r"groups span classes so that some would have no images on one side \([abc]\)"):
        dealt(["a", "a", "b", "b", "c", "c"], [0.5, 0.5], [0, 1, 1, 2, 0, 2])


# The folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 12 and 9 images of six patients, of which two images are equal, and a subfolder."""
    root = tmp_path_factory.mktemp("images") / "D"
    for name, count in (("cat", 12), ("dog", 9)):
        for number in range(count):
            path = root / name / ("more" if number % 4 == 3 else "") / f"p{number % 6}_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour = 99 if (name, number) in (("cat", 0), ("dog", 1)) else 10 * number + len(name) * (name == "dog")
            Image.fromarray(np.full((4, 4), colour, np.uint8)).save(path)
    (root / "cat" / "notes.txt").write_text("no image")
    return root


def images(root):
    return {str(path.relative_to(root)) for path in root.rglob("*.png")}


def listed(output):
    with open(output / "split.csv") as file:
        return list(csv.DictReader(file))


def test_every_image_is_validated_on_in_one_fold_and_trained_on_in_the_others(call, folder, tmp_path):
    result = call(PROGRAM, "--data-path", folder, "--output", tmp_path / "O", "--folds", 3)
    assert result.code == 0, result.stderr
    assert {path.name for path in (tmp_path / "O").iterdir()} == {"fold0", "fold1", "fold2", "split.csv"}
    in_val = Counter()
    for number in range(3):
        train, val = (images(tmp_path / "O" / f"fold{number}" / split) for split in ("train", "val"))
        assert train | val == images(folder) and not train & val
        assert {name.split("/")[0] for name in val} == {"cat", "dog"}
        in_val.update(val)
    assert set(in_val.values()) == {1} and len(in_val) == 21
    for row in listed(tmp_path / "O"):
        assert (tmp_path / "O" / row["side"] / "val" / row["image"]).read_bytes() == (
            folder / row["image"]
        ).read_bytes()
        assert row["class"] == row["image"].split("/")[0]
    assert f"--data-path {tmp_path / 'O' / 'fold0'} --opts MODEL.GMA.NUM_CLASSES 2" in result.stdout


@pytest.mark.parametrize("seed", range(6))
def test_equal_files_stay_on_one_side_whatever_their_classes(call, folder, tmp_path, seed):
    result = call(PROGRAM, "--data-path", folder, "--output", tmp_path / "O", "--val-share", 0.3, "--seed", seed)
    sides = {row["image"]: row["side"] for row in listed(tmp_path / "O")}
    assert sides["cat/p0_0.png"] == sides["dog/p1_1.png"]
    assert "1 image(s) equal others bit for bit" in result.stdout


def test_files_that_are_no_images_are_told_of(call, folder, tmp_path):
    words = ("--output", tmp_path / "O", "--val-share", 0.5)
    told = call(PROGRAM, "--data-path", folder, *words).stdout
    assert "1 file(s) left out, no images by their endings or in no class folder: .txt 1\n" in told
    result = call(PROGRAM, "--data-path", tmp_path / "O" / "train", "--output", tmp_path / "P", "--val-share", 0.5)
    assert result.code == 0 and "left out" not in result.stdout


def test_images_of_one_name_stay_together(call, folder, tmp_path):
    call(PROGRAM, "--data-path", folder, "--output", tmp_path / "O", "--folds", 2, "--group-by", r"/p(\d)_")
    sides = {}
    for row in listed(tmp_path / "O"):
        sides.setdefault(Path(row["image"]).name[:2], set()).add(row["side"])
    assert len(sides) == 6 and {len(found) for found in sides.values()} == {1}
    assert sides["p0"] == sides["p1"]  # by way of the two that are equal


@pytest.mark.parametrize("mode", ["symlink", "hardlink", "copy"])
def test_files_get_there_as_asked_and_the_input_stays_as_it_is(call, folder, tmp_path, mode):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*.*") if path.is_file()}
    result = call(PROGRAM, "--data-path", folder, "--output", tmp_path / "O", "--val-share", 0.25, "--mode", mode)
    assert result.code == 0, result.stderr
    made = [tmp_path / "O" / row["side"] / row["image"] for row in listed(tmp_path / "O")]
    originals = [folder / row["image"] for row in listed(tmp_path / "O")]
    assert {path.is_symlink() for path in made} == {mode == "symlink"}
    assert [path.samefile(other) for path, other in zip(made, originals, strict=True)] == [mode != "copy"] * 21
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in originals]
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}


def test_a_split_trains_as_it_is(call, tree, tiny_config, tmp_path):
    call(PROGRAM, "--data-path", tree / "train", "--output", tmp_path / "O", "--val-share", 0.25)
    where = ("--cfg", tiny_config, "--data-path", tmp_path / "O", "--output", tmp_path / "out")
    result = call("train.py", *where, "--opts", "TRAIN.EPOCHS", "1")
    assert result.code == 0, result.stderr
    assert (tmp_path / "out/tiny/default/best.pth").is_file()


# What is refused


def refused(call, tmp_path, *words):
    result = call(PROGRAM, "--output", tmp_path / "O", *words)
    assert result.code == 2 and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("O*"))
    return result.errors[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--folds", 10), "classes with fewer than 10 images or groups of images (dog): split into fewer folds"),
        (("--folds", 6, "--group-by", r"/(p\d)_"), "fewer than 6 images or groups of images (cat, dog)"),
        (("--val-share", 0.5, "--group-by", "(.)"), "with fewer than 2 images or groups of images (cat, dog): add"),
        (("--folds", 3, "--group-by", r"p0_(\d+)"), "--group-by finds nothing in 17 name(s) (cat/p1_1.png"),
        (("--folds", 3, "--group-by", "("), "--group-by (: "),
        (("--folds", 1), "--folds: 1: give a whole number, at least 2"),
        (("--val-share", 1), "--val-share 1.0: give a share between 0 and 1"),
        (("--val-share", 0.2, "--folds", 2), "not allowed with"),
        ((), "one of the arguments --folds --val-share is required"),
    ],
)
def test_what_cannot_be_divided_is_told_in_one_line(call, folder, tmp_path, words, told):
    assert told in refused(call, tmp_path, "--data-path", folder, *words)


def test_the_command_that_is_told_can_be_pasted(call, folder, tmp_path):
    output = tmp_path / "with space"
    told = call(PROGRAM, "--data-path", folder, "--output", output, "--val-share", 0.5).stdout.splitlines()[-1]
    assert shlex.split(told)[-5:] == ["--data-path", str(output), "--opts", "MODEL.GMA.NUM_CLASSES", "2"]


def test_places_that_are_taken_or_inside_the_images_are_refused(call, folder, tmp_path):
    result = call(PROGRAM, "--data-path", folder, "--output", folder / "O", "--folds", 2)
    assert result.code == 2 and "lies in --data-path" in result.errors[0]
    (tmp_path / "mine").write_text("kept")
    result = call(PROGRAM, "--data-path", folder, "--output", tmp_path, "--folds", 2)
    assert result.code == 2 and "exists: name another" in result.errors[0]
    result = call(PROGRAM, "--data-path", folder, "--output", tmp_path / "no" / "O", "--folds", 2)
    assert result.code == 2 and "in a folder that exists" in result.errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_without_classes_and_a_dangling_link_are_refused(call, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(call, tmp_path, "--data-path", tmp_path / "empty", "--folds", 2)
    (tmp_path / "D" / "a").mkdir(parents=True)
    (tmp_path / "D" / "a" / "x.png").symlink_to(tmp_path / "gone.png")
    told = refused(call, tmp_path, "--data-path", tmp_path / "D", "--folds", 2)
    assert told.startswith("1 file(s) cannot be read (") and "x.png" in told


def test_a_folder_that_is_split_already_is_refused(call, tree, tmp_path):
    told = refused(call, tmp_path, "--data-path", tree, "--folds", 2)
    assert f"{tree} is split already, into train/ and val/" in told and f"such as {tree / 'train'}" in told


def test_nothing_is_left_where_writing_fails(call, folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "symlink", full)
    assert "disk full" in refused(call, tmp_path, "--data-path", folder, "--folds", 2)
