"""Folders that appear whole or not at all."""

import errno
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from utils.errors import UserError, reason

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def appearing_whole(output: Path) -> Iterator[Path]:
    """Gives a folder beside the output to write to, which takes its name in the end, or goes where anything fails.

    Raises:
        UserError: If it cannot be made.
    """
    output = output.resolve()
    part = output.with_name(f"{output.name}.part")
    try:
        part.mkdir()
    except FileExistsError:
        raise UserError(f"{part} exists: remove it unless another program is writing there") from None
    except OSError as error:
        raise UserError(f"{part} cannot be made ({error.strerror}): name another place") from None
    with ending_in_order():
        try:
            yield part
            part.rename(output)
        except OSError as error:
            hint = "free some space or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise UserError(f"{output} cannot be written ({reason(error)}): {hint}name another place") from None
        finally:
            _ignore_endings()
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Lets a signal that ends the program raise SystemExit, on which what is half written can be removed."""
    before = {number: signal.getsignal(number) for number in _ENDINGS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    _ignore_endings()
    sys.exit(128 + number)  # libraries swallow other exceptions


def _ignore_endings() -> None:
    """Lets the cleaning up come to its end."""
    for number in _ENDINGS:
        signal.signal(number, signal.SIG_IGN)
