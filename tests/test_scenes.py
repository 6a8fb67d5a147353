"""Scenes of digits: what is in the files that tools/prepare_digits.py --scenes writes."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.random import default_rng
from PIL import Image
from pycocotools.coco import COCO

import tools.datasets.scenes
from tools.datasets.scenes import CLASSES, SIZE, Digits, compose
from tools.datasets.scenes_picture import draw_scenes
from tools.prepare_digits import load_splits, write_all_scenes
from utils.cli import run
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COUNTS = {"train": 24, "val": 12}
SPLITS = {"train": ("training", "train2017"), "val": ("validation", "val2017")}


@pytest.fixture(scope="session")
def scenes(shared):
    """A small tree of scenes."""
    return shared("scenes", lambda folder: write_all_scenes(folder, COUNTS))


@pytest.fixture(scope="session")
def annotated(scenes):
    """COCO's reading of each split."""
    return {split: COCO(scenes / "coco/annotations" / f"instances_{coco}.json") for split, (_, coco) in SPLITS.items()}


def files_of(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def pixels(path):
    return np.asarray(Image.open(path))


def shown(annotations):
    return {annotation["digit"] for annotation in annotations.dataset["annotations"]}


def test_the_same_scenes_are_written_bit_for_bit_every_time_in_place_of_the_old_ones(scenes, tmp_path):
    write_all_scenes(tmp_path / "again", {"train": 2, "val": 20})
    write_all_scenes(tmp_path / "again", COUNTS)
    assert files_of(tmp_path / "again") == files_of(scenes)


def test_both_trees_hold_the_same_images_once_on_disk(scenes):
    for split, (ade, coco) in SPLITS.items():
        images = sorted((scenes / "ade/images" / ade).iterdir())
        assert [path.name for path in images] == [f"{number:05d}.png" for number in range(1, COUNTS[split] + 1)]
        assert all(path.samefile(scenes / "coco" / coco / path.name) for path in images)
        assert {pixels(path).shape for path in images} == {(SIZE, SIZE, 3)}


def test_train_and_validation_scenes_share_no_digit_and_keep_to_their_split_of_the_scans(annotated):
    _, labels, numbers = load_splits()
    assert shown(annotated["train"]) and shown(annotated["val"])
    for split, annotations in annotated.items():
        assert shown(annotations) <= set(numbers[split].tolist())
        for annotation in annotations.dataset["annotations"]:
            assert annotation["category_id"] == labels[annotation["digit"]] + 1
    assert not shown(annotated["train"]) & shown(annotated["val"])


def test_boxes_and_areas_are_those_of_what_is_seen(annotated):
    for annotations in annotated.values():
        for annotation in annotations.dataset["annotations"]:
            mask = annotations.annToMask(annotation).astype(bool)
            rows, columns = np.nonzero(mask)
            left, top = columns.min(), rows.min()
            assert annotation["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
            assert annotation["area"] == mask.sum() > 0
            assert annotation["iscrowd"] == 0


def test_masks_of_a_scene_do_not_overlap_and_agree_with_its_label_map(scenes, annotated):
    for split, (ade, _) in SPLITS.items():
        annotations = annotated[split]
        for number, image in annotations.imgs.items():
            labels = pixels(scenes / "ade/annotations" / ade / image["file_name"])
            assert labels.dtype == np.uint8 and labels.shape == (SIZE, SIZE)
            drawn = np.ones_like(labels)
            for annotation in annotations.imgToAnns[number]:
                mask = annotations.annToMask(annotation).astype(bool)
                assert (drawn[mask] == 1).all()
                drawn[mask] = annotation["category_id"] + 1
            certain = labels != 0
            assert (labels[certain] == drawn[certain]).all()
            assert (~certain).mean() < 0.06  # edges only
            assert bool(annotations.imgToAnns[number]) == bool((~certain).any())


def test_classes_are_named_in_the_order_of_their_labels(scenes, annotated):
    names = (scenes / "ade/classes.txt").read_text().splitlines()
    assert names == list(CLASSES) == ["background", *"0123456789"]
    for category in annotated["val"].dataset["categories"]:
        assert names[category["id"]] == category["name"]


def composed(count):
    images, labels, splits = load_splits()
    numbers = splits["train"]
    digits = Digits(images[numbers], labels[numbers], numbers)
    return [compose(digits, default_rng(seed)) for seed in range(count)]


def test_scenes_hold_none_to_a_few_digits_of_all_kinds_and_of_many_sizes():
    scenes = composed(150)
    counts = {len(scene.digits) for scene in scenes}
    assert set(range(5)) <= counts <= set(range(6))
    assert {digit.label for scene in scenes for digit in scene.digits} == set(range(10))
    heights = [np.ptp(np.nonzero(digit.mask)[0]) + 1 for scene in scenes for digit in scene.digits]
    assert min(heights) < 50 and max(heights) > 80


def test_most_of_every_digit_is_seen_though_some_overlap(monkeypatch):
    wholes = []
    place = tools.datasets.scenes._place

    def placed(*arguments):
        layer = place(*arguments)
        if layer is not None:
            ink, _ = layer
            wholes.append((ink > 0.5).sum())
        return layer

    monkeypatch.setattr(tools.datasets.scenes, "_place", placed)
    seen = [digit.mask.sum() for scene in composed(40) for digit in scene.digits]
    shares = np.divide(seen, wholes)
    assert shares.min() >= 0.9 and 0 < (shares < 1).mean() < 0.5


def stamps():
    """One scan, stamped forty times."""
    images, _, _ = load_splits()
    return [tools.datasets.scenes._stamp(images[0], default_rng(seed)) for seed in range(40)]


def test_ink_is_darker_where_the_scans_is_faint():
    for ink, shade in stamps():
        assert 0.4 <= shade[ink == 1].min() < 0.5 and shade.max() > 0.9


def test_digits_lean_to_both_sides(monkeypatch):
    monkeypatch.setattr(tools.datasets.scenes, "_TURN", 0.0)
    leans = []
    for ink, _ in stamps():
        upper, lower = np.array_split(ink, 2)
        leans.append((np.nonzero(upper)[1].mean() - np.nonzero(lower)[1].mean()) / len(ink))
    assert np.ptp(leans) > 0.1


def test_ink_is_told_from_the_ground_around_it():
    for scene in composed(40):
        image = scene.image.astype(float)
        for digit in scene.digits:
            rows, columns = np.nonzero(digit.mask)
            box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            ground = image[box][scene.labels[box] == 1]
            if len(ground) > 20:
                assert np.linalg.norm(image[digit.mask].mean(0) - ground.mean(0)) > 30


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs tools/prepare_digits.py with few scenes, in this process: exit code and what it says."""

    def start(*words):
        monkeypatch.setattr(sys, "argv", ["prepare_digits.py", *map(str, words)])
        values = runpy.run_path(str(ROOT / "tools/prepare_digits.py"))
        values["_SCENES"].update(COUNTS)
        try:
            run(values["main"])
            code = 0
        except SystemExit as end:
            code = end.code
        return code, "".join(capsys.readouterr())

    return start


def test_the_program_writes_scenes_and_a_picture_of_them(program, scenes, tmp_path):
    code, said = program(tmp_path / "d", "--scenes", "--png", tmp_path / "d.png")
    assert code == 0 and "24 train scenes of" in said and "12 val scenes of" in said
    assert files_of(tmp_path / "d") == files_of(scenes)
    assert min(pixels(tmp_path / "d.png").shape[:2]) > 300
    assert {path.name for path in tmp_path.iterdir()} == {"d", "d.png"}


def test_digits_that_cannot_be_written_are_told_of_in_a_line(program, tmp_path):
    (tmp_path / "file").write_text("kept")
    code, said = program(tmp_path / "file")
    assert code == 2 and said.startswith(f"error: {tmp_path / 'file'} cannot be written (") and said.count("\n") == 1
    assert files_of(tmp_path) == {Path("file"): b"kept"}


def test_a_folder_of_other_things_is_left_as_it_is(program, tmp_path):
    (tmp_path / "mine").write_text("kept")
    code, said = program(tmp_path, "--scenes")
    assert code == 2 and said == f"error: {tmp_path} holds something else than scenes: name another folder\n"
    assert files_of(tmp_path) == {Path("mine"): b"kept"}


@pytest.mark.parametrize("names", [["coco"], ["ade"], ["ade", "coco"]], ids=" ".join)
def test_data_sets_that_are_called_as_scenes_are_kept(program, tmp_path, names):
    for name in names:
        (tmp_path / name / "annotations").mkdir(parents=True)
        (tmp_path / name / "annotations" / "instances_val2017.json").write_text("kept")
    before = files_of(tmp_path)
    code, said = program(tmp_path, "--scenes")
    assert code == 2 and said == f"error: {tmp_path} holds something else than scenes: name another folder\n"
    assert files_of(tmp_path) == before


def test_scenes_are_replaced_behind_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "scenes")
    for count in (2, 1):
        write_all_scenes(tmp_path / "link", {"train": 1, "val": count})
        assert len(list((tmp_path / "scenes/coco/val2017").iterdir())) == count
    assert (tmp_path / "link").is_symlink()


def test_a_picture_is_refused_without_scenes_or_in_no_folder(program, tmp_path):
    code, said = program(tmp_path / "d", "--png", tmp_path / "d.png")
    assert code == 2 and said == "error: --png draws scenes: add --scenes\n"
    code, said = program(tmp_path / "d", "--scenes", "--png", tmp_path / "none" / "d.png")
    assert code == 2 and said.startswith("error: --png ") and not list(tmp_path.iterdir())


def test_nothing_is_left_where_writing_fails(monkeypatch, tmp_path):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tools.datasets.scenes.Path, "hardlink_to", full)
    with pytest.raises(UserError, match="disk full"):
        write_all_scenes(tmp_path / "d", COUNTS)
    assert not list(tmp_path.iterdir())


def test_the_picture_shows_scenes_masks_and_labels(scenes, tmp_path):
    draw_scenes(scenes, tmp_path / "s.png")
    assert pixels(tmp_path / "s.png").std() > 20
