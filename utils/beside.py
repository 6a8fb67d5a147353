"""Folders beside a place, for what appears there whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.signals import ending_in_order, ignore_endings


@contextmanager
def folder_beside(place: Path) -> Iterator[Path]:
    """Gives a new hidden folder beside a place, which is removed in the end, also where a signal ends the program.

    Args:
        place: What is to appear, in a folder that exists.

    Raises:
        OSError: If the folder cannot be made.
    """
    with ending_in_order(), removing(Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))) as folder:
        yield folder


@contextmanager
def removing(folder: Path) -> Iterator[Path]:
    """Gives a folder, which is removed in the end if it is still there; no further signal disturbs that."""
    try:
        yield folder
    finally:
        ignore_endings()
        shutil.rmtree(folder, ignore_errors=True)
