"""Folders that appear whole or not at all."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError, reason
from utils.signals import ending_in_order, ignore_endings


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
            ignore_endings()
            shutil.rmtree(part, ignore_errors=True)
