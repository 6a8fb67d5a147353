"""Folders that appear whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.beside import removing
from utils.errors import UserError, not_written
from utils.signals import ending_in_order


def check_free(output: Path) -> None:
    """Refuses a place of --output that is taken, or in no folder.

    Raises:
        UserError: If it is.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists: name another, nothing is written over")
    if not output.resolve().parent.is_dir():
        raise UserError(f"--output {output}: name a place in a folder that exists")


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
    try:
        with ending_in_order(), removing(part):
            yield part
            part.rename(output)
    except OSError as error:
        raise not_written(output, error) from None
