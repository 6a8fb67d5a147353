"""Loaders and mixup as the configuration asks for them."""

import atexit
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers_unit import (
    ALONE,
    CPU,
    ROOT,
    FakeReader,
    batch_here_and_spawned,
    configured,
    equal,
    examples,
    noise,
    number_of,
    only_decoded,
    plain,
    small_data_config,
    write_folder,
    write_tar,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import IterableImageDataset
from torchvision.transforms.functional import pil_to_tensor

from data.build import build_eval_data, build_mixup, build_train_data, check_readers
from utils.dist import World
from utils.errors import UserError
from utils.seeding import seed_everything
from utils.signals import STOP_SIGNALS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Fourteen training images of noise, eleven evenly grey validation images, three classes."""
    root = tmp_path_factory.mktemp("data")
    write_folder(root / "train", {"a": 5, "b": 4, "c": 5}, noise)
    write_folder(root / "val", {"a": 4, "b": 4, "c": 3}, plain)
    return root


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    """Lets the process believe in four cores, so that loaders get the workers that a test asks for."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(4)), raising=False)


def epoch_of(config, world=ALONE, epoch=0, data=None, first_batch=0):
    data = data or build_train_data(config, world)
    data.set_epoch(epoch, first_batch)
    batches = list(data.loader)
    assert not any(complaint for _, _, complaints in batches for complaint in complaints)
    return [(images, targets) for images, targets, _ in batches]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


def numbers_of(loader):
    """The greys of the images of evenly grey data, and their classes."""
    found = []
    for images, targets, complaints in loader:
        assert not any(complaints)
        found += [(number_of(image), int(target)) for image, target in zip(images, targets, strict=True)]
    return found


# Training


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_lies_in_memory_as_its_images_do(root, channels, workers):
    config = small_data_config(root, DATA__NUM_WORKERS=workers)
    if channels == 1:
        config.merge_from_list(["MODEL.GMA.IN_DIM", 1, "DATA.MEAN", [0.3], "DATA.STD", [0.4]])
    for images, _ in epoch_of(config):
        assert images.permute(0, 2, 3, 1).is_contiguous()


def test_training_batches_are_images_and_class_numbers(root):
    data = build_train_data(small_data_config(root), ALONE)
    batches = epoch_of(None, data=data)
    assert (data.classes, data.images, data.steps_per_epoch, len(batches)) == (["a", "b", "c"], 14, 3, 3)
    for images, targets in batches:
        assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.uint8)
        assert (targets.shape, targets.dtype) == ((4,), torch.int64)
        assert set(targets.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("augmentation", ["rand-m5-mstd0.5-inc1", "augmix-m3-w3", "none"])
def test_augmentation_does_not_depend_on_the_number_of_workers_or_passes(root, augmentation):
    config = small_data_config(root, AUG__AUTO_AUGMENT=augmentation)
    first = epoch_of(config, epoch=3)
    torch.manual_seed(99)
    assert same(epoch_of(config, epoch=3), first)
    config.DATA.NUM_WORKERS = 2
    data = build_train_data(config, ALONE)
    assert same(epoch_of(config, epoch=3, data=data), first)
    other = epoch_of(config, epoch=4, data=data)
    assert not same(other, first)
    assert same(epoch_of(config, epoch=3, data=data), first)  # by the same workers, after another epoch
    config.SEED = 1
    assert not same(epoch_of(config, epoch=3), first)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_gone_on_with_gives_the_same_rest(root, workers):
    config = small_data_config(root, AUG__AUTO_AUGMENT="rand-m5-mstd0.5-inc1", DATA__BATCH_SIZE=2)
    whole = epoch_of(config, epoch=3)
    config.DATA.NUM_WORKERS = workers
    data = build_train_data(config, ALONE)
    for first in (0, 1, 3, 6, 7):
        assert same(epoch_of(config, epoch=3, data=data, first_batch=first), whole[first:])
    assert same(epoch_of(config, epoch=3, data=data), whole)


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_files_of_a_batch_are_named(root, repeats):
    config = small_data_config(root, AUG__REPEATS=repeats)
    for rank in range(2):
        data = build_train_data(config, World(rank, 2, CPU))
        data.loader.dataset._transform = only_decoded(pil_to_tensor)
        sums = {int(pixels_of(path).sum()): str(path) for path in (root / "train").rglob("*.png")}
        given = [sums[int(image.sum())] for images, _ in epoch_of(None, epoch=2, data=data) for image in images]
        assert len(given) == 4
        assert data.names(2, range(1)) == given
        assert data.names(2, range(data.steps_per_epoch)) == given
        assert data.names(3, range(1)) != given


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def partly_broken(tmp_path):
    """A folder of which two images of each split are broken, and their paths in training."""
    root = write_folder(tmp_path / "train", {"a": 6, "b": 6}, plain).parent
    write_folder(tmp_path / "val", {"a": 6, "b": 6}, plain)
    for split in ("train", "val"):
        for number in (2, 8):
            next((root / split).glob(f"*/{number:03d}.png")).write_bytes(b"")
    return root, {str(path) for path in (root / "train").rglob("*.png") if path.stat().st_size == 0}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_broken_image_is_told_beside_its_batch(partly_broken, on_error, workers):
    root, broken = partly_broken
    config = small_data_config(root, DATA__ON_ERROR=on_error, DATA__NUM_WORKERS=workers)
    config.AUG.COLOR_JITTER = 0.0
    complaints, blanks = [], 0
    data = build_train_data(config, ALONE)
    data.set_epoch(1)
    for images, targets, of_batch in data.loader:
        assert len(images) == len(targets) == len(of_batch) == 4
        complaints += [complaint for complaint in of_batch if complaint]
        blanks += sum(number_of(image) == 0 for image in images)
    assert {complaint.split(" of class ")[0] for complaint in complaints} == broken
    assert len(complaints) == 2
    assert blanks == (2 + 1 if on_error == "stop" else 1)  # image 0 is black


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_broken_validation_image_is_never_replaced(partly_broken, on_error):
    root, _ = partly_broken
    config = small_data_config(root, DATA__ON_ERROR=on_error)
    numbers, told = [], []
    for images, _, of_batch in build_eval_data(config, ALONE, None, None).loader:
        numbers += [number_of(image) for image in images]
        told += of_batch
    assert numbers == [0, 1, 0, 3, 4, 5, 6, 7, 0, 9, 10, 11]
    assert [number for number, complaint in enumerate(told) if complaint] == [2, 8]


@pytest.mark.parametrize("name", ["folder", "tar"])
@pytest.mark.parametrize("loading", ["exact", "fast"])
def test_loaders_may_have_processes_that_are_spawned(root, tmp_path, name, loading):
    if name == "tar":
        for split in ("train", "val"):
            write_tar(tmp_path / f"{split}.tar", root / split)
    config = small_data_config(tmp_path if name == "tar" else root, DATA__DATASET=name, DATA__LOADING=loading)
    for data in (build_train_data(config, ALONE), build_eval_data(config, ALONE, None, None)):
        assert equal(*batch_here_and_spawned(data.loader))


def test_an_image_is_augmented_anew_each_epoch(root):
    config = small_data_config(root, DATA__BATCH_SIZE=14)
    by_sum = [sorted(float(image.sum()) for image in epoch_of(config, epoch=epoch)[0][0]) for epoch in (0, 1)]
    assert not set(by_sum[0]) & set(by_sum[1])


def test_ranks_share_what_one_rank_gives_alone(root):
    alone = epoch_of(small_data_config(root, DATA__BATCH_SIZE=4))
    shares = [epoch_of(small_data_config(root, DATA__BATCH_SIZE=2), World(rank, 2, CPU)) for rank in range(2)]
    for step, (images, targets) in enumerate(alone):
        for rank, share in enumerate(shares):
            assert torch.equal(share[step][0], images[rank::2])
            assert torch.equal(share[step][1], targets[rank::2])


def test_repeated_augmentation_repeats_images_within_an_epoch(root):
    batches = epoch_of(small_data_config(root, AUG__REPEATS=2, DATA__BATCH_SIZE=7))
    assert len(batches) == 2
    images = torch.cat([images for images, _ in batches])
    assert len({float(image.sum()) for image in images}) == 14


@pytest.mark.parametrize(("batch_size", "ranks"), [(15, 1), (8, 2)])
def test_data_that_fills_no_batch_is_refused(root, batch_size, ranks):
    with pytest.raises(UserError, match=f"14 training images do not fill a batch of {batch_size}"):
        build_train_data(small_data_config(root, DATA__BATCH_SIZE=batch_size), World(0, ranks, CPU))


def test_grey_networks_get_grey_images(root):
    config = small_data_config(root, MODEL__GMA__IN_DIM=1, DATA__MEAN=[0.3], DATA__STD=[0.4])
    assert epoch_of(config)[0][0].shape == (4, 1, 32, 32)
    assert next(iter(build_eval_data(config, ALONE, None, None).loader))[0].shape == (4, 1, 32, 32)


@pytest.mark.parametrize(
    ("asked", "local_size", "given"), [(0, 1, 0), (2, 1, 2), (8, 1, 4), (8, 2, 2), (8, 3, 1), (8, 8, 1), (0, 8, 0)]
)
def test_a_rank_gets_no_more_workers_than_it_has_cores(root, asked, local_size, given):
    world = World(0, 1, CPU, local_size)
    config = small_data_config(root, DATA__NUM_WORKERS=asked)
    for data in (build_train_data(config, world), build_eval_data(config, world, None, None)):
        assert data.loader.num_workers == given


# Evaluation


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 13])
def test_each_validation_image_is_given_exactly_once(root, ranks, workers):
    if ranks == 13 and workers:
        ranks = 12  # one rank without any image is enough
    config = small_data_config(root, DATA__NUM_WORKERS=workers)
    shares = [build_eval_data(config, World(rank, ranks, CPU), None, None) for rank in range(ranks)]
    seen = [found for data in shares for found in numbers_of(data.loader)]
    assert sorted(seen) == [(number, (number >= 4) + (number >= 8)) for number in range(11)]
    assert {data.images for data in shares} == {11}
    assert shares[0].classes == ["a", "b", "c"]


@given(images=st.integers(1, 60), ranks=st.integers(1, 9), batch_size=st.integers(1, 9))
@examples(150)
def test_rounds_are_the_batches_that_every_rank_has(images, ranks, batch_size):
    source = type("Source", (), {"classes": ["a"], "__len__": lambda self: images})()
    config = small_data_config("nowhere", DATA__BATCH_SIZE=batch_size)
    with mock.patch("data.build.open_split", return_value=source):
        shares = [build_eval_data(config, World(rank, ranks, CPU), None, None) for rank in range(ranks)]
    numbers = [len(data.loader) for data in shares]
    assert {data.rounds for data in shares} == {shares[0].rounds}
    assert min(numbers) - 1 <= shares[0].rounds <= min(numbers)
    assert max(numbers) <= shares[0].rounds + 1


def test_classes_get_the_networks_numbers(root):
    config = small_data_config(root)
    data = build_eval_data(config, ALONE, ["c", "x", "a", "b"], 4)
    assert sorted(numbers_of(data.loader)) == [(n, 2 if n < 4 else 3 if n < 8 else 0) for n in range(11)]
    assert data.classes == ["a", "b", "c"]


def test_classes_that_the_network_does_not_know_are_refused(root):
    with pytest.raises(UserError, match="does not know the classes b"):
        build_eval_data(small_data_config(root), ALONE, ["a", "c"], 2)


def test_a_network_of_another_number_of_unnamed_classes_is_refused(root):
    with pytest.raises(UserError, match="the data has 3 classes, the network 5"):
        build_eval_data(small_data_config(root), ALONE, None, 5)


@pytest.mark.parametrize("name", ["tar", "torch/image_folder"])
def test_other_data_sets_give_the_same_batches_as_the_folder(root, name):
    for split in ("train", "val"):
        write_tar(root / f"{split}.tar", root / split)
    config = small_data_config(root)
    images = {float(image.sum()) for batch in build_eval_data(config, ALONE, None, None).loader for image in batch[0]}
    config.DATA.DATASET = name
    data = build_eval_data(config, ALONE, None, 3)
    assert {float(image.sum()) for batch in data.loader for image in batch[0]} == images
    assert build_train_data(config, ALONE).steps_per_epoch == 3


def test_no_memory_is_pinned_for_a_cpu(root):
    config = small_data_config(root, DEVICE="auto", DATA__PIN_MEMORY=True)
    for data in (build_train_data(config, ALONE), build_eval_data(config, ALONE, None, None)):
        assert not data.loader.pin_memory


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_the_whole_group_leaves_the_loaders_processes_alive(root, number):
    config = small_data_config(root, DATA__NUM_WORKERS=2)
    for data in (build_train_data(config, ALONE), build_eval_data(config, ALONE, None, None)):
        batches = iter(data.loader)
        for _ in range(2):
            next(batches)  # one from each worker, so that both have begun
        for worker in data.loader._iterator._workers:
            subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
        list(batches)
        assert all(worker.is_alive() for worker in data.loader._iterator._workers)


def test_loaders_processes_are_ended_once_however_many_loaders_there_are(root):
    registered = []
    for _ in range(3):
        build_train_data(small_data_config(root, DATA__NUM_WORKERS=1), ALONE)
        registered.append(atexit._ncallbacks())
    assert len(set(registered)) == 1


PROGRAM = """
import sys
from helpers_unit import ALONE, small_data_config
from data.build import build_train_data
from utils.cli import run

def main():
    data = build_train_data(small_data_config(sys.argv[1], DATA__NUM_WORKERS=1), ALONE)
    for batch in data.loader:
        print(data.loader._iterator._workers[0].pid)
        raise {error}

run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("__import__('utils.errors').errors.UserError('mine')", 2),
        ("__import__('utils.errors').errors.Stopped(15)", 128 + 15),
        ("ZeroDivisionError('mine')", 1),
    ],
    ids=["a user's error", "a signal", "an error of the code"],
)
def test_a_program_that_fails_ends_with_its_loaders_processes(root, error, code):
    command = [sys.executable, "-c", PROGRAM.format(error=error), str(root)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code
    assert not Path(f"/proc/{int(out)}").exists()


@pytest.mark.parametrize("pinned", [True, False])
def test_memory_is_pinned_for_a_gpu_where_asked_for(root, pinned, monkeypatch):
    world = World(0, 1, torch.device("cuda", 0))
    config = small_data_config(root, DATA__PIN_MEMORY=pinned)
    assert build_train_data(config, world).loader.pin_memory is pinned
    monkeypatch.setattr("data.build.Normalize", mock.Mock())  # puts its numbers on the GPU
    assert build_eval_data(config, world, None, None).loader.pin_memory is pinned


# Streams


@pytest.fixture
def streamed(monkeypatch):
    """Lets `open_split` give streams of 26 training and 11 validation images."""

    def open_split(config, split, is_training):
        return IterableImageDataset("", reader=FakeReader(26 if is_training else 11))

    monkeypatch.setattr("data.build.open_split", open_split)
    return small_data_config("")


def test_a_stream_trains_as_many_steps_as_it_says(streamed):
    data = build_train_data(streamed, ALONE)
    assert (data.classes, data.steps_per_epoch) == (["a", "b", "c"], 6)
    assert data.images == 26
    assert [len(targets) for _, targets in epoch_of(None, data=data)] == [4] * 6


def test_a_streams_reader_is_told_how_many_processes_load_it(streamed, monkeypatch):
    told = []  # timm's tell their length by it
    monkeypatch.setattr(FakeReader, "set_loader_cfg", lambda self, num_workers: told.append(num_workers), raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    streamed.DATA.NUM_WORKERS = 3
    build_train_data(streamed, ALONE)
    build_eval_data(streamed, World(0, 4, CPU, local_size=4), None, 3)
    assert told == [3, 2]


def test_a_stream_names_no_samples(streamed):
    assert build_train_data(streamed, ALONE).names(0, range(3)) == ["samples of a stream, which has no names for them"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_streams_epoch_that_is_gone_on_with_gives_the_same_rest(streamed, workers):
    streamed.DATA.NUM_WORKERS = workers
    data = build_train_data(streamed, ALONE)
    whole = epoch_of(None, epoch=3, data=data)
    for first in range(7):
        assert same(epoch_of(None, epoch=3, data=data, first_batch=first), whole[first:])


def test_two_processes_give_the_same_rest_of_a_streams_epoch_in_another_order(streamed, monkeypatch):
    def batches(first):
        found = epoch_of(None, epoch=3, data=data, first_batch=first)
        return [(images.numpy().tobytes(), *targets.tolist()) for images, targets in found]

    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    streamed.DATA.NUM_WORKERS = 2
    data = build_train_data(streamed, ALONE)
    whole = batches(0)
    assert len(set(whole)) == 6
    for first in range(1, 7):
        assert sorted(batches(first)) == sorted(whole[first:])


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_streams_broken_images_are_replaced_where_asked_for(streamed, on_error):
    streamed.DATA.ON_ERROR = on_error
    streamed.AUG.COLOR_JITTER = 0.0
    data = build_train_data(streamed, ALONE)
    good, cut = list(data.loader.dataset.dataset.reader), Image.open(io.BytesIO(b"P6 40 36 255\n"))
    data.loader.dataset.dataset.reader = [good[1], (cut, 0), *good]
    images, _, complaints = next(iter(data.loader))
    assert [bool(complaint) for complaint in complaints] == [False, True, False, False]
    assert [number_of(image) for image in images] == ([1, 0, 0, 1] if on_error == "stop" else [1, 1, 0, 1])


def test_a_streams_epochs_are_told_to_its_reader(streamed):
    data = build_train_data(streamed, ALONE)
    data.set_epoch(7)
    assert data.loader.dataset.dataset.reader.seen_epoch == 7
    assert not same(epoch_of(None, epoch=0, data=data), epoch_of(None, epoch=1, data=data))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_scored_exactly_once(streamed, ranks, workers):
    streamed.DATA.NUM_WORKERS = workers
    shares = [build_eval_data(streamed, World(rank, ranks, CPU), None, 3) for rank in range(ranks)]
    seen = [found for data in shares for found in numbers_of(data.loader)]
    assert sorted(seen) == [(number, number % 3) for number in range(11)]
    assert {data.images for data in shares} == {11}


@pytest.fixture
def check_ranks(monkeypatch):
    """Checks the validation data of ranks that have so many loader processes."""

    def check(config, *workers):
        told = []
        monkeypatch.setattr("utils.dist.gather_objects", lambda facts: told.append(facts) or told)
        for rank, config.DATA.NUM_WORKERS in enumerate(workers):
            check_readers(build_eval_data(config, World(rank, len(workers), CPU), None, 3))

    return check


def test_ranks_read_a_stream_with_as_many_processes_or_not_at_all(streamed, check_ranks):
    for workers in ((2, 2), (0, 1), (1, 0)):  # without a loader process, the rank's own reads
        check_ranks(streamed, *workers)
    with pytest.raises(UserError, match=r"read the stream is 2 on rank 0 and 1 on rank 1: set DATA\.NUM_WORKERS"):
        check_ranks(streamed, 2, 1)


def test_ranks_may_read_a_folder_with_unlike_numbers_of_processes(root, check_ranks):
    check_ranks(small_data_config(root), 2, 1)


def test_a_streams_classes_must_be_the_networks(streamed):
    with pytest.raises(UserError, match="the classes of the checkpoint and the data differ"):
        build_eval_data(streamed, ALONE, ["a", "c", "b"], 3)
    with pytest.raises(UserError, match="only in the checkpoint: d; only in the data: c"):
        build_eval_data(streamed, ALONE, ["a", "b", "d"], 3)


def test_a_stream_that_fills_no_batch_is_refused(streamed):
    streamed.DATA.BATCH_SIZE = 28
    with pytest.raises(UserError, match="26 training images"):
        build_train_data(streamed, ALONE)


def test_a_stream_refuses_repeats_that_it_cannot_give(streamed):
    streamed.AUG.REPEATS = 3
    with pytest.raises(UserError, match=r"AUG\.REPEATS"):
        build_train_data(streamed, ALONE)


# Mixup


def mixed(seed=0, classes=3, **values):
    """Eight images, each of its own number, and their targets, after mixing."""
    mixup = build_mixup(configured(**values), classes)
    seed_everything(seed)
    images = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 16, 16).clone()
    return mixup(images, torch.arange(8) % classes)


def test_without_mixup_and_cutmix_nothing_is_mixed():
    assert build_mixup(configured(AUG__MIXUP=0.0, AUG__CUTMIX=0.0), 3) is None


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    "kind",
    [
        {"AUG__MIXUP": 0.8, "AUG__CUTMIX": 0.0},
        {"AUG__MIXUP": 0.0, "AUG__CUTMIX": 1.0},
        {"AUG__MIXUP": 0.8, "AUG__CUTMIX": 1.0},
        {"AUG__MIXUP": 0.0, "AUG__CUTMIX": 0.0, "AUG__CUTMIX_MINMAX": [0.3, 0.6]},
    ],
    ids=["mixup", "cutmix", "both", "cutmix between bounds"],
)
def test_every_kind_of_mixing_works_alone(kind, mode):
    for seed in range(10):
        images, targets = mixed(seed, AUG__MIXUP_MODE=mode, **kind)
        assert (images.shape, targets.shape) == ((8, 3, 16, 16), (8, 3))
        torch.testing.assert_close(targets.sum(1), torch.ones(8))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_targets_hold_the_images_shares_smoothed(smoothing):
    images, targets = mixed(AUG__CUTMIX=0.0, MODEL__LABEL_SMOOTHING=smoothing)
    share = float((images[0, 0, 0, 0] - 7) / (0 - 7))  # image 0 is mixed with image 7
    one_hot = torch.full((8, 3), smoothing / 3)
    one_hot[torch.arange(8), torch.arange(8) % 3] += 1 - smoothing
    torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.flip(0))
    assert 0 < share < 1


def test_cutmix_targets_hold_the_shares_of_the_area():
    images, targets = mixed(AUG__MIXUP=0.0, MODEL__LABEL_SMOOTHING=0.0)
    own = (images[:, 0] == torch.arange(8.0).reshape(8, 1, 1)).float().mean((1, 2))
    assert 0 < own[0] < 1
    assert float(targets[0, 0]) == pytest.approx(float(own[0]))  # image 0 of class 0 with image 7 of class 1
    assert float(targets[0, 1]) == pytest.approx(1 - float(own[0]))


def test_mixing_happens_with_its_probability():
    plain_batches = sum(
        bool((mixed(seed, AUG__MIXUP_PROB=0.25)[0].std((1, 2, 3)) == 0).all())
        and float(mixed(seed, AUG__MIXUP_PROB=0.25)[0][0, 0, 0, 0]) == 0
        for seed in range(100)
    )
    assert 60 <= plain_batches <= 88  # 75 expected


def test_mixing_switches_to_cutmix_with_its_probability():
    switched = [
        bool((mixed(seed, AUG__MIXUP_SWITCH_PROB=switch)[0] % 1 == 0).all()) for switch in (0.0, 1.0) for seed in (1, 2)
    ]
    assert switched == [False, False, True, True]
