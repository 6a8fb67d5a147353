"""Write, find, verify, load and prune checkpoints. A checkpoint is a dict of plain types and tensors, never code."""

import hashlib
import json
import logging
import math
import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from utils.config import check_task
from utils.errors import UserError, listing, not_written, reason

_log = logging.getLogger(__name__)

LAST = "last.pth"
BEST = "best.pth"
_NUMBERED = re.compile(r"ckpt_epoch_(\d+)(?:_update_(\d+))?\.pth")
_CHECKSUM = "checksum"
_CHUNK = 2**24  # bytes
_SPARE = 2  # the newest checkpoints, of which one may turn out to be damaged


def digest(value: Any) -> str:
    """SHA-256 of nested plain types and tensors: of their values, not of how a file holds them."""
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        hasher.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        hasher.update(f"mapping {len(value)} ".encode())
        for item in value.items():
            _feed(hasher, item)
    elif isinstance(value, (list, tuple)):
        hasher.update(f"{type(value).__name__} {len(value)} ".encode())
        for item in value:
            _feed(hasher, item)
    else:
        hasher.update(f"{type(value).__name__} {value!r} ".encode())


def on_host(value: Any, before: Any = None) -> Any:
    """A copy of nested plain types and tensors in host memory, which training may go on beside.

    Args:
        value: What to copy.
        before: An earlier copy that is no longer needed: its memory is used again, which is much faster.
    """
    if isinstance(value, Tensor):
        fits = isinstance(before, Tensor) and before.shape == value.shape and before.dtype == value.dtype
        return before.copy_(value.detach()) if fits else value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        old = before if isinstance(before, Mapping) else {}
        return type(value)((key, on_host(item, old.get(key))) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        old = before if isinstance(before, (list, tuple)) and len(before) == len(value) else [None] * len(value)
        return type(value)(on_host(item, was) for item, was in zip(value, old, strict=True))
    return value


def save(state: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint with its checksum beside its place, verifies it and moves it there.

    The old one stays until the new one is on disk and reads as it was written.

    Raises:
        UserError: If it cannot be written.
    """
    content = {**_content(state), _CHECKSUM: digest(_content(state))}

    def write(beside: Path) -> None:
        with open(beside, "wb") as file:
            written = _HashingFile(file)
            torch.save(content, written)
            file.flush()
            os.fsync(file.fileno())
        if _hash_of(beside) != written.hasher.digest():
            raise OSError("it does not read as it was written")

    write_beside(path, write)


class _HashingFile:
    """A file that is hashed on its way to the disk; unlike reading a checkpoint, that leaves Python to training."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.hasher = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hasher.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _hash_of(path: Path) -> bytes:
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        with suppress(AttributeError, OSError):  # where there is none, or not for this disk, memory answers for it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.digest()


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Lets a function write a file beside its place, flushes it to disk and moves it there, for good.

    Args:
        path: The place.
        write: Given the path to write to.

    Raises:
        UserError: If it cannot be written; what was at the place before is still there then.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        write(beside)
        _flush(beside)
        beside.replace(path)
        _flush(path.parent)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise not_written(path, _disk_error(error) or error) from None
    finally:
        beside.unlink(missing_ok=True)  # also where Ctrl-C came


def write_output(path: Path, write: Callable[[Path], object]) -> None:
    """Lets a function write a file as `write_beside` does; a device, a pipe, or what a link leads to, is just written.

    Args:
        path: The place.
        write: Given the path to write to.

    Raises:
        UserError: If it cannot be written.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        try:
            write(path)
        except OSError as error:
            raise not_written(path, error) from None
    else:
        write_beside(path, write)


def write_text(path: Path, text: str) -> None:
    """Writes a text file as `write_output` does.

    Raises:
        UserError: If it cannot be written.
    """
    write_output(path, lambda place: _write_utf8(place, text))


def write_json(path: Path, values: Any) -> None:
    """Writes a report as `write_output` does; numbers that JSON has nothing for are null in it.

    Raises:
        UserError: If it cannot be written.
    """

    def write(place: Path) -> None:
        with open(place, "w", encoding="utf-8") as file:
            json.dump(finite(values), file, indent=2)  # piece by piece: all pieces at once take many times the memory
            file.write("\n")

    write_output(path, write)


def finite(values: Any) -> Any:
    """Nested plain types with None in the place of what is no finite number."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogateescape")  # file names may be of any bytes


def _disk_error(error: BaseException | None) -> OSError | None:
    """What the disk said, which torch may hide behind an error of its own."""
    while error and not isinstance(error, OSError):
        error = error.__context__
    return error


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy(source: Path, target: Path) -> None:
    """Gives a checkpoint a second name that outlives the first, without a second copy where the disk allows.

    Raises:
        UserError: If it cannot be written.
    """

    def link_or_copy(beside: Path) -> None:
        beside.unlink(missing_ok=True)
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)

    write_beside(target, link_or_copy)


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU: a .pth file that holds no code, or .safetensors; verifies its checksum.

    Returns:
        The checkpoint's dict; a bare state dict comes back as {'model': state dict}. What others put under 'classes' is
        left out if it is no list of names.

    Raises:
        UserError: If it is missing, damaged, or is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file: name a checkpoint")
    state = _read(path)
    if not _is_whole(state):
        raise UserError(f"{path} is damaged (its checksum does not fit): name another file")
    if not isinstance(state.get("model"), Mapping):
        return {"model": state}
    names = state.get("classes") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        del state["classes"]
    return state


def load_for_task(path: str | Path, wanted: str, *others: str) -> dict[str, Any]:
    """As `load`, but refuses a checkpoint whose configuration is of another task; one without a configuration passes.

    Args:
        path: Its file.
        wanted: The task that the program is of.
        others: Tasks that will do, too.

    Raises:
        UserError: If it cannot be read, or its configuration is of another task.
    """
    state = load(path)
    check_task(saved_values(state), path, wanted, *others)
    return state


def saved_values(state: Mapping[str, Any]) -> dict[str, Any]:
    """The nested keys of a checkpoint's configuration; none where it holds no configuration that can be read."""
    saved = state.get("config")
    try:
        values = yaml.safe_load(saved) if isinstance(saved, str) else None
    except (yaml.YAMLError, ValueError):  # others may call anything a configuration
        return {}
    return values if isinstance(values, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        path.open("rb").close()  # safetensors says of a file that it may not read that there is none
        if path.suffix == ".safetensors":
            return {"model": safetensors.torch.load_file(path)}
        # The published code keeps its yacs configuration beside the weights; it comes in as a plain dict.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        types = listing(_foreign_types(path))
        why = f"of plain tensors ({types})" if types else "(neither a .pth of plain tensors nor a .safetensors)"
        raise UserError(f"{path} is no checkpoint {why}; nothing in it was run: name another file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)}): mend that or name another file") from None
    except Exception as error:  # what random bytes make the readers raise is not theirs to promise
        raise UserError(f"{path} is no checkpoint ({reason(error)}): name another file") from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} is no checkpoint (it holds a {type(state).__name__}): name another file")
    return state


def _content(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the checksum of a checkpoint is of."""
    return {name: value for name, value in state.items() if name != _CHECKSUM}


def _is_whole(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is what its checksum says; weights from elsewhere have none."""
    if _CHECKSUM not in state:
        return "progress" not in state
    try:
        return state[_CHECKSUM] == digest(_content(state))
    except RecursionError:  # a flipped bit can make a dict that holds itself
        return False


def _foreign_types(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # text, and files older than the zip format, cannot be looked into
        return []


def name_of(epoch: int, place: int) -> str:
    """The name of the checkpoint after so many epochs, and so many updates of the next one."""
    return f"ckpt_epoch_{epoch}_update_{place}.pth" if place else f"ckpt_epoch_{epoch}.pth"


def numbered(folder: Path) -> list[Path]:
    """The numbered checkpoints of a folder, oldest first."""
    return [path for _, path in _by_age(folder)]


def _by_age(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    matches = [(_NUMBERED.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(((int(match[1]), int(match[2] or 0)), path) for match, path in matches if match)


def save_numbered(state: Mapping[str, Any], folder: Path, *, is_best: bool, every: int, keep: int) -> None:
    """Writes a run's checkpoint under its number, as last.pth, and as best.pth if it is; then removes old ones.

    A run that is killed in between goes on from what is there; `restore_best` makes up for best.pth.

    Args:
        state: The checkpoint, with the progress that numbers it.
        folder: Where to.
        is_best: Whether no epoch before was better.
        every: Epochs between checkpoints that are kept.
        keep: How many of those to keep.
    """
    progress = state["progress"]
    path = folder / name_of(progress["epoch"], progress["place"])
    save(state, path)
    copy(path, folder / LAST)
    if is_best:
        copy(path, folder / BEST)
    prune(folder, every, keep)


def prune(folder: Path, every: int, keep: int) -> None:
    """Removes numbered checkpoints but the newest ones, and the newest ones of every so many whole epochs.

    Args:
        folder: The run's.
        every: Epochs between checkpoints that are kept.
        keep: How many of those to keep.
    """
    found = _by_age(folder)
    whole = [path for (epoch, place), path in found if place == 0 and epoch % every == 0]
    kept = {*whole[-keep:], *(path for _, path in found[-_SPARE:])}
    for _, path in found:
        if path not in kept:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _log.warning("%s cannot be removed (%s)", path, reason(error))


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a folder's run goes on from, the newest that is not damaged, and its path.

    Returns:
        None where the folder has no checkpoint.

    Raises:
        UserError: If all of them are damaged.
    """
    damaged = []
    for path in _newest_first(folder):
        try:
            state = load(path)
        except UserError as error:
            damaged.append(path.name)
            _log.warning("%s", error)
            continue
        if damaged:
            _log.warning("going on from the one before: %s", path)
        return path, state
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} can be read ({listing(damaged)}): put a copy of one back, "
            "or choose another --tag to start afresh"
        )
    return None


def _newest_first(folder: Path) -> Iterator[Path]:
    """last.pth, then the others of the run from the newest on; one file under two names comes once."""
    if not folder.is_dir():
        return
    seen = set()
    for path in (folder / LAST, *reversed(numbered(folder)), folder / BEST):
        if path.is_file() and path.stat().st_ino not in seen:
            seen.add(path.stat().st_ino)
            yield path


def holds_run(folder: Path) -> bool:
    """Whether a folder has checkpoints, damaged or not."""
    return next(_newest_first(folder), None) is not None


def remove_after(folder: Path, epoch: int, place: int, keep: bool) -> None:
    """Clears away numbered checkpoints that lie after the place that a run goes on from: it will write them again.

    Args:
        folder: The run's.
        epoch: Epochs completed.
        place: Updates of the next epoch.
        keep: Whether to rename them to *.old instead.
    """
    for number, path in _by_age(folder):
        if number > (epoch, place):
            if keep:
                _set_aside(path)
            else:
                path.unlink()


def restore_best(folder: Path, best: Mapping[str, Any] | None, keep: bool) -> bool:
    """Makes best.pth the checkpoint of the best epoch again, where the folder still has that.

    Args:
        folder: The run's.
        best: What the checkpoint that it goes on from says of the best epoch.
        keep: Whether to rename another best.pth to *.old first.

    Returns:
        Whether best.pth is that now.
    """
    path = folder / BEST
    if _is_of_best(path, best):
        return True
    if keep and path.is_file():
        _set_aside(path)
    if best and _is_of_best(numbered := folder / name_of(best["epoch"] + 1, 0), best):
        copy(numbered, path)
        return True
    return False


def _is_of_best(path: Path, best: Mapping[str, Any] | None) -> bool:
    try:
        return best is not None and path.is_file() and load(path).get("best") == best
    except UserError:  # a damaged one
        return False


def _set_aside(path: Path) -> None:
    """Renames a file to *.old, or to *.old2 and so on where that is taken."""
    number, old = 1, path.with_name(f"{path.name}.old")
    while old.exists():
        number += 1
        old = path.with_name(f"{path.name}.old{number}")
    path.replace(old)


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed run was writing."""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def check_space(folder: Path, size: int, keep: int) -> None:
    """Refuses a disk that cannot hold a run's checkpoints.

    Args:
        folder: Where they go.
        size: Bytes of one.
        keep: How many are kept, beside the best, the newest ones and the one that is being written.

    Raises:
        UserError: If there is too little space.
    """
    count = keep + 1 + _SPARE + 1
    held = sum({path.stat().st_ino: path.stat().st_size for path in folder.glob("*.pth")}.values())
    free = shutil.disk_usage(folder).free
    if free + held < size * count:
        raise UserError(
            f"{folder} has {free / 2**20:.0f} MiB free, but {count} checkpoints of {size / 2**20:.0f} MiB must fit: "
            "free some space, lower KEEP, or choose another --output"
        )
