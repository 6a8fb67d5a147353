"""Files and folders below a place, and images by their paths, without classes."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import NoReturn, TypeVar

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import UserError

Item = TypeVar("Item")

_NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that PIL knows by name only


def image_suffixes() -> set[str]:
    """The endings of files that PIL or torchvision takes for images, in lower case."""
    Image.init()
    known = Image.registered_extensions().items()
    readable = {suffix for suffix, form in known if form in Image.OPEN and form not in _NOT_DECODED}
    return readable | set(IMG_EXTENSIONS)


def find_images(places: Sequence[Path]) -> list[Path]:
    """Image files in the order in which they or their folders are named, those of a folder in the order of their paths.

    Args:
        places: Files, of any ending, and folders, which are searched with all folders below them.

    Returns:
        The paths, each once.

    Raises:
        UserError: If a place does not exist or cannot be read, or a folder holds no images.
    """
    suffixes, found = image_suffixes(), []
    for place in places:
        try:
            if place.is_file():
                found.append(place)
                continue
            if not place.exists():
                raise UserError(f"{place} does not exist: name images, or folders that hold some")
        except OSError as error:
            _refuse(error)
        images = [path for path in sorted(files_below(place)) if path.suffix.lower() in suffixes]
        if not images:
            raise UserError(f"{place} holds no images: name images, or folders that hold some")
        found += images
    return list(dict.fromkeys(found))


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """So many of them at most, evenly spread."""
    count = min(len(items), most)
    return [items[number * len(items) // count] for number in range(count)]


def folders_in(root: Path) -> list[str]:
    """The names of the folders in a folder, sorted.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError as error:
        _refuse(error)


def files_below(root: Path) -> Iterator[Path]:
    """The files in a folder and in all folders below it, as `walk` finds them."""
    return (Path(folder, name) for folder, names in walk(root) for name in names)


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """A folder and all folders below it, also by way of links, each with the names of its files.

    Raises:
        UserError: If one of the folders cannot be read.
    """
    for folder, folders, names in os.walk(root, onerror=_refuse, followlinks=True):
        above = {Path(folder).resolve(), *Path(folder).resolve().parents}
        # A link to a folder that it is in would be followed again and again.
        folders[:] = [name for name in folders if Path(folder, name).resolve() not in above]
        yield folder, names


def endings(names: Iterable[str]) -> Counter[str]:
    """How many names have each ending, in lower case; '(none)' stands for none."""
    return Counter(PurePath(name).suffix.lower() or "(none)" for name in names)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): mend it or leave it out") from None


class FileSource:
    """Images by their paths, for `ImageSamples`; their class numbers are all 0 and mean nothing."""

    classes: list[str] | None = None

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Opens a file."""
        return Image.open(self._paths[index]), 0

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self._paths[index])

    def class_of(self, _index: int) -> str | None:
        """Not known."""
        return None
