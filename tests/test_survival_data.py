"""Runs that meet images which cannot be read: they stop and say which, or replace them, counted and listed."""

import shutil
import zlib

import pytest
from PIL import PngImagePlugin

pytest_plugins = ["survival"]
pytestmark = pytest.mark.slow


def chunk(name, content):
    return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")


def write_bomb(path):
    """A PNG that says it has 40000 x 40000 pixels."""
    size = 40000
    header = size.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(PngImagePlugin._MAGIC + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def dangle(path):
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_empty(path):
    path.write_bytes(b"")


def write_text(path):
    path.write_text("not a picture")


BREAK = {
    "green_rows/009.png": cut_off,
    "amber_rows/001.jpg": make_empty,
    "violet_columns/004.jpg": write_text,
    "amber_columns/006.png": write_bomb,
    "green_columns/014.jpg": dangle,
}
SKIP = "DATA.ON_ERROR skip DATA.MAX_BROKEN 0.2"


@pytest.fixture
def damaged(survival_tree, tmp_path):
    """Makes a tree in which some images of a split are broken: `damaged("train", *names)`."""

    def make(split, *names):
        data = tmp_path / "data"
        shutil.copytree(survival_tree, data)
        for name in names:
            BREAK[name](data / split / name)
        return data

    return make


@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in BREAK), ("green_rows/009.png", 2)])
def test_broken_image_stops_the_run(make_life, damaged, name, workers):
    data = damaged("train", name)
    result = make_life(data=data, workers=workers).go_on()
    assert result.code == 2
    (error,) = result.errors
    assert error.startswith(f"{data / 'train' / name} of class {name.partition('/')[0]} is broken (")
    assert "DATA.ON_ERROR skip" in error
    assert "Traceback" not in result.stderr


def test_broken_image_of_one_rank_stops_both(make_life, damaged):
    name = "green_rows/009.png"
    data = damaged("train", name)
    result = make_life(ranks=2, workers=2, data=data).start().end()
    (error,) = result.errors
    assert f"{data / 'train' / name} of class green_rows is broken (" in error
    assert "exitcode  : 2" in result.stderr


def test_broken_images_are_replaced_alike_by_any_workers_and_after_a_kill(make_life, damaged, check_same_end):
    data = damaged("train", *BREAK)
    killed, plain, busy = (
        make_life(name, data=data, workers=workers, opts=SKIP)
        for name, workers in (("killed", 0), ("plain", 0), ("busy", 2))
    )
    killed.kill("updated 8")
    runs = [killed.start().end(), plain.go_on(), busy.go_on()]
    killed, plain, busy = (life.run(result) for life, result in zip((killed, plain, busy), runs, strict=True))
    check_same_end(busy, plain)
    check_same_end(killed, plain)
    lines = (plain.folder / "broken.txt").read_text().splitlines()
    assert {line.partition(" of class")[0] for line in lines} == {str(data / "train" / name) for name in BREAK}
    assert len(lines) == len(BREAK)
    assert plain.checkpoint()["progress"]["broken"] == lines
    for run in (busy, killed):
        assert (run.folder / "broken.txt").read_text().splitlines() == lines
    assert f"{len(BREAK)} broken training image(s) so far" in plain.result.stdout


def test_too_many_broken_images_end_the_run(make_life, damaged):
    data = damaged("train", *BREAK)
    life = make_life(data=data, opts="DATA.ON_ERROR skip DATA.MAX_BROKEN 0.1")
    result = life.go_on()
    assert result.code == 2
    (error,) = result.errors
    assert error.startswith(f"{len(BREAK)} of 44 training images are broken, the last one {data / 'train'}")
    assert "DATA.MAX_BROKEN" in error
    assert len((life.folder / "broken.txt").read_text().splitlines()) == len(BREAK)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_never_goes_on_without_an_image(make_life, damaged, workers):
    name = "green_rows/009.png"
    data = damaged("val", name)
    life = make_life(data=data, workers=workers, opts=SKIP)
    result = life.go_on()
    assert result.code == 2
    (error,) = result.errors
    assert error.startswith(f"{data / 'val' / name} of class green_rows is broken (")
    assert "Acc@1" not in result.stdout
    assert "ckpt_epoch_1.pth" not in life.checkpoints()
