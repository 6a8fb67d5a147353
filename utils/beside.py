"""Folders beside a place, for what appears there whole or not at all."""

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
        OSError: If the folder cannot be made or removed.
    """
    with ending_in_order(), tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as folder:
        try:
            yield Path(folder)
        finally:
            ignore_endings()
