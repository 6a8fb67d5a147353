"""Writing, reading, naming and pruning of checkpoints."""

import errno
import io
import json
import math
import os
import pickle
import shutil
import tempfile
import tracemalloc
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from helpers_unit import examples, small_network
from hypothesis import example, given
from hypothesis import strategies as st

from utils import checkpoint
from utils.errors import UserError

STATE = {
    "model": {"layer.weight": torch.arange(6.0).reshape(2, 3), "norm.num_batches_tracked": torch.tensor(7)},
    "ema": None,
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.999), "params": [0]}]},
    "progress": {"epoch": 2, "place": 3, "broken": []},
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


def loaded(path):
    """What a checkpoint of ours holds, without the checksum that it must have."""
    state = checkpoint.load(path)
    assert state.pop("checksum") == checkpoint.digest(state)
    return state


def flip(path, position=None, mask=1):
    """Changes one byte of a file; one that counts if no other is named."""
    content = bytearray(path.read_bytes())
    content[content.index(b"model") if position is None else position] ^= mask
    path.write_bytes(content)


# Digests

TENSOR = torch.arange(24.0).reshape(1, 2, 3, 4)
CHANGES = {
    "a value": {"a": TENSOR + torch.eye(4)[0] * 1e-6, "b": [1, 2.5, "x"], "c": None},
    "the sign of zero": {"a": TENSOR * torch.tensor([-1.0, 1, 1, 1]), "b": [1, 2.5, "x"], "c": None},
    "a dtype": {"a": TENSOR.double(), "b": [1, 2.5, "x"], "c": None},
    "a dtype of as many bits": {"a": TENSOR.view(torch.int32), "b": [1, 2.5, "x"], "c": None},
    "a shape": {"a": TENSOR.reshape(2, 1, 3, 4), "b": [1, 2.5, "x"], "c": None},
    "a key": {"A": TENSOR, "b": [1, 2.5, "x"], "c": None},
    "the type of a key": {"a": TENSOR, "b": [1, 2.5, "x"], 3: None},
    "the order of keys": {"b": [1, 2.5, "x"], "a": TENSOR, "c": None},
    "the order of a list": {"a": TENSOR, "b": [2.5, 1, "x"], "c": None},
    "the type of a list": {"a": TENSOR, "b": (1, 2.5, "x"), "c": None},
    "the nesting": {"a": TENSOR, "b": [1, [2.5, "x"]], "c": None},
    "the type of a number": {"a": TENSOR, "b": [1.0, 2.5, "x"], "c": None},
    "True for 1": {"a": TENSOR, "b": [True, 2.5, "x"], "c": None},
    "the last bit of a number": {"a": TENSOR, "b": [1, math.nextafter(2.5, 3), "x"], "c": None},
    "a text": {"a": TENSOR, "b": [1, 2.5, "y"], "c": None},
    "a text for None": {"a": TENSOR, "b": [1, 2.5, "x"], "c": "None"},
    "one key more": {"a": TENSOR, "b": [1, 2.5, "x"], "c": None, "d": None},
    "one key less": {"a": TENSOR, "b": [1, 2.5, "x"]},
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_a_digest_changes_with(changed):
    value = {"a": TENSOR, "b": [1, 2.5, "x"], "c": None}
    assert checkpoint.digest(changed) != checkpoint.digest(value)


def test_a_digest_does_not_depend_on_how_memory_holds_a_value():
    same_values = [
        TENSOR,
        TENSOR.clone(),
        TENSOR.to(memory_format=torch.channels_last),
        torch.stack([TENSOR, TENSOR])[1],
        torch.nn.Parameter(TENSOR.clone()),
        torch.arange(48.0)[::2].div(2).reshape(1, 2, 3, 4),
    ]
    assert len({checkpoint.digest({"a": tensor}) for tensor in same_values}) == 1
    assert checkpoint.digest(OrderedDict(a=TENSOR, b=3)) == checkpoint.digest({"a": TENSOR, "b": 3})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0)])
def test_tensors_of_every_kind_have_digests(dtype, shape):
    zeros, ones = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    assert checkpoint.digest(zeros) == checkpoint.digest(zeros.clone())
    assert (checkpoint.digest(zeros) == checkpoint.digest(ones)) is (zeros.numel() == 0)


# Copies in host memory


def test_a_copy_in_host_memory_shares_nothing_with_its_source():
    source = {"model": OrderedDict(w=torch.ones(3)), "groups": [{"betas": (0.9, torch.tensor(2.0))}], "n": None, "e": 3}
    copied = checkpoint.on_host(source)
    assert same(copied, source)
    assert type(copied["model"]) is OrderedDict
    source["model"]["w"].zero_()
    source["groups"][0]["betas"][1].zero_()
    source["groups"].append({})
    source["e"] = 4
    assert same(copied["model"], {"w": torch.ones(3)})
    assert same(copied["groups"], [{"betas": (0.9, torch.tensor(2.0))}])
    assert copied["e"] == 3


def test_a_copy_of_a_parameter_is_no_part_of_a_graph():
    copied = checkpoint.on_host({"w": torch.nn.Parameter(torch.ones(2))})
    assert not copied["w"].requires_grad
    again = checkpoint.on_host({"w": torch.nn.Parameter(torch.zeros(2))}, copied)
    assert not again["w"].requires_grad
    assert same(again, {"w": torch.zeros(2)})


def test_a_copy_uses_the_memory_of_the_one_before():
    def state(number):
        return {"model": {"w": torch.full((2, 3), float(number))}, "list": [torch.tensor(number)], "epoch": number}

    before = checkpoint.on_host(state(1))
    places = before["model"]["w"].data_ptr(), before["list"][0].data_ptr()
    again = checkpoint.on_host(state(2), before)
    assert same(again, state(2))
    assert (again["model"]["w"].data_ptr(), again["list"][0].data_ptr()) == places


@pytest.mark.parametrize(
    "before",
    [
        None,
        {},
        {"model": {}},
        {"model": None, "list": None},
        {"model": {"w": torch.ones(5)}, "list": [torch.ones(1)]},
        {"model": {"w": torch.ones(2, 3, dtype=torch.float16)}, "list": [1, 2, 3]},
        {"model": {"w": 3}, "list": torch.ones(2), "more": torch.ones(1)},
        {"model": torch.ones(2), "list": {"x": 1}},
        [1, 2],
    ],
    ids=repr,
)
def test_a_copy_over_one_of_other_names_and_shapes_is_as_good(before):
    state = {"model": {"w": torch.rand(2, 3)}, "list": [torch.tensor(1), 2]}
    assert same(checkpoint.on_host(state, before), state)


def test_a_copy_over_another_layout_has_the_same_values():
    before = checkpoint.on_host({"w": TENSOR.to(memory_format=torch.channels_last)})
    again = checkpoint.on_host({"w": TENSOR + 1}, before)
    assert same(again, {"w": TENSOR + 1})


# Writing


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    checkpoint.save(STATE, tmp_path / "x.pth")
    assert names(tmp_path) == ["x.pth"]
    assert same(loaded(tmp_path / "x.pth"), STATE)
    assert same(loaded(str(tmp_path / "x.pth")), STATE)


def test_what_was_loaded_can_be_written_again(tmp_path):
    checkpoint.save(STATE, tmp_path / "x.pth")
    checkpoint.save(checkpoint.load(tmp_path / "x.pth"), tmp_path / "y.pth")
    assert same(loaded(tmp_path / "y.pth"), STATE)


def test_a_networks_and_an_optimizers_states_come_back_as_they_were(tmp_path):
    network = small_network()
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    optimizer.step()
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(state, tmp_path / "x.pth")
    assert same(loaded(tmp_path / "x.pth"), {**state, "model": dict(state["model"])})


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


def recorded(monkeypatch):
    """What is flushed to disk and moved to its place, in this order, from now on."""
    seen, fsync, replace = [], os.fsync, Path.replace

    def note_fsync(descriptor):
        seen.append(("flushed", Path(f"/proc/self/fd/{descriptor}").resolve()))
        fsync(descriptor)

    def note_replace(path, target):
        seen.append(("moved", Path(target)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    return seen


def test_a_checkpoint_is_on_disk_before_it_takes_its_place_and_its_name_after(tmp_path, monkeypatch):
    path, seen = tmp_path / "x.pth", recorded(monkeypatch)
    checkpoint.save(STATE, path)
    moved = seen.index(("moved", path))
    assert moved > 0
    assert {(what, where.parent) for what, where in seen[:moved]} == {("flushed", tmp_path)}
    assert seen[moved + 1 :] == [("flushed", tmp_path)]


def test_any_file_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    path, seen = tmp_path / "x.txt", recorded(monkeypatch)
    checkpoint.write_beside(path, lambda beside: beside.write_text("text"))
    assert seen == [("flushed", tmp_path / "x.txt.tmp"), ("moved", path), ("flushed", tmp_path)]
    assert path.read_text() == "text"


@pytest.mark.parametrize("before", [True, False], ids=["over another", "the first"])
def test_text_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch, before):
    path = tmp_path / "x.txt"
    if before:
        path.write_text("old")
    seen = recorded(monkeypatch)
    checkpoint.write_text(path, "text")
    assert seen == [("flushed", tmp_path / "x.txt.tmp"), ("moved", path), ("flushed", tmp_path)]
    assert path.read_text() == "text"


def test_nothing_is_left_of_a_file_whose_writing_was_interrupted(tmp_path):
    def write(beside):
        beside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_beside(tmp_path / "file", write)
    assert list(tmp_path.iterdir()) == []


def test_names_of_files_that_are_no_text_are_written_as_they_are(tmp_path):
    checkpoint.write_text(tmp_path / "names.txt", os.fsdecode(b"caf\xe9.png"))
    assert (tmp_path / "names.txt").read_bytes() == b"caf\xe9.png"


def test_text_goes_through_a_link_and_leaves_it(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    checkpoint.write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"


def test_text_goes_into_a_pipe_and_leaves_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        checkpoint.write_text(tmp_path / "pipe", "text")
        assert read.result() == "text"
    assert (tmp_path / "pipe").is_fifo()


def test_a_long_report_is_not_held_in_memory_as_text(tmp_path):
    values = ["x" * 1000] * 5000
    tracemalloc.start()
    checkpoint.write_json(tmp_path / "report.json", values)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert json.loads((tmp_path / "report.json").read_text()) == values
    assert (tmp_path / "report.json").stat().st_size > 5e6 > 5 * most


def test_text_that_cannot_be_written_is_told_of_in_a_line(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "file")
    with pytest.raises(UserError, match=r"link cannot be written \(.*No such file"):
        checkpoint.write_text(tmp_path / "link", "text")


def test_a_report_holds_null_for_what_is_no_number_however_deep(tmp_path):
    checkpoint.write_json(tmp_path / "x.json", {"loss": math.nan, "of": [{"a": -math.inf}, (0.5, 1, True, None, "é")]})
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert read == {"loss": None, "of": [{"a": None}, [0.5, 1, True, None, "é"]]}
    assert (tmp_path / "x.json").read_text().endswith("\n}\n")


def test_a_second_name_is_on_disk_too(tmp_path, monkeypatch):
    checkpoint.save(STATE, tmp_path / "x.pth")
    seen = recorded(monkeypatch)
    checkpoint.copy(tmp_path / "x.pth", tmp_path / "last.pth")
    assert seen[-2:] == [("moved", tmp_path / "last.pth"), ("flushed", tmp_path)]


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path, monkeypatch):
    path, fsync = tmp_path / "x.pth", os.fsync
    checkpoint.save({"model": {}, "epoch": 1}, path)

    def forget(descriptor):
        fsync(descriptor)
        flip(Path(f"/proc/self/fd/{descriptor}").resolve())

    monkeypatch.setattr(os, "fsync", forget)
    with pytest.raises(UserError, match=r"x\.pth cannot be written \(it does not read as it was written\)"):
        checkpoint.save(STATE, path)
    monkeypatch.undo()
    assert loaded(path)["epoch"] == 1
    assert names(tmp_path) == ["x.pth"]


def test_a_disk_that_forgets_the_end_is_noticed(tmp_path, monkeypatch):
    fsync = os.fsync

    def forget(descriptor):
        fsync(descriptor)
        os.ftruncate(descriptor, 1000)

    monkeypatch.setattr(os, "fsync", forget)
    with pytest.raises(UserError, match="does not read as it was written"):
        checkpoint.save(STATE, tmp_path / "x.pth")
    assert names(tmp_path) == []


def test_it_is_the_disk_that_is_read_back(tmp_path, monkeypatch):
    advised, advise = [], os.posix_fadvise

    def note(descriptor, start, length, advice):
        advised.append((Path(f"/proc/self/fd/{descriptor}").resolve().name, start, length, advice))
        advise(descriptor, start, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", note)
    checkpoint.save(STATE, tmp_path / "x.pth")
    assert advised == [("x.pth.tmp", 0, 0, os.POSIX_FADV_DONTNEED)]  # of the whole file nothing stays in memory


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


@pytest.mark.parametrize("kind", ["page", "yaml", "image"])
def test_a_file_of_another_kind_is_told_without_torchs_advice_to_run_what_it_holds(tmp_path, kind):
    (tmp_path / "x.txt").write_bytes(NO_CHECKPOINTS[kind])
    wanted = r"x\.txt is no checkpoint \(neither a \.pth of plain tensors nor a \.safetensors\); nothing in it was run"
    with pytest.raises(UserError, match=wanted) as caught:
        checkpoint.load(tmp_path / "x.txt")
    assert "weights_only" not in str(caught.value)


def _encoded(kind):
    buffer = io.BytesIO()
    if kind == "ours":
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(STATE, Path(folder) / "x.pth")
            return (Path(folder) / "x.pth").read_bytes()
    if kind == "safetensors":
        return safetensors.torch.save(STATE["model"])
    torch.save(STATE, buffer, _use_new_zipfile_serialization=kind == "zipped")
    return buffer.getvalue()


ENCODED = {kind: _encoded(kind) for kind in ("ours", "zipped", "old", "safetensors")}


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
    if "checksum" in state:
        assert state.pop("checksum") == checkpoint.digest(state)
    assert same(state, wanted)


@given(kind=st.sampled_from(sorted(ENCODED)), share=st.floats(0, 1, exclude_max=True))
@examples(200)
def test_a_checkpoint_that_was_cut_short_is_refused(kind, share):
    content = ENCODED[kind][: int(share * len(ENCODED[kind]))]
    suffix, wanted = (".safetensors", {"model": STATE["model"]}) if kind == "safetensors" else (".pth", STATE)
    refused_or(content, suffix, wanted)


def test_a_bare_key_is_told_as_what_it_is(tmp_path):
    (tmp_path / "x.pth").write_text("hi\n")
    with pytest.raises(UserError, match=r"x\.pth is no checkpoint \(KeyError 105\): name another file"):
        checkpoint.load(tmp_path / "x.pth")


def test_an_empty_file_in_a_checkpoints_place_is_refused(tmp_path):
    (tmp_path / "x.pth").touch()
    with pytest.raises(UserError, match=r"x\.pth is no checkpoint"):
        checkpoint.load(tmp_path / "x.pth")


def flipped(position, mask):
    content = bytearray(ENCODED["ours"])
    content[position] ^= mask
    return bytes(content)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(position=st.integers(0, len(ENCODED["ours"]) - 1), mask=st.integers(1, 255))
@examples(300)
def test_a_checkpoint_of_which_one_byte_was_changed_is_refused_or_the_same(position, mask):
    refused_or(flipped(position, mask), ".pth", STATE)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_flipped_bit_in_any_byte_is_refused_or_changes_nothing():
    for position in range(len(ENCODED["ours"])):
        refused_or(flipped(position, 1 << position % 8), ".pth", STATE)


def test_a_run_that_lost_its_checksum_is_refused(tmp_path):
    start = ENCODED["ours"].index(b"checksum")
    for position in range(start, start + 8):
        (tmp_path / "x.pth").write_bytes(flipped(position, 1))
        with pytest.raises(UserError, match=r"x\.pth is damaged"):
            checkpoint.load(tmp_path / "x.pth")


def test_a_value_that_holds_itself_is_refused(tmp_path):
    best = {"acc1": 71.5}
    best["best"] = best  # what one flipped bit can make of a file
    torch.save({**STATE, "best": best, "checksum": "0" * 64}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth is (damaged|no checkpoint)"):
        checkpoint.load(tmp_path / "x.pth")


def test_every_byte_of_a_weight_counts(tmp_path):
    weights = torch.arange(64, dtype=torch.uint8) + 130  # no other bytes of the file are like these
    checkpoint.save({"model": {"w": weights}}, tmp_path / "x.pth")
    start = (tmp_path / "x.pth").read_bytes().index(bytes(weights.tolist()))
    for position in range(start, start + 64):
        flip(tmp_path / "x.pth", position)
        with pytest.raises(UserError, match=r"x\.pth is (damaged|no checkpoint)"):
            checkpoint.load(tmp_path / "x.pth")
        flip(tmp_path / "x.pth", position)
    assert same(loaded(tmp_path / "x.pth"), {"model": {"w": weights}})


def test_a_checkpoint_that_does_not_fit_its_checksum_is_refused(tmp_path):
    checkpoint.save(STATE, tmp_path / "x.pth")
    state = checkpoint.load(tmp_path / "x.pth")
    state["best"]["acc1"] += 1e-9
    torch.save(state, tmp_path / "x.pth")  # a whole file of other content
    with pytest.raises(UserError, match=r"x\.pth is damaged \(its checksum does not fit\)"):
        checkpoint.load(tmp_path / "x.pth")


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


# Names and pruning

OTHERS = {
    "last.pth",
    "best.pth",
    "ckpt_epoch_7.pth.tmp",
    "ckpt_epoch_7.pth.old",
    "my_ckpt_epoch_3.pth",
    "ckpt_epoch_x.pth",
    "ckpt_epoch_3_update_.pth",
    "metrics.jsonl",
}
NUMBERS = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0, 0, 1, 9, 10, 11])), unique=True, max_size=12)


def touch(folder, numbers):
    for file in (*OTHERS, *(checkpoint.name_of(*number) for number in numbers)):
        (folder / file).touch()


@pytest.mark.parametrize(
    ("number", "name"),
    [((3, 0), "ckpt_epoch_3.pth"), ((0, 1), "ckpt_epoch_0_update_1.pth"), ((3, 10), "ckpt_epoch_3_update_10.pth")],
)
def test_a_checkpoint_is_named_by_epochs_and_updates(number, name):
    assert checkpoint.name_of(*number) == name


def test_checkpoints_are_ordered_by_epoch_and_update_as_numbers(tmp_path):
    wanted = ["ckpt_epoch_0_update_2.pth", "ckpt_epoch_2_update_30.pth", "ckpt_epoch_3.pth"]
    wanted += ["ckpt_epoch_3_update_9.pth", "ckpt_epoch_3_update_10.pth", "ckpt_epoch_10.pth"]
    for name in sorted(wanted):
        (tmp_path / name).touch()
    assert [path.name for path in checkpoint.numbered(tmp_path)] == wanted


@given(numbers=NUMBERS, every=st.integers(1, 4), keep=st.integers(1, 5))
@examples(80)
def test_pruning_keeps_the_two_newest_the_newest_milestones_and_all_other_files(numbers, every, keep):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        touch(folder, numbers)
        assert [path.name for path in checkpoint.numbered(folder)] == [checkpoint.name_of(*n) for n in sorted(numbers)]
        checkpoint.prune(folder, every, keep)
        milestones = sorted(number for number in numbers if number[1] == 0 and number[0] % every == 0)
        kept = {*milestones[-keep:], *sorted(numbers)[-2:]}
        assert set(names(folder)) == OTHERS | {checkpoint.name_of(*number) for number in kept}


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


SAVED = [(0, 3), (1, 0), (1, 3), (2, 0), (3, 0), (3, 3), (4, 0), (4, 3)]


def saved(folder, numbers=SAVED, best=(1, 3), every=1, keep=1):
    """Saves as a run does that was best after some epochs."""
    for epoch, place in numbers:
        state = {"model": {}, "at": [epoch, place], "progress": {"epoch": epoch, "place": place}}
        is_best = place == 0 and epoch in best
        checkpoint.save_numbered(state, folder, is_best=is_best, every=every, keep=keep)


def test_a_run_leaves_the_last_the_best_the_two_newest_and_milestones(tmp_path):
    saved(tmp_path, every=2, keep=2)
    left = {"last.pth": [4, 3], "best.pth": [3, 0]}
    left |= {checkpoint.name_of(*number): list(number) for number in [(2, 0), (4, 0), (4, 3)]}
    assert {path.name: loaded(path)["at"] for path in tmp_path.iterdir()} == left


def test_the_last_checkpoint_is_always_there_and_always_the_newest(tmp_path):
    for count in range(1, len(SAVED) + 1):
        saved(tmp_path, SAVED[count - 1 : count])
        assert loaded(tmp_path / checkpoint.LAST)["at"] == list(SAVED[count - 1])
        assert checkpoint.numbered(tmp_path)[-1].samefile(tmp_path / checkpoint.LAST)
        assert len(checkpoint.numbered(tmp_path)) >= min(count, 2)


def test_old_checkpoints_go_only_after_the_new_one_is_in_place(tmp_path, monkeypatch):
    saved(tmp_path, SAVED[:5])
    before, seen, unlink = set(names(tmp_path)), recorded(monkeypatch), Path.unlink

    def note_unlink(path, missing_ok=False):
        if path.suffix == ".pth":
            seen.append(("removed", path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", note_unlink)
    saved(tmp_path, [(4, 0)], best=(4,))
    assert [where.name for what, where in seen if what == "moved"] == ["ckpt_epoch_4.pth", "last.pth", "best.pth"]
    kinds = [what for what, _ in seen]
    assert "removed" in kinds
    assert kinds.index("removed") > len(kinds) - 1 - kinds[::-1].index("flushed")
    assert {where.name for what, where in seen if what == "removed"} == before - set(names(tmp_path))


def test_a_number_can_be_written_again(tmp_path):
    saved(tmp_path, SAVED[:4])
    saved(tmp_path, SAVED[2:4])
    assert loaded(tmp_path / "last.pth")["at"] == [2, 0]
    assert [path.name for path in checkpoint.numbered(tmp_path)] == ["ckpt_epoch_1_update_3.pth", "ckpt_epoch_2.pth"]


def test_a_checkpoint_that_cannot_be_written_leaves_all_files_of_the_one_before(tmp_path, monkeypatch):
    saved(tmp_path, [(1, 0)], best=(1,))

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="No space left on device"):
        saved(tmp_path, [(2, 0)], best=(2,))
    assert names(tmp_path) == ["best.pth", "ckpt_epoch_1.pth", "last.pth"]
    assert [loaded(path)["at"] for path in tmp_path.iterdir()] == [[1, 0]] * 3


# What a run goes on from


def found(folder):
    """The name and the place of the newest checkpoint that is whole."""
    path, state = checkpoint.newest(folder)
    assert path.parent == folder
    return path.name, tuple(state["at"])


def test_a_run_goes_on_from_the_last_checkpoint(tmp_path, caplog):
    saved(tmp_path)
    assert found(tmp_path) == ("last.pth", (4, 3))
    assert caplog.records == []


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_checkpoints_has_no_run(tmp_path, exists):
    folder = tmp_path / "run"
    if exists:
        folder.mkdir()
        (folder / "metrics.jsonl").touch()
        (folder / "last.pth.tmp").write_bytes(b"half")
    assert checkpoint.newest(folder) is None
    assert not checkpoint.holds_run(folder)


@pytest.mark.parametrize("name", ["last.pth", "best.pth", "ckpt_epoch_3.pth", "ckpt_epoch_0_update_2.pth"])
def test_a_folder_with_any_checkpoint_holds_a_run(tmp_path, name):
    (tmp_path / name).touch()
    assert checkpoint.holds_run(tmp_path)


DAMAGES = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "a byte": flip,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, caplog, damage):
    saved(tmp_path, keep=3)
    damage(tmp_path / "last.pth")  # and with it the newest numbered one, which is the same file
    assert found(tmp_path) == ("ckpt_epoch_4.pth", (4, 0))
    first, second = [record.message for record in caplog.records]
    assert first.startswith(f"{tmp_path / 'last.pth'} is ")
    assert second == f"going on from the one before: {tmp_path / 'ckpt_epoch_4.pth'}"
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_damaged_checkpoints_are_passed_over_from_the_newest_to_the_oldest_and_the_best(tmp_path, caplog):
    saved(tmp_path, every=1, keep=3, best=(1,))
    order = [("last.pth", (4, 3)), ("ckpt_epoch_4.pth", (4, 0)), ("ckpt_epoch_3.pth", (3, 0))]
    order += [("ckpt_epoch_2.pth", (2, 0)), ("best.pth", (1, 0))]
    for name, place in order:
        assert found(tmp_path) == (name, place)
        flip(tmp_path / name)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(last\.pth, .*best\.pth\)") as caught:
        checkpoint.newest(tmp_path)
    assert "\n" not in str(caught.value)
    assert checkpoint.holds_run(tmp_path)


def test_a_file_under_two_names_is_read_once(tmp_path, caplog):
    saved(tmp_path, [(1, 0)])
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == 1
    flip(tmp_path / "last.pth")
    with pytest.raises(UserError, match=r"can be read \(last\.pth\)"):
        checkpoint.newest(tmp_path)
    assert len(caplog.records) == 1


def test_a_run_without_the_last_checkpoint_goes_on_from_the_newest_numbered_one(tmp_path):
    saved(tmp_path)
    (tmp_path / "last.pth").unlink()
    assert found(tmp_path) == ("ckpt_epoch_4_update_3.pth", (4, 3))


def test_a_checkpoint_that_carries_code_is_passed_over_too(tmp_path):
    saved(tmp_path, [(1, 0), (2, 0)])
    made = tmp_path / "made"
    (tmp_path / "last.pth").unlink()
    torch.save({"model": {}, "at": Evil(made)}, tmp_path / "last.pth")
    assert found(tmp_path) == ("ckpt_epoch_2.pth", (2, 0))
    assert not made.exists()


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    touch(tmp_path, [(3, 0)])
    checkpoint.remove_unfinished(tmp_path)
    assert set(names(tmp_path)) == OTHERS - {"ckpt_epoch_7.pth.tmp"} | {"ckpt_epoch_3.pth"}
    checkpoint.remove_unfinished(tmp_path)


@example(numbers=[(6, 0), (7, 0)], epoch=6, place=0, keep=True)  # set aside beside one that was before
@given(numbers=NUMBERS, epoch=st.integers(0, 40), place=st.sampled_from([0, 1, 10]), keep=st.booleans())
@examples(60)
def test_checkpoints_after_the_place_that_a_run_goes_on_from_are_cleared_away(numbers, epoch, place, keep):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        touch(folder, numbers)
        checkpoint.remove_after(folder, epoch, place, keep)
        left = {checkpoint.name_of(*number) for number in numbers if number <= (epoch, place)}
        old = {f"{checkpoint.name_of(*number)}.old" for number in numbers if number > (epoch, place)}
        old = {f"{name}2" if name in OTHERS else name for name in old}
        assert set(names(folder)) == OTHERS | left | (old if keep else set())


# Reading


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_checkpoint_that_may_not_be_read_is_not_called_none(tmp_path, monkeypatch, name):
    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / name).touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=rf"{name} cannot be read \(.*Permission denied\): mend that"):
        checkpoint.load(tmp_path / name)


# Space

MIB = 2**20


def with_free(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, used=0, free=free))


@given(size=st.integers(1, 10**10), keep=st.integers(1, 20))
@examples(30)
def test_a_run_needs_space_for_what_it_keeps_the_best_two_newest_and_one_more(size, keep):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as monkeypatch:
        with_free(monkeypatch, size * (keep + 4))
        checkpoint.check_space(Path(name), size, keep)
        with_free(monkeypatch, size * (keep + 4) - 1)
        with pytest.raises(UserError, match="free some space"):
            checkpoint.check_space(Path(name), size, keep)


def test_too_little_space_is_told_in_one_line(tmp_path, monkeypatch):
    with_free(monkeypatch, 300 * MIB)
    with pytest.raises(UserError) as caught:
        checkpoint.check_space(tmp_path, 100 * MIB, 3)
    assert str(caught.value).startswith(f"{tmp_path} has 300 MiB free, but 7 checkpoints of 100 MiB must fit: ")
    assert "KEEP" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_run_holds_already_counts_once_under_all_its_names(tmp_path, monkeypatch):
    (tmp_path / "ckpt_epoch_1.pth").write_bytes(bytes(1000))
    for name in ("last.pth", "best.pth"):
        os.link(tmp_path / "ckpt_epoch_1.pth", tmp_path / name)
    (tmp_path / "ckpt_epoch_2.pth").write_bytes(bytes(1000))
    (tmp_path / "log_rank0.txt").write_bytes(bytes(1000))
    with_free(monkeypatch, 3000)
    checkpoint.check_space(tmp_path, 1000, 1)
    with_free(monkeypatch, 2999)
    with pytest.raises(UserError):
        checkpoint.check_space(tmp_path, 1000, 1)
