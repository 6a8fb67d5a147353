"""Folders, tar files and streams as samples, broken images, and classes matched by name."""

import builtins
import errno
import gc
import io
import random
import re
import struct
import tempfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_unit import (
    ALONE,
    CPU,
    FakeReader,
    configured,
    examples,
    noise,
    only_decoded,
    plain,
    refuse_to_list,
    write_folder,
    write_tar,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from data.datasets import (
    FolderSource,
    ImageSamples,
    ImageStream,
    TimmSource,
    check_same_classes,
    class_names,
    count_classes,
    map_classes,
    open_split,
    repeated,
)
from data.files import walk
from data.transforms import train_transform
from utils.dist import World
from utils.errors import BrokenDataError, UserError
from utils.seeding import number_for

CLASSES = {"b": 2, "a": 3, "10": 2, "9": 1}  # sorted as text: 10, 9, a, b


def unchanged(image):
    return image


def pixels(image):
    return np.array(image)


def samples_of(root, mode="RGB", transform=pixels, replace=False):
    return ImageSamples(FolderSource(root), only_decoded(transform, mode), replace=replace)


# Folders


def test_a_folders_classes_are_numbered_in_the_order_of_their_names(tmp_path):
    source = FolderSource(write_folder(tmp_path, CLASSES))
    assert source.classes == ["10", "9", "a", "b"]
    assert len(source) == 8
    for index in range(len(source)):
        assert Path(source.name(index)).parent.name == source.classes[source.read(index)[1]]


def test_images_in_subfolders_belong_to_the_class_above(tmp_path):
    write_folder(tmp_path, {"a": 1, "b/more/still": 2})
    source = FolderSource(tmp_path)
    assert source.classes == ["a", "b"]
    assert [source.read(index)[1] for index in range(len(source))] == [0, 1, 1]


@pytest.mark.parametrize("turned", [False, True])
def test_images_come_in_torchvisions_order_whatever_that_of_the_disk_is(tmp_path, monkeypatch, turned):
    def listed(root):
        return ((folder, sorted(names, reverse=turned)) for folder, names in sorted(walk(root), reverse=turned))

    monkeypatch.setattr("data.datasets.walk", listed)
    write_folder(tmp_path, {"b": 2, "B": 1, "a b/more": 2, "a": 1, "a/z": 1, "a-/y": 1, "a/Z": 1})
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "A.JPEG").touch()
    source, theirs = FolderSource(tmp_path), ImageFolder(str(tmp_path))
    found = [(source.name(index), source.classes.index(source.class_of(index))) for index in range(len(source))]
    assert (source.classes, found) == (theirs.classes, theirs.samples)


def test_other_files_are_no_images(tmp_path):
    write_folder(tmp_path, {"a": 1})
    (tmp_path / "a" / "notes.txt").write_text("text")
    (tmp_path / "list.csv").write_text("text")
    assert len(FolderSource(tmp_path)) == 1


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder"):
        FolderSource(tmp_path / "nowhere")


def test_a_folder_without_classes_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        FolderSource(tmp_path)


def test_a_class_without_images_is_named(tmp_path):
    write_folder(tmp_path, {"full": 1})
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UserError, match=r"classes without images \(hollow\): add") as caught:
        FolderSource(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "hollow" / "moving.gif").touch()
    with pytest.raises(UserError, match=r"classes without images \(hollow; files of other endings there: \.gif\)"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("place", ["", "a", "a/more"])
def test_a_folder_that_cannot_be_read_is_named_and_not_passed_over(tmp_path, monkeypatch, place):
    write_folder(tmp_path, {"a": 1, "a/more": 1, "b": 1})
    refuse_to_list(monkeypatch, tmp_path / place)
    with pytest.raises(UserError, match=f"^{tmp_path / place} cannot be read \\(Permission denied\\): mend it"):
        FolderSource(tmp_path)


# Samples


def test_a_sample_is_transformed_and_its_class_translated(tmp_path):
    write_folder(tmp_path, {"a": 1, "b": 1}, plain)
    samples = ImageSamples(FolderSource(tmp_path), only_decoded(lambda image: image.getpixel((0, 0)), "L"), [7, 3])
    assert [samples[index] for index in range(len(samples))] == [(0, 7, ""), (1, 3, "")]


def test_a_seeded_sample_draws_the_same_every_time(tmp_path):
    write_folder(tmp_path, {"a": 2})
    samples = samples_of(tmp_path, transform=lambda image: float(torch.rand(())))
    first = samples[0, 11]
    torch.rand(3)
    assert samples[0, 11] == first == samples[1, 11]
    assert samples[0, 12] != first


def test_grey_and_coloured_networks_get_images_of_their_mode(tmp_path):
    write_folder(tmp_path, {"a": 1}, lambda number: Image.new("CMYK", (12, 9), (0, 255, 255, 0)), ".jpg")
    assert samples_of(tmp_path)[0][0].shape == (9, 12, 3)
    assert samples_of(tmp_path, "L")[0][0].shape == (9, 12)


# Broken images


def encoded(form, image=None, **options):
    buffer = io.BytesIO()
    (image or noise(0)).save(buffer, form, **options)
    return buffer.getvalue()


def bomb(width, height):
    """The file of a PNG image of one tone and any size; only its header is whole."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def assert_complaint(complaint, start, cause=""):
    """A line that names the sample, the class and the cause."""
    assert re.fullmatch(rf".*{re.escape(start)} is broken \(.+\)", complaint)
    assert cause in complaint


BROKEN = {
    "half": (".jpg", encoded("JPEG")[:600]),
    "no end": (".jpg", encoded("JPEG")[:-2]),
    "half progressive": (".jpg", encoded("JPEG", progressive=True)[:600]),
    "text": (".jpg", b"this is text\nand no image"),
    "empty": (".jpg", b""),
    "half PNG": (".png", encoded("PNG")[:600]),
    "PNG of nothing": (".png", b"\x89PNG\r\n\x1a\n"),
    "half WebP": (".webp", encoded("WEBP")[:300]),
    "zeros": (".jpg", b"\x00" * 1000),
    "decompression bomb": (".png", bomb(100_000, 100_000)),
}


@pytest.mark.parametrize(("suffix", "content"), BROKEN.values(), ids=BROKEN)
def test_a_broken_image_is_a_blank_one_with_a_complaint(tmp_path, suffix, content):
    write_folder(tmp_path, {"a": 1, "b": 1})
    path = tmp_path / "b" / f"000{suffix}"
    path.write_bytes(content)
    samples = samples_of(tmp_path)
    assert [samples[index][2] for index in (0, 2)] == ["", ""]
    image, target, complaint = samples[1]
    assert not image.any()
    assert target == 0
    assert_complaint(complaint, f"{path} of class b")


def refuse_to_open(monkeypatch, path, error):
    """Lets opening a file fail: tests may run as a user whom no permission stops."""
    original = open

    def guarded(file, *args, **kwargs):
        if str(file) == str(path):
            raise error
        return original(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", guarded)


def test_an_unreadable_image_is_a_complaint(tmp_path, monkeypatch):
    samples = samples_of(write_folder(tmp_path, {"a": 1}))
    path = tmp_path / "a" / "000.png"
    refuse_to_open(monkeypatch, path, PermissionError(errno.EACCES, "Permission denied", str(path)))
    image, _, complaint = samples[0]
    assert not image.any()
    assert_complaint(complaint, f"{path} of class a", "Permission denied")


def test_an_image_on_a_disk_that_fails_is_a_complaint(tmp_path, monkeypatch):
    samples = samples_of(write_folder(tmp_path, {"a": 1}))
    path = tmp_path / "a" / "000.png"
    refuse_to_open(monkeypatch, path, OSError(errno.EIO, "Input/output error", str(path)))
    assert_complaint(samples[0][2], f"{path} of class a", "Input/output error")


def test_a_dangling_link_is_a_complaint(tmp_path):
    write_folder(tmp_path, {"a": 1})
    path = tmp_path / "a" / "999.png"
    path.symlink_to(tmp_path / "gone.png")
    image, _, complaint = samples_of(tmp_path)[1]
    assert not image.any()
    assert_complaint(complaint, f"{path} of class a", "No such file")


def test_an_image_that_vanished_is_a_complaint(tmp_path):
    samples = samples_of(write_folder(tmp_path, {"a": 1}))
    (tmp_path / "a" / "000.png").unlink()
    image, _, complaint = samples[0]
    assert not image.any()
    assert_complaint(complaint, "000.png of class a", "No such file")


def test_an_image_that_was_read_is_closed(tmp_path):
    samples = samples_of(write_folder(tmp_path, {"a": 20}))
    (tmp_path / "a" / "003.png").write_bytes(b"")
    before = len(list(Path("/proc/self/fd").iterdir()))
    gc.disable()
    try:
        kept = [samples[index] for index in range(20)]
    finally:
        gc.enable()
    assert len(kept) == 20
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


# Replacing broken images


def grey(image):
    return image.getpixel((0, 0))


def partly_broken(root, broken, count=12):
    """Evenly grey images, numbered through, of which some are broken."""
    write_folder(root, {"a": count // 2, "b": count - count // 2}, plain)
    for number in broken:
        next(root.glob(f"*/{number:03d}.png")).write_bytes(b"")
    return samples_of(root, "L", grey, replace=True)


def test_another_sample_takes_a_broken_ones_place(tmp_path):
    samples = partly_broken(tmp_path, {3})
    for seed in range(30):
        image, target, complaint = samples[3, seed]
        assert image != 3
        assert target == int(image >= 6)  # its own class, not that of the broken one
        assert_complaint(complaint, f"{tmp_path}/a/003.png of class a")
    assert len({samples[3, seed][0] for seed in range(30)}) > 5


def test_the_seed_alone_chooses_the_replacement(tmp_path):
    samples = partly_broken(tmp_path, {3})
    wanted = [number_for(seed, "replacement", 0) % 12 for seed in range(20)]
    for _ in range(2):
        torch.manual_seed(99)
        found = [samples[3, seed][0] for seed in range(20)]
        assert [number for number, want in zip(found, wanted, strict=True) if want != 3 and number != want] == []
        first = found
    assert [samples[3, seed][0] for seed in range(20)] == first


def test_a_replacement_that_is_broken_too_is_replaced(tmp_path):
    broken = set(range(11))
    samples = partly_broken(tmp_path, broken)
    for seed in range(5):
        assert samples[seed, seed][:2] == (11, 1)
        assert_complaint(samples[seed, seed][2], f"{seed:03d}.png of class {'a' if seed < 6 else 'b'}")


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_replacements_do_not_depend_on_the_number_of_workers(tmp_path):
    samples = partly_broken(tmp_path, {1, 2, 5, 8})
    keys = [(index, 100 + index) for index in range(12)]
    given = [list(DataLoader(samples, sampler=keys, batch_size=None, num_workers=workers)) for workers in (0, 1, 2, 3)]
    assert given[0] == given[1] == given[2] == given[3]
    assert [index for index, (_, _, complaint) in enumerate(given[0]) if complaint] == [1, 2, 5, 8]
    assert not {1, 2, 5, 8} & {image for image, _, _ in given[0]}


def test_an_unseeded_sample_is_replaced_too(tmp_path):
    samples = partly_broken(tmp_path, {3})
    assert samples[3][0] != 3
    assert samples[3] == samples[3]


def test_a_replacement_is_augmented_as_the_seed_says(tmp_path):
    write_folder(tmp_path, {"a": 4}, plain)
    (tmp_path / "a" / "001.png").write_bytes(b"")
    samples = samples_of(tmp_path, "L", lambda image: (grey(image), float(torch.rand(()))), replace=True)
    (replaced, drawn_for_it), _, _ = samples[1, 7]
    assert samples[replaced, 7][0] == (replaced, drawn_for_it)


@pytest.mark.parametrize("replace", [True, False])
def test_what_stands_for_a_broken_image_is_drawn_alike_by_fast_and_exact_loading(tmp_path, replace):
    write_folder(tmp_path, {"a": 3}, lambda number: plain(number, (32, 32)))
    (tmp_path / "a" / "001.png").write_bytes(FORMS["PNG"][:600])
    settings = {"DATA__IMG_SIZE": 32, "AUG__AUTO_AUGMENT": "none", "AUG__COLOR_JITTER": 0.0}
    states = []
    for name in ("exact", "fast"):
        transform = train_transform(configured(DATA__LOADING=name, **settings))
        samples = ImageSamples(FolderSource(tmp_path), transform, replace=replace)
        states.append([(samples[1, seed][1:], random.random()) for seed in range(10)])
    assert states[0] == states[1]


def test_data_of_which_nothing_can_be_read_is_an_error(tmp_path):
    samples = partly_broken(tmp_path, set(range(12)))
    with pytest.raises(BrokenDataError, match=r"000\.png of class a is broken .*is the data still there\?") as caught:
        samples[0, 5]
    assert "\n" not in str(caught.value)


def test_good_images_are_read_once_and_never_replaced(tmp_path, monkeypatch):
    samples = partly_broken(tmp_path, {3})
    read = []
    original = FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda self, index: (read.append(index), original(self, index))[1])
    assert [samples[index, 5][0] for index in range(12) if index != 3] == [n for n in range(12) if n != 3]
    assert read == [n for n in range(12) if n != 3]


FORMS = {
    form: encoded(form.split()[0], **options)
    for form, options in {"JPEG": {}, "PNG": {}, "GIF": {}, "BMP": {}, "TIFF": {}, "WEBP": {}, "PPM": {}}.items()
}


@given(form=st.sampled_from(sorted(FORMS)), share=st.floats(0, 1))
@examples(150)
def test_no_part_of_an_image_is_ever_given_out(form, share):
    whole = FORMS[form]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a" / "x.jpg"
        path.parent.mkdir()
        path.write_bytes(whole[: int(share * len(whole))])
        found, _, complaint = samples_of(Path(folder))[0]
    wanted = np.zeros((64, 64, 3)) if complaint else pixels(Image.open(io.BytesIO(whole)).convert("RGB"))
    assert np.array_equal(found, wanted)
    assert share < 1 or not complaint


# Data sets by their names


@pytest.fixture
def packed(tmp_path):
    """A folder of train/ and val/, and the same as tar files."""
    for split, image in (("train", noise), ("val", plain)):
        write_folder(tmp_path / split, CLASSES, image)
        write_tar(tmp_path / f"{split}.tar", tmp_path / split)
    return tmp_path


def contents(source):
    """(class name, pixels) of all samples."""
    loaded = [ImageSamples(source, only_decoded(pixels))[index] for index in range(len(source))]
    assert not any(complaint for _, _, complaint in loaded)
    return Counter((source.classes[target], image.tobytes()) for image, target, _ in loaded)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_folder_is_opened_under_either_name(packed, name):
    source = open_split(configured(DATA__DATASET=name, DATA__DATA_PATH=str(packed)), "val", is_training=False)
    assert isinstance(source, FolderSource)
    assert len(source) == 8


@pytest.mark.parametrize("name", ["tar", "torch/image_folder", "torch/folder"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_timms_data_sets_hold_what_the_folder_holds(packed, name, split):
    source = open_split(configured(DATA__DATASET=name, DATA__DATA_PATH=str(packed)), split, is_training=False)
    assert sorted(source.classes) == ["10", "9", "a", "b"]
    assert contents(source) == contents(FolderSource(packed / split))


def test_torchvisions_folders_have_sixteen_bits_scaled_as_ours(tmp_path):
    root = write_folder(tmp_path / "val", {"a": 1})
    Image.fromarray(np.full((9, 9), 30_000, np.uint16)).save(root / "a" / "000.png")
    settings = configured(DATA__DATASET="torch/image_folder", DATA__DATA_PATH=str(tmp_path))
    found = contents(open_split(settings, "val", is_training=False))
    assert found == contents(FolderSource(root)) == {("a", bytes([30_000 // 257]) * (9 * 9 * 3)): 1}


def test_a_network_of_a_folder_scores_a_tar_file_by_the_names_of_the_classes(packed):
    folder = FolderSource(packed / "val")
    tar = open_split(configured(DATA__DATASET="tar", DATA__DATA_PATH=str(packed)), "val", is_training=False)
    to_class = map_classes(tar.classes, folder.classes, 4)
    numbers = Counter(ImageSamples(tar, only_decoded(unchanged), to_class)[index][1] for index in range(len(tar)))
    assert numbers == Counter(folder.read(index)[1] for index in range(len(folder)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_file_can_be_read_by_several_workers(packed, workers):
    source = open_split(configured(DATA__DATASET="tar", DATA__DATA_PATH=str(packed)), "train", is_training=True)
    alone = [image.tobytes() for image, _, _ in (ImageSamples(source, only_decoded(pixels))[i] for i in range(8))]
    fresh = open_split(configured(DATA__DATASET="tar", DATA__DATA_PATH=str(packed)), "train", is_training=True)
    loader = DataLoader(ImageSamples(fresh, only_decoded(pixels)), batch_size=None, num_workers=workers)
    assert [bytes(image.numpy()) for image, _, _ in loader] == alone


@pytest.mark.parametrize("name", ["tar", "torch/image_folder"])
def test_a_broken_image_of_timms_data_sets_is_named_too(tmp_path, name):
    root = write_folder(tmp_path / "train", {"a": 2})
    (root / "a" / "001.png").write_bytes(FORMS["PNG"][:500])
    write_tar(tmp_path / "train.tar", root)
    source = open_split(configured(DATA__DATASET=name, DATA__DATA_PATH=str(tmp_path)), "train", is_training=True)
    complaints = [ImageSamples(source, only_decoded(pixels))[index][2] for index in range(2)]
    assert complaints[0] == ""
    assert_complaint(complaints[1], "001.png of class a")
    replaced = ImageSamples(source, only_decoded(pixels), replace=True)[1]
    assert np.array_equal(replaced[0], pixels(noise(0)))
    assert replaced[2] == complaints[1]


def test_a_broken_image_of_a_tar_file_is_told_in_the_same_words_each_time(tmp_path):
    root = write_folder(tmp_path / "train", {"a": 1})
    (root / "a" / "000.png").write_bytes(b"text")
    write_tar(tmp_path / "train.tar", root)
    source = open_split(configured(DATA__DATASET="tar", DATA__DATA_PATH=str(tmp_path)), "train", is_training=True)
    said = ImageSamples(source, only_decoded(pixels))[0][2]  # without a place in memory, which is another each time
    assert said.endswith("a/000.png of class a is broken (cannot identify image file <_io.BytesIO object>)")


@pytest.mark.parametrize(("path", "name"), [("cat.png", "cat.png"), (None, "sample 7")])
def test_a_sample_that_its_reader_does_not_name_is_called_by_its_number(path, name):
    reader = SimpleNamespace(filename=lambda index: path)  # Hugging Face's, of images that were made in memory
    assert TimmSource(SimpleNamespace(reader=reader)).name(7) == name


@pytest.mark.parametrize("content", [b"no tar file" * 100, b""], ids=["text", "empty"])
def test_a_tar_file_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "train.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"train\.tar"):
        open_split(configured(DATA__DATASET="tar", DATA__DATA_PATH=str(tmp_path)), "train", is_training=True)


def test_a_tar_file_without_images_is_refused(tmp_path):
    (tmp_path / "hollow").mkdir()
    write_tar(tmp_path / "train.tar", tmp_path / "hollow")
    with pytest.raises(UserError, match=r"train\.tar"):
        open_split(configured(DATA__DATASET="tar", DATA__DATA_PATH=str(tmp_path)), "train", is_training=True)


@pytest.mark.parametrize(
    ("name", "path", "told"),
    [
        ("folder", "", "--data-path"),
        ("tar", "", "--data-path"),
        ("torch/cifar10", "", "--data-path"),
        ("folder", "nowhere", "nowhere"),
        ("folder", ".", "test is no folder"),
        ("tar", ".", "test.tar does not exist"),
        ("zip", ".", "choose folder, tar"),
        ("cifar10", ".", "choose folder, tar"),
        ("torch/nothing", ".", "torch/nothing"),
        ("torch/cifar10", ".", "torch/cifar10"),
        ("wds/nothing", ".", "wds/nothing"),
    ],
)
def test_data_that_is_not_there_is_refused(tmp_path, name, path, told):
    root = str(tmp_path / path) if path else ""
    with pytest.raises(UserError) as caught:
        open_split(configured(DATA__DATASET=name, DATA__DATA_PATH=root), "test", is_training=False)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        (SimpleNamespace(classes=("x", "y")), ["x", "y"]),
        (SimpleNamespace(reader=SimpleNamespace(class_to_idx={"b": 0, "a": 1})), ["b", "a"]),
        (SimpleNamespace(reader=SimpleNamespace(class_to_idx={})), None),
        (SimpleNamespace(reader=SimpleNamespace()), None),
        (SimpleNamespace(), None),
    ],
)
def test_class_names_are_told_by_number_where_the_data_tells_them(dataset, names):
    assert class_names(dataset) == names


# Classes by name


def test_the_same_classes_need_no_translation():
    assert map_classes(["a", "b"], ["a", "b"], 2) is None


@given(names=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=9, unique=True), data=st.data())
@examples(60)
def test_classes_are_translated_by_name(names, data):
    found = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    numbers = map_classes(found, names, len(names))
    assert [names[number] for number in numbers or range(len(found))] == found


def test_classes_that_the_checkpoint_does_not_know_are_named():
    with pytest.raises(UserError, match="zebra"):
        map_classes(["a", "zebra"], ["a", "b"], 2)


def test_each_of_many_classes_is_looked_up_and_not_searched_for():
    class Name(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other):
            Name.compared += 1
            return str.__eq__(self, other)

    found, known = ([Name(number) for number in numbers] for numbers in (range(300), reversed(range(300))))
    assert map_classes(found, known, 300) == list(reversed(range(300)))
    assert repeated([*found, *known[:2]]) == ["298", "299"]
    assert Name.compared < 3000  # and not some 300 for each


def test_unnamed_classes_are_taken_where_their_number_fits():
    assert map_classes(["a", "b"], None, 2) is None
    assert map_classes(None, ["a", "b"], 2) is None
    with pytest.raises(UserError, match="the data has 2 classes, the network 3"):
        map_classes(["a", "b"], None, 3)


@pytest.mark.parametrize(
    ("train", "val", "told"),
    [
        (["a", "b"], ["a"], "only in training: b"),
        (["a"], ["a", "c"], "only in validation: c"),
        (["a", "b"], ["a", "c"], "only in training: b; only in validation: c"),
        (["a", "b"], ["b", "a"], "(the same ones in another order):"),
        (["a\u0308"], ["\u00e4"], "the same letters, but other bytes of Unicode"),
    ],
)
def test_training_and_validation_must_have_the_same_classes(train, val, told):
    with pytest.raises(UserError, match="the classes of training and validation differ") as caught:
        check_same_classes(train, val)
    assert told in str(caught.value)


def test_classes_that_differ_are_told_by_whose_they_are():
    with pytest.raises(UserError) as caught:
        check_same_classes(["a", "b"], ["a"], ("the checkpoint", "the data"), "name others")
    assert str(caught.value) == (
        "the classes of the checkpoint and the data differ (only in the checkpoint: b): name others"
    )


@pytest.mark.parametrize(("train", "val"), [(["a", "b"], ["a", "b"]), (None, ["a"]), (["a"], None), (None, None)])
def test_equal_and_unknown_classes_pass(train, val):
    check_same_classes(train, val)


@pytest.mark.parametrize(("key", "classes", "count"), [(0, ["a", "b"], 2), (2, ["a", "b"], 2), (5, None, 5)])
def test_classes_are_counted_from_the_data_or_the_configuration(key, classes, count):
    assert count_classes(configured(MODEL__GMA__NUM_CLASSES=key), classes) == count


@pytest.mark.parametrize(("key", "classes"), [(3, ["a", "b"]), (1, ["a", "b"]), (0, None)])
def test_a_number_of_classes_that_does_not_fit_is_refused(key, classes):
    with pytest.raises(UserError, match=r"MODEL\.GMA\.NUM_CLASSES"):
        count_classes(configured(MODEL__GMA__NUM_CLASSES=key), classes)


# Streams


def stream_of(count, world, seed=None, transform=unchanged, mode="RGB", reader=FakeReader, **settings):
    dataset = IterableImageDataset("", reader=reader(count, world))
    return ImageStream(dataset, only_decoded(transform, mode), world, seed, **settings)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 11, 24])
def test_a_stream_scores_each_sample_on_exactly_one_rank(workers, ranks, count):
    seen = []
    for rank in range(ranks):
        stream = stream_of(count, World(rank, ranks, CPU), transform=grey, mode="L")
        seen += [tuple(sample) for sample in DataLoader(stream, batch_size=None, num_workers=workers)]
    assert sorted(seen) == [(number, number % 3, "") for number in range(count)]


def test_a_stream_tells_classes_and_epoch():
    stream = stream_of(6, ALONE, seed=0)
    assert stream.classes == ["a", "b", "c"]
    assert len(stream) == 6
    stream.set_epoch(4)
    assert stream.dataset.reader.seen_epoch == 4


def draw(image):
    return float(torch.rand(())), float(np.random.rand()), image.getpixel((0, 0))


def drawn(seed=0, epoch=0, rank=0, workers=0):
    """The draws of a rank's epoch of 12 samples, which two ranks and then the workers share."""
    stream = stream_of(12, World(rank, 2, CPU), seed, draw, "L")
    stream.set_epoch(epoch)
    return [values[:2] for values, _, _ in DataLoader(stream, batch_size=None, num_workers=workers)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streams_augmentation_repeats(workers):
    torch.manual_seed(1)
    first = drawn(workers=workers)
    torch.manual_seed(2)
    assert drawn(workers=workers) == first


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streams_augmentation_differs_by_seed_epoch_rank_worker_and_count(workers):
    draws = [
        value for s, e, r in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)) for value in drawn(s, e, r, workers=workers)
    ]
    assert len(draws) == 4 * 6
    assert len({torch_draw for torch_draw, _ in draws}) == len(draws)
    assert len({numpy_draw for _, numpy_draw in draws}) == len(draws)


def test_workers_that_outlive_an_epoch_see_the_next_one():
    stream = stream_of(12, ALONE, 0, draw, "L")
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        epochs.append([values for values, _, _ in loader])
    assert epochs[0] == epochs[2] != epochs[1]


def batches_of(stream, workers, size):
    """The batches of a stream's epoch, of images as `draw` sees them."""
    return list(DataLoader(stream, size, num_workers=workers, drop_last=True, collate_fn=list))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_stream_skips_exactly_the_batches_before(workers):
    stream = stream_of(12, ALONE, 0, draw, "L", batch_size=1)
    stream.set_epoch(3)
    whole = batches_of(stream, workers, 1)
    assert sorted(number for [((_, _, number), _, _)] in whole) == list(range(12))
    for first in range(0, 13, 3):
        stream.set_epoch(3, first)
        assert sorted(batches_of(stream, workers, 1)) == sorted(whole[first:]), first  # in any order, see below


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_stream_that_skips_gives_the_batches_of_the_rest(workers):
    stream = stream_of(12, ALONE, 0, draw, "L", batch_size=2)
    stream.set_epoch(3)
    whole = batches_of(stream, workers, 2)
    assert len(whole) == 6
    for first in range(7):
        stream.set_epoch(3, first)
        rest = batches_of(stream, workers, 2)
        assert sorted(rest) == sorted(whole[first:]), first
        assert workers > 1 or rest == whole[first:], first


def test_skipped_samples_of_a_stream_are_neither_decoded_nor_transformed():
    decoded, transformed = [], []

    class Counting(FakeReader):
        def __iter__(self):
            for image, target in super().__iter__():
                yield Tracked(image), target

    class Tracked:
        """An image that notes when it is decoded."""

        def __init__(self, image):
            self._image = image
            self.mode, self.info = image.mode, image.info

        def load(self):
            decoded.append(grey(self._image)[0])

        def convert(self, mode):
            return self._image.convert(mode)

    def transform(image):
        transformed.append(grey(image))
        return grey(image)

    stream = stream_of(12, ALONE, 0, transform, mode="L", reader=Counting, batch_size=4)
    stream.set_epoch(0, 2)
    assert len(list(stream)) == 4
    assert decoded == transformed == [8, 9, 10, 11]


def test_a_stream_that_skipped_gives_the_next_epoch_whole():
    stream = stream_of(12, ALONE, 0, draw, "L", batch_size=2)
    loader = DataLoader(stream, 2, num_workers=2, collate_fn=list, persistent_workers=True)
    stream.set_epoch(0, 4)
    assert len(list(loader)) == 2
    stream.set_epoch(1)
    assert len(list(loader)) == 6


class PartlyBroken(FakeReader):
    """Gives cut-off images for some numbers."""

    broken = (0, 3, 4)

    def __iter__(self):
        for image, target in super().__iter__():
            cut = Image.open(io.BytesIO(FORMS["JPEG"][:-200]))
            yield (cut if grey(image)[0] in self.broken else image), target


def test_a_broken_image_of_a_stream_is_a_complaint_on_a_blank():
    stream = stream_of(6, ALONE, transform=pixels, mode="L", reader=PartlyBroken)
    found = list(stream)
    assert [target for _, target, _ in found] == [0, 1, 2, 0, 1, 2]
    assert [bool(complaint) for _, _, complaint in found] == [True, False, False, True, True, False]
    assert [int(image.max()) for image, _, _ in found] == [0, 1, 2, 0, 0, 5]
    assert [image.shape for image, _, complaint in found if complaint] == [(64, 64)] * 3
    assert re.fullmatch(r"an image of the stream is broken \(.+\)", found[0][2])


def test_the_image_before_takes_a_broken_ones_place_in_a_stream():
    stream = stream_of(7, ALONE, 0, grey, "L", reader=PartlyBroken, replace=True)
    found = list(stream)
    # None is before the first, and the one before the fifth is broken, too: a blank is black.
    assert [sample[:2] for sample in found] == [(0, 0), (1, 1), (2, 2), (2, 2), (0, 1), (5, 2), (6, 0)]
    assert [bool(complaint) for _, _, complaint in found] == [True, False, False, True, True, False, False]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_with_broken_images_goes_on_at_its_place(workers):
    stream = stream_of(12, ALONE, 0, grey, "L", reader=PartlyBroken, replace=True, batch_size=1)
    whole = batches_of(stream, workers, 1)
    assert len(whole) == 12
    for first in range(0, 12, max(workers, 1)):
        stream.set_epoch(0, first)
        assert batches_of(stream, workers, 1) == whole[first:], first


class Files(FakeReader):
    """Opens files of noise without decoding them; of three in a row, one is damaged within and two are cut off."""

    def __iter__(self):
        files = [encoded_noise(number) for number in range(6)]
        damaged = bytearray(files[2])
        damaged[len(damaged) // 2 :: 40] = bytes(len(damaged[len(damaged) // 2 :: 40]))
        for number, file in enumerate([*files[:2], damaged, files[3][:-2000], files[4], files[5][:-2000]]):
            yield Image.open(io.BytesIO(file)), number % 3


def encoded_noise(number):
    file = io.BytesIO()
    noise(number, (400, 300)).save(file, "PNG" if number == 2 else "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("loading", ["exact", "fast"])
def test_a_stream_of_files_with_broken_ones_goes_on_to_the_same_bits(loading):
    aug = {"AUG__AUTO_AUGMENT": "none", "AUG__COLOR_JITTER": 0.0}
    transform = train_transform(configured(DATA__LOADING=loading, DATA__IMG_SIZE=32, **aug))
    stream = ImageStream(IterableImageDataset("", reader=Files(6)), transform, ALONE, 0, 1, replace=True)
    whole = list(stream)
    assert [bool(complaint) for _, _, complaint in whole] == [False, False, True, True, False, True]
    assert [target for _, target, _ in whole] == [0, 1, 1, 0, 1, 1]
    assert whole[3][0].float().std() == 0  # nothing of a broken image, also where the one before is broken, too
    for first in range(1, 6):
        stream.set_epoch(0, first)
        for ours, wanted in zip(stream, whole[first:], strict=True):
            assert torch.equal(ours[0], wanted[0]) and ours[1:] == wanted[1:], first


def test_a_stream_that_cannot_be_read_on_is_an_error():
    class Torn(FakeReader):
        def __iter__(self):
            yield plain(0), 0
            raise OSError("unexpected end of data")

    with pytest.raises(BrokenDataError, match=r"the stream is broken \(unexpected end of data\)"):
        list(stream_of(3, ALONE, reader=Torn))
