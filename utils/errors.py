"""The one kind of error that a user can mend."""

import errno
import re
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Something outside the code is wrong. The message is one line: what, where, and what to do."""


class OneRankError(UserError):
    """What one rank meets by itself, and has to tell of by itself."""


class BrokenDataError(OneRankError):
    """An image cannot be read."""


class LostRankError(OneRankError):
    """Another rank died or hangs."""


class Stopped(Exception):
    """A signal asked the run to stop.

    Attributes:
        signal: The signal's number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def reason(error: BaseException) -> str:
    """An error in one line, the same each time: without the addresses of objects that PIL and others tell."""
    name = type(error).__name__
    first = re.sub(r" at 0x[0-9a-fA-F]+", "", (str(error).splitlines() or [name])[0])
    return f"{name} {first}" if isinstance(error, KeyError) else first  # whose text is the key alone


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch found no memory, on a GPU or on a CPU; by name, as not every program imports torch."""
    return type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)


def not_written(path: Path, error: Exception) -> UserError:
    """What to raise where a file or folder cannot be written."""
    hint = "free some space or " if getattr(error, "errno", None) in (None, *_NO_ROOM) else ""
    return UserError(f"{path} cannot be written ({reason(error)}): {hint}choose another place")


def listing(names: list[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest
