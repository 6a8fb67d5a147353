"""Writing, reading, naming and pruning of checkpoints."""

import errno
import io
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers_unit import examples, small_network
from hypothesis import given
from hypothesis import strategies as st

from utils import checkpoint
from utils.errors import UserError

STATE = {
    "model": {"layer.weight": torch.arange(6.0).reshape(2, 3), "norm.num_batches_tracked": torch.tensor(7)},
    "ema": None,
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.999), "params": [0]}]},
    "best": {"epoch": 2, "of": "model", "acc1": 71.5},
    "config": "TAG: x\n",
    "classes": ["a", "b"],
}


def same(first, second):
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return first == second and type(first) is type(second)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Writing


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    checkpoint.save(STATE, tmp_path / "x.pth")
    assert names(tmp_path) == ["x.pth"]
    assert same(checkpoint.load(tmp_path / "x.pth"), STATE)
    assert same(checkpoint.load(str(tmp_path / "x.pth")), STATE)


def test_a_networks_and_an_optimizers_states_come_back_as_they_were(tmp_path):
    network = small_network()
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    optimizer.step()
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(state, tmp_path / "x.pth")
    assert same(checkpoint.load(tmp_path / "x.pth"), {**state, "model": dict(state["model"])})


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
@pytest.mark.parametrize("before", [True, False], ids=["over another", "the first"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, error, before):
    path = tmp_path / "x.pth"
    if before:
        checkpoint.save({"model": {}, "epoch": 1}, path)

    def fail(state, target, *args, **kwargs):
        if isinstance(target, (str, Path)):
            Path(target).write_bytes(b"half")
        else:
            target.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"x\.pth cannot be written") as caught:
        checkpoint.save(STATE, path)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == (["x.pth"] if before else [])
    if before:
        assert checkpoint.load(path)["epoch"] == 1


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    checkpoint.save({"model": {}, "epoch": 1}, path)
    original = os.fsync

    def killed(descriptor):
        original(descriptor)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(STATE, path)
    monkeypatch.undo()
    assert checkpoint.load(path)["epoch"] == 1
    checkpoint.save(STATE, path)  # and what was left behind is no hindrance
    assert names(tmp_path) == ["x.pth"]


def test_a_checkpoint_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    path, seen = tmp_path / "x.pth", []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (seen.append(path.exists()), original(descriptor)))
    checkpoint.save(STATE, path)
    assert seen == [False]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        checkpoint.save(STATE, tmp_path / "nowhere" / "x.pth")


# Reading


def test_a_bare_state_dict_counts_as_a_model(tmp_path):
    torch.save(STATE["model"], tmp_path / "x.pth")
    assert same(checkpoint.load(tmp_path / "x.pth"), {"model": STATE["model"]})


def test_safetensors_count_as_a_model(tmp_path):
    safetensors.torch.save_file(STATE["model"], tmp_path / "x.safetensors")
    assert same(checkpoint.load(tmp_path / "x.safetensors"), {"model": STATE["model"]})


def test_tensors_come_back_on_the_cpu(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert checkpoint.load(tmp_path / "x.pth")["model"]["w"].device.type == "cpu"


class Evil:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, zipped):
    path, made = tmp_path / "x.pth", tmp_path / "made"
    torch.save({"model": {}, "config": Evil(made)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"x\.pth .*nothing in it was run") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    assert not made.exists()


def test_code_in_a_plain_pickle_is_refused_and_not_run(tmp_path):
    path, made = tmp_path / "x.pth", tmp_path / "made"
    path.write_bytes(pickle.dumps(Evil(made), protocol=2))
    with pytest.raises(UserError, match=r"x\.pth"):
        checkpoint.load(path)
    assert not made.exists()


NO_CHECKPOINTS = {
    "empty": b"",
    "text": b"this is no checkpoint\n",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 45800000\n",
    "page": b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n",
    "json": b'{"model": {}}\n',
    "yaml": b"DATA:\n  IMG_SIZE: 224\n",
    "numbers": b"1234\n",
    "zeros": bytes(500),
    "image": b"\x89PNG\r\n\x1a\n" + bytes(range(200)),
    "zip of nothing": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_refused_by_its_name(tmp_path, suffix, content):
    path = tmp_path / f"given{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"given\.\w+ is no checkpoint") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def _encoded(kind):
    buffer = io.BytesIO()
    if kind == "safetensors":
        return safetensors.torch.save(STATE["model"])
    torch.save(STATE, buffer, _use_new_zipfile_serialization=kind == "zipped")
    return buffer.getvalue()


ENCODED = {kind: _encoded(kind) for kind in ("zipped", "old", "safetensors")}


def refused_or(content, suffix, wanted):
    """Loads bytes: a checkpoint that is the one wanted, or a user's error of one line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"given{suffix}"
        path.write_bytes(content)
        try:
            state = checkpoint.load(path)
        except UserError as error:
            assert "\n" not in str(error)
            return
    assert same(state, wanted)


@given(kind=st.sampled_from(sorted(ENCODED)), share=st.floats(0, 1, exclude_max=True))
@examples(200)
def test_a_checkpoint_that_was_cut_short_is_refused(kind, share):
    content = ENCODED[kind][: int(share * len(ENCODED[kind]))]
    suffix, wanted = (".safetensors", {"model": STATE["model"]}) if kind == "safetensors" else (".pth", STATE)
    refused_or(content, suffix, wanted)


@given(text=st.text(max_size=40))
@examples(200)
def test_no_text_is_a_checkpoint(text):
    refused_or(text.encode(), ".pth", None)


@pytest.mark.parametrize("state", [[], [1], torch.ones(2), {}, "text", None, 3], ids=repr)
def test_a_file_of_something_else_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth is no checkpoint"):
        checkpoint.load(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["nowhere.pth", "folder"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"{name} is no file"):
        checkpoint.load(tmp_path / name)


# Names


@given(epochs=st.lists(st.integers(0, 400), unique=True, max_size=12), keep=st.integers(1, 5))
@examples(40)
def test_pruning_keeps_the_newest_by_number_and_all_other_files(epochs, keep):
    others = {
        "last.pth",
        "best.pth",
        "ckpt_epoch_7.pth.tmp",
        "my_ckpt_epoch_3.pth",
        "ckpt_epoch_x.pth",
        "metrics.jsonl",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in (*others, *(f"ckpt_epoch_{epoch}.pth" for epoch in epochs)):
            (folder / file).touch()
        assert [path.name for path in checkpoint.numbered(folder)] == [f"ckpt_epoch_{e}.pth" for e in sorted(epochs)]
        checkpoint.prune(folder, keep)
        assert set(names(folder)) == others | {f"ckpt_epoch_{epoch}.pth" for epoch in sorted(epochs)[-keep:]}


def test_a_copy_outlives_what_it_was_made_of(tmp_path):
    checkpoint.save({"model": {}, "epoch": 1}, tmp_path / "last.pth")
    checkpoint.copy(tmp_path / "last.pth", tmp_path / "best.pth")
    checkpoint.save({"model": {}, "epoch": 2}, tmp_path / "last.pth")
    assert checkpoint.load(tmp_path / "best.pth")["epoch"] == 1
    checkpoint.copy(tmp_path / "last.pth", tmp_path / "best.pth")
    assert checkpoint.load(tmp_path / "best.pth")["epoch"] == 2
    assert names(tmp_path) == ["best.pth", "last.pth"]


def test_a_disk_without_links_gets_a_copy(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save({"model": {}, "epoch": 1}, tmp_path / "last.pth")
    checkpoint.copy(tmp_path / "last.pth", tmp_path / "best.pth")
    checkpoint.save({"model": {}, "epoch": 2}, tmp_path / "last.pth")
    assert checkpoint.load(tmp_path / "best.pth")["epoch"] == 1
    assert names(tmp_path) == ["best.pth", "last.pth"]


def test_epochs_leave_the_last_the_best_and_the_newest_numbered(tmp_path):
    best_ones, numbered = {1, 3}, {2, 4, 6}
    for epoch in range(1, 8):
        checkpoint.save_epoch(
            {"model": {}, "epoch": epoch},
            tmp_path,
            epoch,
            is_best=epoch in best_ones,
            number=epoch in numbered,
            keep=2,
        )
        assert checkpoint.load(tmp_path / checkpoint.LAST)["epoch"] == epoch
        assert checkpoint.load(tmp_path / checkpoint.BEST)["epoch"] == max(e for e in best_ones if e <= epoch)
    assert names(tmp_path) == ["best.pth", "ckpt_epoch_4.pth", "ckpt_epoch_6.pth", "last.pth"]
    assert [checkpoint.load(path)["epoch"] for path in checkpoint.numbered(tmp_path)] == [4, 6]


def test_an_epoch_that_cannot_be_written_leaves_all_files_of_the_one_before(tmp_path, monkeypatch):
    checkpoint.save_epoch({"model": {}, "epoch": 1}, tmp_path, 1, is_best=True, number=True, keep=1)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError):
        checkpoint.save_epoch({"model": {}, "epoch": 2}, tmp_path, 2, is_best=True, number=True, keep=1)
    assert names(tmp_path) == ["best.pth", "ckpt_epoch_1.pth", "last.pth"]
    assert {checkpoint.load(path)["epoch"] for path in tmp_path.iterdir()} == {1}
