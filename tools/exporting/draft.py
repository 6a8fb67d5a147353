"""A place to write and check in; only what is whole is moved to where it was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.beside import folder_beside
from utils.checkpoint import write_beside
from utils.errors import not_written


@contextmanager
def draft_of(output: Path) -> Iterator[Path]:
    """Gives a path in a new folder beside a place; the file or folder written there is moved to it at the end.

    Args:
        output: The place, where nothing is yet.

    Raises:
        UserError: If the disk refuses. After this, any other error within, or a signal that ends the program, nothing
            is left.
    """
    try:
        with folder_beside(output) as folder:
            draft = folder / output.name
            yield draft
            if draft.is_dir():
                draft.rename(output)
            else:
                write_beside(output, draft.rename)
    except OSError as error:
        raise not_written(output, error) from None
