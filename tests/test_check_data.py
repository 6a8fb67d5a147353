"""The check of a data set before training: what it finds, what it says, how it ends."""

import errno
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch.utils.data
from helpers_unit import ROOT, noise, only_decoded, write_folder, write_tar
from PIL import Image, PngImagePlugin

import data.decoding
from data.datasets import FolderSource, ImageSamples

PROGRAM = "tools/check_data.py"
NO_IMAGE = "not an image, or of a format that cannot be read"


def fill(root, train, val):
    """Writes both splits, no image of one in the other."""
    write_folder(root / "train", train)
    write_folder(root / "val", val, lambda number: noise(1000 + number))
    return root


@pytest.fixture
def root(tmp_path):
    """A data set with nothing to mend."""
    return fill(tmp_path / "D", {"ant": 5, "bee": 3}, {"ant": 2, "bee": 1})


@pytest.fixture
def check(call, tmp_path):
    """Checks a data set: how the program ended, and its report."""

    def run(root, *flags, workers=2):
        file = tmp_path / "report.json"
        result = call(PROGRAM, "--data-path", root, "--workers", workers, "--json", file, *flags)
        return result, json.loads(file.read_text())

    return run


def line_of(text, start):
    """What a line says after its beginning, in words."""
    lines = [line for line in text.splitlines() if line.startswith(start)]
    assert len(lines) == 1, (start, text)
    return lines[0].removeprefix(start).split()


def section(text, title):
    """The lines below a title."""
    return text.split(f"\n{title}:\n")[1].split("\n\n")[0].splitlines()


def without_mending(report):
    return [report[name] for name in ("only_in_train", "only_in_val", "duplicates")] + [
        report[split][name] for split in ("train", "val") for name in ("without_images", "broken")
    ]


# Nothing to mend


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sound_data_set_is_counted_and_passes(check, root, workers):
    result, report = check(root, workers=workers)
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0].split() == ["train", "val"]
    assert line_of(result.stdout, "classes") == ["2", "2"]
    assert line_of(result.stdout, "images") == ["8", "3"]
    assert line_of(result.stdout, "fewest images of a class") == ["3", "1"]
    assert line_of(result.stdout, "most images of a class") == ["5", "2"]
    assert line_of(result.stdout, "broken files") == ["0", "0"]
    assert result.stdout.splitlines()[-1] == "nothing to mend"
    assert report["train"]["classes"] == {"ant": 5, "bee": 3}
    assert report["val"]["classes"] == {"ant": 2, "bee": 1}
    assert (report["train"]["images"], report["val"]["images"]) == (8, 3)
    assert not any(without_mending(report)) and not any(report["to_mend"].values())


def test_the_table_is_aligned(check, root):
    table = check(root)[0].stdout.split("\n\n")[0].splitlines()
    assert len({len(line) for line in table}) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_every_kind_of_image_that_training_reads_is_fine(check, root, workers):
    folder, grey = root / "train" / "ant", noise(1).convert("L")
    noise(2).convert("CMYK").save(folder / "cmyk.jpg")
    noise(3).quantize(16).save(folder / "palette.png")
    noise(4).convert("RGBA").quantize(8).save(folder / "clear_palette.png", transparency=0)
    Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257).save(folder / "deep.png")
    noise(5).convert("RGBA").save(folder / "alpha.png")
    grey.save(folder / "grey.jpg")
    grey.convert("LA").save(folder / "grey_alpha.png")
    grey.convert("1").save(folder / "two_tones.png")
    result, report = check(root, workers=workers)
    assert result.code == 0, result.stdout
    modes = {"RGB": 8, "P": 2, "CMYK": 1, "I;16": 1, "RGBA": 1, "L": 1, "LA": 1, "1": 1}
    assert report["train"]["modes"] == modes and next(iter(report["train"]["modes"])) == "RGB"
    assert report["val"]["modes"] == {"RGB": 3}
    assert line_of(result.stdout, "mode RGB ") == ["8", "3"] and line_of(result.stdout, "mode I;16 ") == ["1", "0"]


def test_sizes_are_ordered_by_area_and_small_images_are_counted(check, tmp_path):
    sizes = [(90, 10), (31, 300), (32, 32), (50, 40), (300, 32)]
    root = fill(tmp_path / "D", {"ant": 0}, {"ant": 1})
    for number, size in enumerate(sizes):
        noise(number, size).save(root / "train" / "ant" / f"{number}.png")
    result, report = check(root)
    assert report["train"]["sizes"] == {"smallest": [90, 10], "median": [50, 40], "largest": [300, 32]}
    assert (report["train"]["small"], report["val"]["small"]) == (2, 0)
    assert line_of(result.stdout, "smallest size") == ["90x10", "40x36"]
    assert line_of(result.stdout, "median size") == ["50x40", "40x36"]
    assert line_of(result.stdout, "largest size") == ["300x32", "40x36"]
    assert line_of(result.stdout, "under 32 pixels on a side") == ["2", "0"]


def test_the_median_size_counts_every_image(check, tmp_path):
    root = fill(tmp_path / "D", {"ant": 0}, {"ant": 1})
    for number, side in enumerate([40, 40, 40, 50, 60]):
        noise(number, (side, side)).save(root / "train" / "ant" / f"{number}.png")
    assert check(root)[1]["train"]["sizes"]["median"] == [40, 40]


def test_files_that_are_not_read_are_counted_by_suffix(check, root):
    for name in ("ant/a.txt", "ant/b.TXT", "bee/deeper/c.txt", "bee/README", "bee/d.avif", "list.csv"):
        path = root / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    shutil.copy(root / "train" / "ant" / "000.png", root / "train" / "stray.png")
    noise(50).save(root / "train" / "ant" / "50.JPEG", "JPEG")
    result, report = check(root)
    assert result.code == 0
    assert report["train"]["not_read"] == {"(none)": 1, ".avif": 1, ".csv": 1, ".png": 1, ".txt": 3}
    assert report["val"]["not_read"] == {} and report["train"]["images"] == 9
    assert line_of(result.stdout, "not read: .txt") == ["3", "0"]


# Classes


@pytest.mark.parametrize("workers", [1, 2])
def test_classes_of_one_split_only_are_named(check, tmp_path, workers):
    root = fill(tmp_path / "D", {"ant": 1, "bee": 1, "cat": 1}, {"bee": 1, "dog": 1})
    result, report = check(root, workers=workers)
    assert result.code == 1
    assert (report["only_in_train"], report["only_in_val"]) == (["ant", "cat"], ["dog"])
    assert section(result.stdout, "classes that only train has (2)") == ["  ant", "  cat"]
    assert section(result.stdout, "classes that only val has (1)") == ["  dog"]
    assert result.stdout.splitlines()[-1] == "3 things to mend before training: 3 classes of one split only"


@pytest.mark.parametrize("split", ["train", "val"])
def test_class_folders_without_images_are_named(check, root, split):
    for each in ("train", "val"):
        write_folder(root / each, {"cat": int(each != split)}, lambda number: noise(500))
    (root / split / "cat" / "notes.txt").write_text("text")
    result, report = check(root)
    assert result.code == 1
    assert report[split]["without_images"] == ["cat"] and report[split]["classes"]["cat"] == 0
    assert section(result.stdout, f"classes without images in {split} (1)") == ["  cat"]
    assert result.stdout.splitlines()[-1] == "1 thing to mend before training: 1 class without images"


# Broken files


@pytest.fixture
def broken(root, monkeypatch):
    """A data set with files that are broken in every way, and their causes by name."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # from here Pillow warns, from twice as many on it refuses
    folder = root / "train" / "bee"
    noise(1).save(folder / "whole.jpg")
    for form in ("jpg", "png", "tif"):
        noise(60).save(folder / f"cut.{form}", compression="tiff_lzw")
        content = (folder / f"cut.{form}").read_bytes()
        (folder / f"cut.{form}").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("this is no image")
    noise(61, (50, 50)).save(folder / "large.png")
    noise(62, (80, 80)).save(folder / "too_large.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "circle.png").symlink_to("circle.png")
    return root, {
        "circle.png": "Too many levels of symbolic links",
        "cut.jpg": "image file is truncated",
        "cut.png": "image file is truncated",
        "cut.tif": NO_IMAGE,
        "dangling.png": "No such file or directory",
        "empty.jpg": NO_IMAGE,
        "text.jpg": NO_IMAGE,
        "too_large.png": "Image size (6400 pixels) exceeds limit",
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_files_are_named_with_class_and_cause(check, broken, workers):
    root, causes = broken
    result, report = check(root, workers=workers)
    found = report["train"]["broken"]
    assert [file["path"] for file in found] == [str(root / "train" / "bee" / name) for name in causes]
    assert all(file["class"] == "bee" for file in found)
    for file, cause in zip(found, causes.values(), strict=True):
        assert file["cause"].startswith(cause) and "\n" not in file["cause"]
    assert result.code == 1 and report["val"]["broken"] == []
    assert report["train"]["classes"]["bee"] == 5 + len(causes) and report["train"]["modes"] == {"RGB": 10}
    assert line_of(result.stdout, "broken files  ") == ["8", "0"]
    lines = section(result.stdout, "broken files in train (8)")
    for line, file in zip(lines, found, strict=True):
        assert [part.strip() for part in line.split("  ") if part.strip()] == [file["path"], "class bee", file["cause"]]
    assert result.stdout.splitlines()[-1] == "8 things to mend before training: 8 broken files"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_found_broken_is_what_training_complains_of(check, broken):
    root, _ = broken
    samples = ImageSamples(FolderSource(root / "train"), only_decoded(lambda image: image.size))
    complaints = {
        samples.source.name(index): samples[index][2] for index in range(len(samples)) if samples[index][2] != ""
    }
    assert [file["path"] for file in check(root)[1]["train"]["broken"]] == list(complaints)


def test_a_file_that_may_not_be_read_is_broken(check, root, monkeypatch):
    def refuse(source, index):
        raise PermissionError(errno.EACCES, "Permission denied", source.name(index))

    monkeypatch.setattr(FolderSource, "read", refuse)
    assert check(root)[1]["train"]["broken"][0]["cause"] == "Permission denied"


@pytest.mark.parametrize("error", [struct.error("odd bytes"), RuntimeError("odd bytes"), MemoryError("odd bytes")])
def test_whatever_a_decoder_raises_the_file_is_broken(check, root, monkeypatch, error):
    decode = data.decoding.as_mode

    def stumble(image, mode):
        if image.filename.endswith("002.png"):
            raise error
        return decode(image, mode)

    monkeypatch.setattr(data.decoding, "as_mode", stumble)
    result, report = check(root)
    assert result.code == 1
    assert [(Path(file["path"]).name, file["cause"]) for file in report["train"]["broken"]] == [
        ("002.png", "odd bytes")
    ]


def test_a_split_of_nothing_but_broken_files_is_reported(check, root):
    for path in (root / "val").rglob("*.png"):
        path.write_text("text")
    result, report = check(root)
    assert result.code == 1 and len(report["val"]["broken"]) == 3
    assert report["val"]["sizes"] == {"smallest": None, "median": None, "largest": None}
    assert line_of(result.stdout, "median size") == ["40x36", "-"]


@pytest.mark.slow
def test_decoders_print_nothing(start, root):
    folder = root / "train" / "ant"
    noise(60).save(folder / "bad.tif", compression="tiff_lzw")
    content = (folder / "bad.tif").read_bytes()
    (folder / "bad.tif").write_bytes(content[:100] + b"\xff" * 300 + content[400:])  # libtiff prints
    (folder / "cut.tif").write_bytes(content[: len(content) // 3])  # Pillow warns
    result = start(PROGRAM, "--data-path", root, "--workers", os.cpu_count() + 1)  # torch warns
    assert (result.code, result.stderr) == (1, "")
    assert len(section(result.stdout, "broken files in train (2)")) == 2


# Images of both splits


@pytest.mark.parametrize("workers", [1, 2])
def test_images_of_both_splits_are_found_by_their_pixels(check, root, workers):
    train, val = root / "train", root / "val"
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "another file of the same pixels")
    noise(0).save(val / "bee" / "again.png", pnginfo=text)
    noise(5).save(val / "ant" / "other_class.webp", lossless=True)
    noise(5).save(train / "ant" / "twice.bmp")
    grey = noise(70).convert("L")
    grey.save(train / "ant" / "grey.png")
    grey.convert("RGB").save(val / "ant" / "grey.tif")
    result, report = check(root, workers=workers)
    pairs = [
        ([train / "ant" / "grey.png"], [val / "ant" / "grey.tif"]),
        ([train / "ant" / "twice.bmp", train / "bee" / "005.png"], [val / "ant" / "other_class.webp"]),
        ([train / "ant" / "000.png"], [val / "bee" / "again.png"]),
    ]
    assert report["duplicates"] == [
        {"train": [*map(str, in_train)], "val": [*map(str, in_val)]} for in_train, in_val in pairs
    ]
    lines = section(result.stdout, "images of val that train has too (3)")
    assert [line.split() for line in lines] == [
        [str(val / "ant" / "grey.tif"), "=", str(train / "ant" / "grey.png")],
        [str(val / "ant" / "other_class.webp"), "=", str(train / "ant" / "twice.bmp"), "and", "1", "more"],
        [str(val / "bee" / "again.png"), "=", str(train / "ant" / "000.png")],
    ]
    assert len({line.index("=") for line in lines}) == 1
    assert result.code == 1
    assert result.stdout.splitlines()[-1] == "3 things to mend before training: 3 images in both splits"


def test_every_copy_in_the_validation_split_counts(check, root):
    for name in ("one.png", "two.png"):
        shutil.copy(root / "train" / "ant" / "000.png", root / "val" / "ant" / name)
    result, report = check(root)
    assert [len(pair["val"]) for pair in report["duplicates"]] == [2]
    assert len(section(result.stdout, "images of val that train has too (2)")) == report["to_mend"]["in_both_splits"]


def test_other_pixels_another_shape_and_copies_inside_a_split_are_no_duplicates(check, root):
    noise(0).save(root / "val" / "ant" / "lossy.jpg", quality=95)
    retouched = noise(0)
    retouched.putpixel((39, 35), (1, 2, 3))
    retouched.save(root / "val" / "ant" / "retouched.png")
    Image.new("L", (20, 40)).save(root / "train" / "ant" / "black.png")
    Image.new("L", (40, 20)).save(root / "val" / "ant" / "black.png")
    shutil.copy(root / "train" / "ant" / "000.png", root / "train" / "bee" / "copy.png")
    result, report = check(root)
    assert (result.code, report["duplicates"]) == (0, [])


# The report


def test_long_lists_are_cut_in_words_and_whole_in_the_json(check, root):
    for number in range(13):
        (root / "train" / "ant" / f"x{number:02d}.jpg").touch()
        (root / "val" / f"class{number:02d}").mkdir()
    result, report = check(root)
    lines = section(result.stdout, "broken files in train (13)")
    assert len(lines) == 11 and "x09.jpg" in lines[9] and lines[10] == "  and 3 more, which --json FILE writes"
    assert len(report["train"]["broken"]) == len(report["only_in_val"]) == len(report["val"]["without_images"]) == 13
    assert report["to_mend"] == {"broken": 13, "only_in_one_split": 13, "without_images": 13, "in_both_splits": 0}
    assert result.stdout.splitlines()[-1] == (
        "39 things to mend before training: 13 broken files, 13 classes of one split only, 13 classes without images"
    )


def test_a_list_of_just_as_many_lines_as_are_printed_is_whole(check, root):
    for number in range(10):
        (root / "train" / "ant" / f"x{number:02d}.jpg").touch()
    assert "more" not in check(root)[0].stdout


@pytest.mark.slow
def test_the_report_does_not_depend_on_the_number_of_workers(check, tmp_path, monkeypatch):
    root = fill(tmp_path / "D", {"ant": 70, "bee": 70}, {"ant": 40, "bee": 40})
    for number in (0, 30, 40, 139):
        shutil.copy(
            root / "train" / ("ant" if number < 70 else "bee") / f"{number:03d}.png",
            root / "val" / "ant" / f"copy{number}.png",
        )
    for number in (1, 33, 68):
        (root / "train" / "ant" / f"{number:03d}.png").write_text("text")
    decode = data.decoding.as_mode

    def dawdle(image, mode):
        if image.filename.endswith("000.png"):  # the first chunk comes last
            time.sleep(0.3)
        return decode(image, mode)

    monkeypatch.setattr(data.decoding, "as_mode", dawdle)
    results = [check(root, workers=workers) for workers in (1, 2, 3)]
    assert results[0] == results[1] == results[2]
    assert len(results[0][1]["duplicates"]) == 4
    assert [Path(file["path"]).name for file in results[0][1]["train"]["broken"]] == ["001.png", "033.png", "068.png"]


def test_names_that_are_no_text_are_written_all_the_same(check, root):
    path = root / "train" / "ant" / os.fsdecode(b"caf\xe9.jpg")
    path.touch()
    result, report = check(root)
    assert report["train"]["broken"][0]["path"] == str(path)
    assert "caf\\udce9.jpg" in result.stdout
    result.stdout.encode()


def test_splits_have_the_names_they_are_given(check, root):
    (root / "train").rename(root / "learn")
    (root / "val").rename(root / "exam")
    (root / "learn" / "cat").mkdir()
    result, report = check(root, "--train-split", "learn", "--val-split", "exam")
    assert result.stdout.splitlines()[0].split() == ["learn", "exam"]
    assert section(result.stdout, "classes without images in learn (1)") == ["  cat"]
    assert (report["train"]["split"], report["val"]["split"]) == ("learn", "exam")


def test_without_json_the_words_are_the_same_and_nothing_is_written(check, call, root):
    before = sorted(root.parent.rglob("*"))
    alone = call(PROGRAM, "--data-path", root)
    assert sorted(root.parent.rglob("*")) == before
    assert alone == check(root)[0]


# Tar files


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tar_file_is_checked_as_its_folder_is(check, root, workers):
    folder = root / "train" / "ant"
    (folder / "text.jpg").write_text("text")
    (folder / "notes.txt").write_text("text")
    shutil.copy(folder / "000.png", root / "val" / "bee" / "copy.png")
    result, report = check(root)
    for split in ("train", "val"):
        write_tar(root / f"{split}.tar", root / split)
        shutil.rmtree(root / split)
    tar_result, tar_report = check(root, "--dataset", "tar", workers=workers)
    assert (result.code, tar_result.code) == (1, 1)
    assert tar_result.stdout.split("\n\n")[0] == result.stdout.split("\n\n")[0]
    assert tar_result.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
    assert tar_report["train"]["broken"] == [
        {"path": f"{root}/train.tar/ant/text.jpg", "class": "ant", "cause": NO_IMAGE}
    ]
    assert tar_report["duplicates"] == [
        {"train": [f"{root}/train.tar/ant/000.png"], "val": [f"{root}/val.tar/bee/copy.png"]}
    ]
    for split in ("train", "val"):
        for name in ("classes", "sizes", "modes", "not_read"):
            assert tar_report[split][name] == report[split][name]


# How it ends


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--data-path"),
        (["--data-path", "{D}", "--surprise"], "--surprise"),
        (["--data-path", "{D}", "--work", "2"], "--work"),
        (["--data-path", "{D}", "--workers", "two"], "--workers"),
        (["--data-path", "{D}", "--workers", "0"], "--workers: 0: give a whole number, at least 1"),
        (["--data-path", "{D}/nowhere"], "nowhere/train is no folder"),
        (["--data-path", "{D}", "--train-split", "learn"], "learn is no folder"),
        (["--data-path", "{D}", "--val-split", "exam"], "exam is no folder"),
        (["--data-path", "{D}", "--val-split", "train"], "both train: name two splits"),
        (["--data-path", "{D}/val"], "val/train is no folder"),
        (["--data-path", "{D}", "--dataset", "tar"], "train.tar does not exist"),
        (["--data-path", "{D}", "--dataset", "wds/shards"], "--dataset wds/shards: only folder and tar"),
        (["--data-path", "{D}", "--json", "{D}/nowhere/r.json"], "nowhere/r.json: name a file in a folder that exists"),
        (["--data-path", "{D}", "--json", "{D}"], "name a file in a folder that exists"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line_before_anything_is_read(call, root, monkeypatch, words, said):
    monkeypatch.setattr(torch.utils.data, "DataLoader", None)  # no reading without one
    result = call(PROGRAM, *(word.format(D=root) for word in words))
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and len(result.errors) == 1
    assert said in result.errors[0]


def test_a_folder_without_classes_is_refused(call, root):
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    result = call(PROGRAM, "--data-path", root)
    assert result.code == 2 and str(root / "val") in result.errors[0] and result.stderr.count("\n") == 1


def test_a_tar_file_that_is_cut_off_is_refused(call, root):
    for split in ("train", "val"):
        write_tar(root / f"{split}.tar", root / split)
    content = (root / "val.tar").read_bytes()
    (root / "val.tar").write_bytes(content[: len(content) // 3])
    result = call(PROGRAM, "--data-path", root, "--dataset", "tar")
    assert result.code == 2 and "cannot be opened" in result.errors[0] and result.stderr.count("\n") == 1


def test_a_report_that_cannot_be_written_is_still_printed(call, root):
    target = root / "report.json"
    target.symlink_to("nowhere/report.json")
    result = call(PROGRAM, "--data-path", root, "--json", target)
    assert result.code == 2 and "cannot be written" in result.errors[0] and result.stderr.count("\n") == 1
    assert result.stdout.splitlines()[-1] == "nothing to mend"


def test_as_many_processes_read_as_are_asked_for_or_as_there_are_cores(call, root, monkeypatch):
    seen, loader = [], torch.utils.data.DataLoader
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    monkeypatch.setattr(
        torch.utils.data,
        "DataLoader",
        lambda *args, num_workers, **others: seen.append(num_workers) or loader(*args, num_workers=1, **others),
    )
    call(PROGRAM, "--data-path", root, "--workers", 2)
    call(PROGRAM, "--data-path", root)
    assert seen == [2, 2, 3, 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reading_process_that_is_killed_ends_the_program_in_one_line(call, root, monkeypatch, workers):
    decode = data.decoding.as_mode

    def die(image, mode):
        if image.filename.endswith("train/ant/002.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(image, mode)

    monkeypatch.setattr(data.decoding, "as_mode", die)
    result = call(PROGRAM, "--data-path", root, "--workers", workers)
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "a process that reads train died" in result.errors[0]
    assert "try fewer --workers" in result.errors[0]


def wait_for_reader(pipe):
    """Waits until a process reads from a pipe, and returns the end that keeps it waiting."""
    for _ in range(1200):
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # no reader yet
            time.sleep(0.05)
    raise TimeoutError(pipe)


@pytest.mark.slow
def test_a_terminal_sees_the_progress_and_its_ctrl_c_ends_everything_cleanly(user_environment, root):
    pipes = [root / "train" / "ant" / "pipe.png", root / "train" / "bee" / "pipe.png"]  # one for each process
    write_folder(root / "train", {"bee": 40})
    for pipe in pipes:
        os.mkfifo(pipe)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, PROGRAM, "--data-path", root, "--workers", "2"],
        cwd=ROOT,
        env=user_environment(),
        stdout=subprocess.PIPE,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs lack
    )
    os.close(theirs)
    ends = [wait_for_reader(pipe) for pipe in pipes]
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.2)
    for end in ends:
        os.close(end)
    out, _ = process.communicate(timeout=60)
    said = b""
    try:
        while chunk := os.read(ours, 4096):
            said += chunk
    except OSError:  # Linux's word for the end of a terminal
        pass
    finally:
        os.close(ours)
    assert (process.returncode, out) == (130, b"")
    assert b"val: 100%" in said and b"train:   0%" in said
    assert b"Traceback" not in said and b"Error" not in said
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, 0)
