"""Write, find, load and prune checkpoints. A checkpoint is a dict of plain types and tensors, never code."""

import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from utils.errors import UserError, listing, reason

LAST = "last.pth"
BEST = "best.pth"
_NUMBERED = re.compile(r"ckpt_epoch_(\d+)\.pth")


def save(state: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint beside its place, flushes it to disk and moves it there: the old one stays until then.

    Raises:
        UserError: If it cannot be written.
    """
    write_beside(path, lambda beside: torch.save(dict(state), beside))


def write_beside(path: Path, write: Callable[[Path], None]) -> None:
    """Lets a function write a file beside its place, flushes it to disk and moves it there.

    Args:
        path: The place.
        write: Given the path to write to.

    Raises:
        UserError: If it cannot be written; what was at the place before is still there then.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({reason(error)}): free some space or choose another place"
        ) from None


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
    """Reads a checkpoint onto the CPU: a .pth file that holds no code, or .safetensors.

    Returns:
        The checkpoint's dict; a bare state dict comes back as {'model': state dict}.

    Raises:
        UserError: If it is missing, or is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file: name a checkpoint")
    try:
        if path.suffix == ".safetensors":
            return {"model": safetensors.torch.load_file(path)}
        # The published code keeps its yacs configuration beside the weights; it comes in as a plain dict.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        held = listing(_foreign_types(path)) or reason(error)
        raise UserError(
            f"{path} is no checkpoint of plain tensors ({held}); nothing in it was run: name another file"
        ) from None
    except Exception as error:  # what random bytes make the readers raise is not theirs to promise
        raise UserError(f"{path} is no checkpoint ({reason(error)}): name another file") from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} is no checkpoint (it holds a {type(state).__name__}): name another file")
    return state if isinstance(state.get("model"), Mapping) else {"model": state}


def _foreign_types(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # text, and files older than the zip format, cannot be looked into
        return []


def numbered(folder: Path) -> list[Path]:
    """The numbered checkpoints of a folder, oldest first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest numbered checkpoints."""
    for path in numbered(folder)[:-keep]:
        path.unlink()


def save_epoch(state: Mapping[str, Any], folder: Path, epoch: int, *, is_best: bool, number: bool, keep: int) -> None:
    """Writes an epoch's checkpoint under its number, as best.pth if it is, and as last.pth; then prunes.

    last.pth comes last: a run that is killed before does the epoch again, and with it the other files.

    Args:
        state: The checkpoint.
        folder: Where to.
        epoch: Epochs completed.
        is_best: Whether no epoch before was better.
        number: Whether to keep it as ckpt_epoch_<epoch>.pth too.
        keep: How many numbered checkpoints to keep.
    """
    path = folder / f"ckpt_epoch_{epoch}.pth"
    save(state, path)
    if is_best:
        copy(path, folder / BEST)
    copy(path, folder / LAST)
    if not number:
        path.unlink()
    prune(folder, keep)
