"""ImageNet folders in tar files, read with random access.

timm's reader of tar files numbers classes and samples in another order than a folder has them, knows them by the last
of nested folders, leaves out some kinds of images, reads a whole file to open it, and keeps a pickle of its members
beside it. Here a tar file is the folder that was packed into it. Opening one reads the headers of its members, or the
index that `tools/pack_dataset.py` puts in front of them.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import UserError, reason

INDEX = ".index.json"  # the first member of a packed file

Member = tuple[str, int, int]  # (name, where its content begins, size)


class TarSource:
    """The images of a split, with the indices, classes and class numbers that `FolderSource` gives the folder.

    Args:
        root: What holds <split>.tar or <split>-<number>-of-<count>.tar, class folders inside.
        split: The split.

    Raises:
        UserError: If a file is missing or damaged, or there are no images in class folders.
    """

    def __init__(self, root: Path, split: str) -> None:
        self._paths = tar_files(root, split)
        places = {
            name: (number, offset, size)
            for number, path in enumerate(self._paths)
            for name, offset, size in _members(path)
        }
        if not places:
            raise UserError(f"{self._paths[0]} holds no images in class folders: pack the folder that holds those")
        self._names = sorted(places, key=_place_in_folder)
        self.classes: list[str] | None = sorted({_class_of(name) for name in self._names})
        numbers = {name: number for number, name in enumerate(self.classes)}
        # Arrays, as reading an object would copy its page of memory into every loader's process.
        self._targets = np.array([numbers[_class_of(name)] for name in self._names])
        self._places = np.array([places[name] for name in self._names])
        self._open: dict[int, BinaryIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a process that is handed a copy opens the files itself

    def __len__(self) -> int:
        return len(self._names)

    def content(self, index: int) -> bytes:
        """The bytes of an image's file.

        Raises:
            OSError: If they cannot be read.
        """
        number, offset, size = self._places[index].tolist()
        if number not in self._open:
            self._open[number] = self._paths[number].open("rb", buffering=0)
        # Loader processes share the file and its position, which this neither uses nor moves.
        content = os.pread(self._open[number].fileno(), size, offset)
        if len(content) < size:
            raise OSError(f"{self._paths[number]} ends within it")
        return content

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Opens an image."""
        return Image.open(io.BytesIO(self.content(index))), int(self._targets[index])

    def name(self, index: int) -> str:
        """The path of the tar file, and within it the image's."""
        return f"{self._paths[self._places[index, 0]]}/{self._names[index]}"

    def class_of(self, index: int) -> str | None:
        """The name of its class's folder."""
        return _class_of(self._names[index])


def tar_files(root: Path, split: str) -> list[Path]:
    """The tar files of a split.

    Raises:
        UserError: If there are none, or some are missing.
    """
    whole = root / f"{split}.tar"
    if whole.is_file():
        return [whole]
    counted = re.compile(rf"{re.escape(split)}-\d+-of-(\d+)\.tar")
    counts = [int(found[1]) for path in root.glob("*.tar") if (found := counted.fullmatch(path.name))]
    if not counts:
        raise UserError(f"{whole} does not exist: DATA.DATASET tar needs a tar file of class folders for each split")
    paths = [root / name for name in file_names(split, max(counts))]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{missing[0]} does not exist, one of {len(paths)} files of a split: copy all of them")
    return paths


def file_names(split: str, count: int) -> list[str]:
    """What the files of a split that is packed into several are called."""
    return [f"{split}-{number:05d}-of-{count:05d}.tar" for number in range(count)]


def write_index(members: list[Member], size: int) -> bytes:
    """The index of a tar file's members.

    Args:
        members: Their places, counted from the end of the index, whose own length depends on what it says.
        size: Bytes of the file after the index.
    """
    names, offsets, sizes = zip(*members, strict=True)
    return json.dumps({"size": size, "names": names, "offsets": offsets, "sizes": sizes}).encode()


def _members(path: Path) -> Iterator[Member]:
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as file:
            first = file.next()
            yield from _indexed(path, file, first) if first and first.name == INDEX else _scanned(file, first)
    except (tarfile.TarError, OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} cannot be opened ({reason(error)}): copy or pack it again") from None


def _indexed(path: Path, file: tarfile.TarFile, first: tarfile.TarInfo) -> Iterator[Member]:
    index = json.loads(file.extractfile(first).read())
    start = first.offset_data - -first.size // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    *_, last = members = [
        (name, start + offset, size)
        for name, offset, size in zip(index["names"], index["offsets"], index["sizes"], strict=True)
    ]
    file.fileobj.seek(last[1] - tarfile.BLOCKSIZE)
    header = tarfile.TarInfo.frombuf(file.fileobj.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    if path.stat().st_size != start + index["size"] or header.size != last[2] or not last[0].startswith(header.name):
        raise tarfile.TarError("it is not as long or not as ordered as when it was packed")
    return iter(members)


def _scanned(file: tarfile.TarFile, first: tarfile.TarInfo | None) -> Iterator[Member]:
    folders = set()
    for member in chain([first] if first else [], iter(file.next, None)):
        file.members.clear()  # which would hold all headers
        name = member.name.removeprefix("./")
        if not _is_image(name):
            continue
        if not member.isreg() or member.issparse():
            raise tarfile.TarError(f"{name} is a link or sparse, and a folder would have its content")
        folders.add(name.rpartition("/")[0])
        yield name, member.offset_data, member.size
    common = os.path.commonpath(folders or [""])
    if common and ("/" in common or common not in folders):
        raise tarfile.TarError(f"all images lie below {common}/, and not the class folders themselves at the top")


def _is_image(name: str) -> bool:
    """Whether `FolderSource` would read it: in a class's folder, with an ending that it knows."""
    return "/" in name and name.lower().endswith(IMG_EXTENSIONS)


def _class_of(name: str) -> str:
    return name.partition("/")[0]


def _place_in_folder(name: str) -> tuple[str, str, str]:
    """What `FolderSource` sorts by: the class, the folder inside it, the file."""
    folder, _, file = name.rpartition("/")
    return _class_of(name), folder, file
