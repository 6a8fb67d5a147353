"""The folder of a scoring report: what it may replace, and how it appears whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.beside import folder_beside
from utils.errors import UserError, listing, not_written

PAGE = "index.html"
SCORE = "score.json"
CLASSES, CONFUSIONS, CALIBRATION, IMAGES = "classes.csv", "confusions.csv", "calibration.csv", "images.csv"
MATRIX, RELIABILITY, MISTAKES = "confusion_matrix.png", "reliability.png", "mistakes.png"
_FILES = {PAGE, SCORE, CLASSES, CONFUSIONS, CALIBRATION, IMAGES, MATRIX, RELIABILITY, MISTAKES}
GENERATOR = "GroupMixFormer test.py --report"  # what a page says that it was written by
_HEAD = 1024  # bytes of the page that say so


def check_report_folder(folder: Path) -> None:
    """Refuses a folder that a report cannot be written to, or that holds anything but an earlier report.

    Raises:
        UserError: If it does.
    """
    if not folder.parent.is_dir() or not os.access(folder.parent, os.W_OK | os.X_OK):
        raise UserError(f"--report {folder}: name a folder, new or not, in one that exists and can be written to")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--report {folder} is a file: name a folder")
    found = sorted(path.name for path in folder.iterdir())
    if others := [name for name in found if name not in _FILES]:
        raise UserError(f"--report {folder} holds what no report does ({listing(others)}): name another folder")
    if found and not _is_report(folder):
        raise UserError(f"--report {folder} holds no report of this program ({listing(found)}): name another folder")


def _is_report(folder: Path) -> bool:
    page = folder / PAGE
    if not page.is_file():
        return False
    with page.open("rb") as file:
        return GENERATOR.encode() in file.read(_HEAD)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Gives a folder beside a report's to write to, which takes its place in the end, or goes where anything fails.

    Raises:
        UserError: If it cannot be written. After this, any other error within, or a signal that ends the program, an
            earlier report is still there and nothing else.
    """
    folder = folder.resolve()
    try:
        with folder_beside(folder) as beside:
            new, earlier = beside / "new", beside / "earlier"
            new.mkdir()
            yield new
            check_report_folder(folder)  # again: scoring took its time
            try:
                if folder.exists():
                    folder.rename(earlier)
                new.rename(folder)
            except BaseException:  # the end of the program, too
                if earlier.exists() and not folder.exists():
                    earlier.rename(folder)
                raise
    except OSError as error:
        raise not_written(folder, error) from None
