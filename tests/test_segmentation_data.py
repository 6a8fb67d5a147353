"""Images with label maps: found, decoded, augmented together, dealt out."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_segmentation import CLASSES, pair, tiny, write_pairs, write_tree
from helpers_unit import ALONE, batch_here_and_spawned, equal, examples, refuse_to_list
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask

from data.datasets import ImageSamples
from segmentation.data import (
    PairSource,
    blank,
    build_eval_data,
    build_train_data,
    class_names,
    decode,
    eval_transform,
    train_transform,
)
from segmentation.labels import IGNORE, to_classes, to_label_map
from segmentation.sizes import scaled_size
from utils.dist import World
from utils.errors import UserError
from utils.seeding import seed_everything

pytest_plugins = ["segments"]


@pytest.fixture
def tree(tmp_path) -> Path:
    """A tree that a test may change."""
    write_tree(tmp_path / "tree")
    return tmp_path / "tree"


def augmented(config, pixels, labels, seed=0, classes=3):
    """Image and class numbers after training's augmentation."""
    seed_everything(seed)
    transform = train_transform(config, classes)
    return transform.augment(transform.decode((Image.fromarray(pixels), Image.fromarray(labels))))


# Label maps


@examples(30)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.booleans())
def test_labels_become_classes_and_labels_again(labels, reduce):
    given = np.array([labels], np.uint8)
    given[given == 12] = 0 if reduce else IGNORE
    classes = to_classes(Image.fromarray(given), 12, reduce)
    wanted = [[IGNORE if label == (0 if reduce else IGNORE) else label - reduce for label in given[0]]]
    assert classes.tolist() == wanted
    assert classes.dtype == np.uint8
    assert to_label_map(classes, reduce).tolist() == given.tolist()


def test_label_255_is_no_class_either_way():
    labels = Image.fromarray(np.array([[255, 0, 1]], np.uint8))
    assert to_classes(labels, 1, True).tolist() == [[IGNORE, IGNORE, 0]]
    assert to_classes(labels, 2, False).tolist() == [[IGNORE, 0, 1]]


def test_label_maps_with_a_palette_are_read_by_their_numbers():
    image = Image.fromarray(np.array([[1, 2]], np.uint8), mode="P")
    image.putpalette([9, 9, 9] * 256)
    assert to_classes(image, 2, True).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [
        (Image.new("L", (2, 2), 4), 3, "its label map has label 4, beyond the 3 classes"),
        (Image.new("RGB", (2, 2)), 3, "its label map is RGB, not 8-bit grey"),
        (Image.new("I;16", (2, 2)), 3, "its label map is I;16, not 8-bit grey"),
    ],
)
def test_what_is_no_label_map_is_refused(labels, classes, said):
    with pytest.raises(UserError, match=said):
        to_classes(labels, classes, True)


@pytest.mark.parametrize("bits", [2, 4])
def test_label_maps_of_few_grey_bits_are_refused_as_they_are_read_with_other_labels(tmp_path, bits):
    header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
    data = zlib.compress(b"\0" + bytes([0x01] * (4 * bits // 8)))
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    (tmp_path / "labels.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with Image.open(tmp_path / "labels.png") as label_map, pytest.raises(UserError, match="grey of 2 or 4 bits"):
        to_classes(label_map, 150, True)


def test_an_image_and_a_label_map_of_different_sizes_are_refused():
    files = (Image.new("RGB", (4, 3)), Image.new("L", (3, 4), 1))
    with pytest.raises(UserError, match="it and its label map differ in size: 4 x 3 and 3 x 4"):
        decode(files, "RGB", 3, True)


# Folders


def test_images_are_paired_with_their_label_maps_in_nested_folders(tmp_path):
    write_pairs(tmp_path, "training/b", [(8, 8)], seed=0)
    write_pairs(tmp_path, "training/a", [(9, 8), (10, 8)], seed=1)
    source = PairSource(tmp_path, "training")
    assert [str(source.stem(index)) for index in range(len(source))] == ["a/00", "a/01", "b/00"]
    (image, labels), _ = source.read(1)
    assert image.size == labels.size == (10, 8)
    assert source.name(1) == str(tmp_path / "images/training/a/01.png")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "annotations/training/03.png").unlink(), r"has no label map \(\.png\) for .*03\.png"),
        (lambda root: (root / "images/training").rename(root / "images/train"), r"images/training is no folder"),
        (lambda root: (root / "annotations/training").rename(root / "x"), r"annotations/training is no folder"),
        (lambda root: [path.unlink() for path in (root / "images/training").iterdir()], "has no images"),
        (
            lambda root: (root / "images/training/03.jpg").touch(),
            r"images/training/03\.jpg and .*images/training/03\.png share the label map .*annotations/training/03\.png",
        ),
    ],
)
def test_folders_that_are_no_data_set_are_refused(tree, damage, said):
    damage(tree)
    with pytest.raises(UserError, match=said):
        build_train_data(tiny(DATA__DATA_PATH=str(tree)), ALONE)


def test_a_folder_that_cannot_be_read_is_named_and_not_passed_over(tmp_path, monkeypatch):
    write_pairs(tmp_path, "training/b", [(8, 8)], seed=0)
    write_pairs(tmp_path, "training/a", [(9, 8)], seed=1)
    refuse_to_list(monkeypatch, tmp_path / "images/training/b")
    with pytest.raises(UserError, match="images/training/b cannot be read"):
        PairSource(tmp_path, "training")


def test_class_names_come_from_a_list_or_from_ade20ks_table(tmp_path):
    assert class_names(tmp_path) is None
    table = "Idx\tRatio\tTrain\tVal\tName\n1\t0.1576\t11664\t1172\twall\n2\t0.1072\t6046\t612\tbuilding, edifice\n"
    (tmp_path / "objectInfo150.txt").write_text(table)
    assert class_names(tmp_path) == ["wall", "building, edifice"]
    (tmp_path / "classes.txt").write_text("ground\nred\n\n")
    assert class_names(tmp_path) == ["ground", "red"]


def test_class_names_may_have_any_letters(tmp_path, ascii_locale):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "classes.txt").write_text("Käse\n", encoding=encoding)
        assert class_names(tmp_path) == ["Käse"]
    (tmp_path / "classes.txt").write_text("Käse\n", encoding="latin-1")
    with pytest.raises(UserError, match=r"classes\.txt is no UTF-8 text .*: save it as such"):
        class_names(tmp_path)


@pytest.mark.parametrize("reduce", [True, False])
def test_classes_without_names_are_numbered_by_their_labels(tree, reduce):
    (tree / "classes.txt").unlink()
    config = tiny(DATA__DATA_PATH=str(tree), DATA__REDUCE_ZERO_LABEL=reduce, MODEL__GMA__NUM_CLASSES=3)
    labels = np.array([[1, 2, 3]] if reduce else [[0, 1, 2]], np.uint8)
    classes = to_classes(Image.fromarray(labels), 3, reduce)
    names = build_eval_data(config, ALONE).classes
    assert [names[number] for number in classes[0]] == [f"class {label}" for label in labels[0]]


@pytest.mark.parametrize(
    ("names", "count", "said"),
    [
        (None, 0, r"has no classes\.txt .*set MODEL\.GMA\.NUM_CLASSES"),
        (["a", "b"], 3, r"the data has 2 classes but MODEL\.GMA\.NUM_CLASSES is 3"),
        (None, 255, "255 classes are more than the 254"),
        (["a", "b", "a"], 3, "names several classes a: give each its own name"),
    ],
)
def test_a_number_of_classes_that_cannot_be_is_refused(tree, names, count, said):
    (tree / "classes.txt").unlink()
    if names:
        (tree / "classes.txt").write_text("\n".join(names))
    with pytest.raises(UserError, match=said):
        build_eval_data(tiny(DATA__DATA_PATH=str(tree), MODEL__GMA__NUM_CLASSES=count), ALONE)


# Augmentation

PLAIN = {"AUG__PHOTOMETRIC": 0.0, "AUG__CAT_MAX_RATIO": 1.0}


@examples(10)
@given(seed=st.integers(0, 10**6), width=st.integers(40, 90), height=st.integers(40, 90))
def test_image_and_labels_are_scaled_cropped_and_mirrored_alike(seed, width, height):
    _, labels = pair(seed, width, height)
    pixels = np.repeat(labels[..., None] * 60, 3, axis=2)
    config = tiny(**PLAIN, DATA__MEAN=[0.0, 0.0, 0.0])
    image, classes = augmented(config, pixels, labels, seed)
    assert image.shape == (3, 48, 48)
    assert classes.shape == (48, 48)
    assert image.dtype == classes.dtype == torch.uint8
    seen = torch.where(classes == IGNORE, 0, classes + 1).float()
    inside = (
        -torch.nn.functional.max_pool2d(-seen[None], 7, 1, 3)[0]
        == torch.nn.functional.max_pool2d(seen[None], 7, 1, 3)[0]
    )
    inside[[0, 1, 2, -3, -2, -1]] = inside[:, [0, 1, 2, -3, -2, -1]] = False  # whose neighbours were cut off
    assert inside.any()
    assert torch.equal(image[0][inside].float(), 60 * seen[inside])


def test_images_smaller_than_the_crop_are_padded_with_the_mean_colour_and_no_class():
    pixels, labels = np.full((20, 30, 3), 200, np.uint8), np.full((20, 30), 2, np.uint8)
    config = tiny(**PLAIN, DATA__SHORT_SIDE=20, AUG__SCALE=[1.0, 1.0], DATA__MEAN=[0.2, 0.4, 0.6])
    image, classes = augmented(config, pixels, labels)
    assert (classes != IGNORE).sum() == 20 * 30
    assert image[:, classes == IGNORE].unique(dim=1).flatten().tolist() == [51, 102, 153]


@pytest.mark.parametrize("bounds", [(0.5, 2.0), (1.0, 1.0)])
@pytest.mark.parametrize(("short", "long"), [(64, 999), (64, 96), (0, 96)])
def test_images_are_scaled_at_random_between_the_bounds_around_the_size_of_evaluation(short, long, bounds):
    config = tiny(**PLAIN, DATA__IMG_SIZE=32, DATA__SHORT_SIDE=short, DATA__LONG_SIDE=long, AUG__SCALE=list(bounds))
    resize = train_transform(config, 3).augment.transforms[0]
    height, width = scaled_size((40, 80), short, long)
    sides = [tuple(resize(torch.zeros(3, 40, 80, dtype=torch.uint8)).shape[1:]) for _ in range(60)]
    assert all(
        round(bounds[0] * side) <= scaled <= round(bounds[1] * side)
        for scaled, side in (*((rows, height) for rows, _ in sides), *((columns, width) for _, columns in sides))
    )
    assert len(set(sides)) == 1 if bounds[0] == bounds[1] else len(set(sides)) > 15


@pytest.mark.parametrize(("size", "short"), [((683, 512), 512), ((512, 512), 512), ((128, 128), 96), ((100, 130), 64)])
def test_labels_lie_where_their_image_does_when_both_are_scaled(size, short):
    resize = train_transform(tiny(DATA__SHORT_SIDE=short, DATA__LONG_SIDE=2048, AUG__SCALE=[0.5, 2.0]), 3).augment
    offsets = []
    for edge in torch.linspace(size[1] // 4, 3 * size[1] // 4, 60).int().tolist():
        image, labels = torch.zeros(3, 8, size[1], dtype=torch.uint8), torch.zeros(8, size[1], dtype=torch.uint8)
        image[..., edge:], labels[:, edge:] = 255, 1
        image, labels = resize.transforms[0](ImageTensor(image), Mask(labels))
        offsets.append(image[0, 0].sum().item() / 255 - labels[0].sum().item())
    assert abs(np.mean(offsets)) < 0.15  # pixels


def test_images_of_a_pixels_width_are_scaled_too():
    config = tiny(DATA__LONG_SIDE=64)
    image, classes = augmented(config, np.zeros((2000, 1, 3), np.uint8), np.ones((2000, 1), np.uint8))
    assert image.shape == (3, 48, 48)
    assert 0 in classes


def test_crops_of_nearly_one_class_are_drawn_again():
    labels = np.ones((200, 200), np.uint8)
    labels[:, :60] = 2
    pixels = np.zeros((200, 200, 3), np.uint8)
    few = {}
    for most in (0.75, 1.0):
        config = tiny(AUG__CAT_MAX_RATIO=most, AUG__SCALE=[1.0, 1.0], DATA__SHORT_SIDE=200, DATA__LONG_SIDE=200)
        crops = [augmented(config, pixels, labels, seed)[1] for seed in range(60)]
        few[most] = sum(torch.bincount(crop.flatten()).max().item() >= 0.75 * crop.numel() for crop in crops)
    assert few[0.75] < 20 < 40 < few[1.0]


def test_crops_without_a_class_are_drawn_again():
    labels = np.zeros((256, 256), np.uint8)
    labels[:64, :64], labels[:64, 64:128] = 1, 2
    config = tiny(AUG__SCALE=[1.0, 1.0], DATA__SHORT_SIDE=256, DATA__LONG_SIDE=256)
    crops = [augmented(config, np.zeros((256, 256, 3), np.uint8), labels, seed)[1] for seed in range(60)]
    assert sum(bool((crop == IGNORE).all()) for crop in crops) < 45  # all of them otherwise


def test_an_image_of_one_class_or_of_none_is_cropped_all_the_same():
    for label in (0, 1):
        _, classes = augmented(tiny(), np.zeros((60, 60, 3), np.uint8), np.full((60, 60), label, np.uint8))
        assert classes.unique().tolist() in ([IGNORE], [0], [0, IGNORE])


def test_photometric_distortion_changes_colours_but_never_swaps_channels():
    pixels = np.full((60, 60, 3), (200, 90, 40), np.uint8)
    config = tiny(AUG__SCALE=[1.0, 1.0], AUG__PHOTOMETRIC=1.0)
    colours = [augmented(config, pixels, np.ones((60, 60), np.uint8), seed)[0][:, 20, 20] for seed in range(20)]
    assert len({tuple(colour.tolist()) for colour in colours}) == 20
    assert all(red > green >= blue for red, green, blue in colours)


def test_validation_images_stay_as_they_are():
    pixels, labels = pair(1, 31, 47)
    transform = eval_transform(tiny(), 3)
    image, classes = transform.augment(transform.decode((Image.fromarray(pixels), Image.fromarray(labels))))
    assert type(image) is type(classes) is torch.Tensor
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
    assert np.array_equal(classes.numpy(), to_classes(Image.fromarray(labels), 3, True))


# Batches


def taken(data, epoch, first=0):
    data.set_epoch(epoch, first)
    return [(images, targets) for images, targets, complaints in data.loader if not any(complaints)]


def test_epochs_have_the_configured_updates_and_go_on_anywhere(pairs):
    data = build_train_data(tiny(DATA__DATA_PATH=str(pairs), TRAIN__ACCUMULATION_STEPS=2), ALONE)
    whole = taken(data, 1)
    assert len(whole) == data.steps_per_epoch == 6
    assert [tuple(part.shape) for part in whole[0]] == [(4, 3, 48, 48), (4, 48, 48)]
    rest = taken(data, 1, first=4)
    assert len(rest) == 2
    for one, other in zip(whole[4:], rest, strict=True):
        assert all(map(torch.equal, one, other))
    assert not torch.equal(whole[0][0], taken(data, 0)[0][0])
    assert data.classes == CLASSES


def test_an_epoch_may_be_one_pass(pairs):
    data = build_train_data(tiny(DATA__DATA_PATH=str(pairs), TRAIN__EPOCH_UPDATES=0), ALONE)
    assert data.steps_per_epoch == 10 // 4
    with pytest.raises(UserError, match="10 training images do not fill a batch of 16"):
        build_train_data(tiny(DATA__DATA_PATH=str(pairs), DATA__BATCH_SIZE=16, TRAIN__EPOCH_UPDATES=0), ALONE)


def test_every_validation_image_is_on_one_rank_at_its_own_size(pairs):
    sizes = []
    for rank in range(2):
        data = build_eval_data(tiny(DATA__DATA_PATH=str(pairs)), World(rank, 2, torch.device("cpu")))
        sizes += [(*images.shape[2:], *targets.shape[1:]) for images, targets, _ in data.loader]
        assert data.images == 5
        assert data.rounds == 2
    wanted = [(48, 56), (65, 49), (64, 64), (33, 97), (48, 48)]
    assert sorted(sizes) == sorted((*size, *size) for size in wanted)


def test_loaders_may_have_processes_that_are_spawned(pairs):
    for build in (build_train_data, build_eval_data):
        assert equal(*batch_here_and_spawned(build(tiny(DATA__DATA_PATH=str(pairs)), ALONE).loader))


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_a_broken_image_or_label_map_is_a_complaint_on_a_blank(tree, kind):
    path = tree / kind / "training/02.png"
    path.write_bytes(path.read_bytes()[:90])
    source = PairSource(tree, "training")
    samples = ImageSamples(source, train_transform(tiny(), 3), blank=blank)
    (image, classes), _, complaint = samples[2, 7]
    assert complaint.startswith(f"{tree / 'images/training/02.png'} is broken (")
    assert image.shape == (3, 48, 48)
    assert classes.unique().tolist() == [IGNORE]


def test_another_pair_takes_a_broken_ones_place(tree):
    (tree / "annotations/training/02.png").write_text("no picture")
    samples = ImageSamples(PairSource(tree, "training"), train_transform(tiny(), 3), replace=True, blank=blank)
    (_, classes), _, complaint = samples[2, 7]
    assert "02.png is broken" in complaint
    assert (classes != IGNORE).any()
