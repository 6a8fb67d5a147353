"""Folders, tar files and streams as samples, broken images, and classes matched by name."""

import io
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_unit import CPU, FakeReader, configured, examples, noise, plain, write_folder, write_tar
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import DataLoader

from data.datasets import (
    FolderSource,
    ImageSamples,
    ImageStream,
    check_same_classes,
    class_names,
    count_classes,
    map_classes,
    open_split,
)
from utils.dist import World
from utils.errors import UserError

CLASSES = {"b": 2, "a": 3, "10": 2, "9": 1}  # sorted as text: 10, 9, a, b


def unchanged(image):
    return image


def pixels(image):
    return np.array(image)


def samples_of(root, mode="RGB", transform=pixels):
    return ImageSamples(FolderSource(root), transform, mode)


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
    with pytest.raises(UserError, match="hollow") as caught:
        FolderSource(tmp_path)
    assert "\n" not in str(caught.value)


# Kinds of images

ORANGE = (250, 120, 10)


def kind_of_image(kind):
    """An evenly coloured image of a kind, and its format."""
    if kind == "palette":
        image = Image.new("P", (12, 9))
        image.putpalette(list(ORANGE))
        return image, "PNG"
    if kind == "palette with transparency":
        image = Image.new("RGBA", (12, 9), (*ORANGE, 255)).quantize(4)
        return image, "PNG"
    mode = {"grey JPEG": "L", "CMYK JPEG": "CMYK", "RGBA": "RGBA", "two tones": "1"}.get(kind, "RGB")
    return Image.new("RGB", (12, 9), ORANGE).convert(mode), "JPEG" if "JPEG" in kind else "PNG"


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "kind",
    ["RGB", "RGBA", "RGB JPEG", "grey JPEG", "CMYK JPEG", "palette", "palette with transparency", "two tones"],
)
def test_every_kind_of_image_comes_in_the_mode_asked_for(tmp_path, kind, mode):
    image, form = kind_of_image(kind)
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / f"x.{form.lower()}", form)
    found, _ = samples_of(tmp_path, mode, unchanged)[0]
    assert (found.mode, found.size) == (mode, (12, 9))
    wanted = image.convert(mode)
    if kind not in ("grey JPEG", "two tones"):
        wanted = Image.new("RGB", (12, 9), ORANGE).convert(mode)
    assert np.abs(np.asarray(found, dtype=int).mean((0, 1)) - np.asarray(wanted, dtype=int).mean((0, 1))).max() <= 4


def test_a_sample_is_transformed_and_its_class_translated(tmp_path):
    write_folder(tmp_path, {"a": 1, "b": 1}, plain)
    samples = ImageSamples(FolderSource(tmp_path), lambda image: image.getpixel((0, 0)), "L", to_class=[7, 3])
    assert [samples[index] for index in range(len(samples))] == [(0, 7), (1, 3)]


def test_a_seeded_sample_draws_the_same_every_time(tmp_path):
    write_folder(tmp_path, {"a": 2})
    samples = samples_of(tmp_path, transform=lambda image: float(torch.rand(())))
    first = samples[0, 11]
    torch.rand(3)
    assert samples[0, 11] == first == samples[1, 11]
    assert samples[0, 12] != first


# Broken images


def encoded(form, image=None, **options):
    buffer = io.BytesIO()
    (image or noise(0)).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jpg", encoded("JPEG")[:600]),
        (".jpg", encoded("JPEG")[:-2]),
        (".jpg", encoded("JPEG", progressive=True)[:600]),
        (".jpg", b"this is text\nand no image"),
        (".jpg", b""),
        (".png", encoded("PNG")[:600]),
        (".png", b"\x89PNG\r\n\x1a\n"),
        (".webp", encoded("WEBP")[:300]),
        (".jpg", b"\x00" * 1000),
    ],
    ids=["half", "no end", "half progressive", "text", "empty", "half PNG", "PNG of nothing", "half WebP", "zeros"],
)
def test_a_broken_image_is_an_error_that_names_the_file(tmp_path, suffix, content):
    write_folder(tmp_path, {"a": 1})
    path = tmp_path / "a" / f"broken{suffix}"
    path.write_bytes(content)
    samples = samples_of(tmp_path)
    assert samples[0][0].shape == (36, 40, 3)
    with pytest.raises(UserError) as caught:
        samples[1]
    assert str(caught.value).startswith(f"{path} is broken (")
    assert "\n" not in str(caught.value)


def test_a_file_that_vanished_is_an_error_that_names_it(tmp_path):
    samples = samples_of(write_folder(tmp_path, {"a": 1}))
    (tmp_path / "a" / "000.png").unlink()
    with pytest.raises(UserError, match=r"000\.png is broken"):
        samples[0]


FORMS = {
    form: encoded(form.split()[0], **options)
    for form, options in {"JPEG": {}, "PNG": {}, "GIF": {}, "BMP": {}, "TIFF": {}, "WEBP": {}, "PPM": {}}.items()
}


@given(form=st.sampled_from(sorted(FORMS)), share=st.floats(0, 1))
@examples(150)
def test_no_part_of_an_image_is_ever_given_out(form, share):
    whole = FORMS[form]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a" / f"x.{form.lower()}"
        path.parent.mkdir()
        path.write_bytes(whole[: int(share * len(whole))])
        try:
            found, _ = samples_of(Path(folder))[0]
        except UserError:
            return
    assert np.array_equal(found, pixels(Image.open(io.BytesIO(whole)).convert("RGB")))


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
    loaded = [ImageSamples(source, pixels, "RGB")[index] for index in range(len(source))]
    return Counter((source.classes[target], image.tobytes()) for image, target in loaded)


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


def test_a_network_of_a_folder_scores_a_tar_file_by_the_names_of_the_classes(packed):
    folder = FolderSource(packed / "val")
    tar = open_split(configured(DATA__DATASET="tar", DATA__DATA_PATH=str(packed)), "val", is_training=False)
    to_class = map_classes(tar.classes, folder.classes, 4)
    numbers = Counter(ImageSamples(tar, unchanged, "RGB", to_class)[index][1] for index in range(len(tar)))
    assert numbers == Counter(folder.read(index)[1] for index in range(len(folder)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_file_can_be_read_by_several_workers(packed, workers):
    source = open_split(configured(DATA__DATASET="tar", DATA__DATA_PATH=str(packed)), "train", is_training=True)
    alone = [image.tobytes() for image, _ in (ImageSamples(source, pixels, "RGB")[i] for i in range(8))]
    fresh = open_split(configured(DATA__DATASET="tar", DATA__DATA_PATH=str(packed)), "train", is_training=True)
    loader = DataLoader(ImageSamples(fresh, pixels, "RGB"), batch_size=None, num_workers=workers)
    assert [bytes(image.numpy()) for image, _ in loader] == alone


@pytest.mark.parametrize("name", ["tar", "torch/image_folder"])
def test_a_broken_image_of_timms_data_sets_is_named_too(tmp_path, name):
    root = write_folder(tmp_path / "train", {"a": 2})
    (root / "a" / "001.png").write_bytes(FORMS["PNG"][:500])
    write_tar(tmp_path / "train.tar", root)
    source = open_split(configured(DATA__DATASET=name, DATA__DATA_PATH=str(tmp_path)), "train", is_training=True)
    with pytest.raises(UserError, match=r"001\.png is broken"):
        ImageSamples(source, pixels, "RGB")[1]


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
        (["a", "b"], ["b", "a"], "another order"),
    ],
)
def test_training_and_validation_must_have_the_same_classes(train, val, told):
    with pytest.raises(UserError, match="training and validation classes differ") as caught:
        check_same_classes(train, val)
    assert told in str(caught.value)


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


def stream_of(count, world, seed=None, transform=unchanged, mode="RGB"):
    return ImageStream(IterableImageDataset("", reader=FakeReader(count, world)), transform, mode, world, seed)


def grey(image):
    return image.getpixel((0, 0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 11, 24])
def test_a_stream_scores_each_sample_on_exactly_one_rank(workers, ranks, count):
    seen = []
    for rank in range(ranks):
        stream = stream_of(count, World(rank, ranks, CPU), transform=grey, mode="L")
        seen += [tuple(sample) for sample in DataLoader(stream, batch_size=None, num_workers=workers)]
    assert sorted(seen) == [(number, number % 3) for number in range(count)]


def test_a_stream_tells_classes_and_epoch():
    stream = stream_of(6, World(0, 1, CPU), seed=0)
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
    return [values[:2] for values, _ in DataLoader(stream, batch_size=None, num_workers=workers)]


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
    stream = stream_of(12, World(0, 1, CPU), 0, draw, "L")
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        epochs.append([values for values, _ in loader])
    assert epochs[0] == epochs[2] != epochs[1]


def test_a_broken_image_of_a_stream_is_a_users_error():
    class Broken(FakeReader):
        def __iter__(self):
            yield Image.open(io.BytesIO(FORMS["JPEG"][:600])), 0

    stream = ImageStream(IterableImageDataset("", reader=Broken(1)), unchanged, "RGB", World(0, 1, CPU), None)
    with pytest.raises(UserError, match="broken"):
        list(stream)
