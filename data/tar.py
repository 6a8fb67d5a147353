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
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import UserError, reason

INDEX = ".index.json"  # the first member of a packed file
_MOST_OPEN = 64  # files: systems refuse a process more than about a thousand
_CHUNK = 1 << 20

Member = tuple[str, int, int]  # (name, where its content begins, size)


class _Contents(NamedTuple):
    """What a tar file holds: its images, whether an index told them, and which file it was."""

    members: list[Member]
    is_indexed: bool
    identity: tuple[int, ...]


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
        files = [_contents(path) for path in self._paths]
        places = {
            name: (number, offset, size) for number, file in enumerate(files) for name, offset, size in file.members
        }
        if not places:
            raise UserError(f"{self._paths[0]} holds no images in class folders: pack the folder that holds those")
        if not all(file.is_indexed for file in files):
            _check_top(self._paths[0], {name.rpartition("/")[0] for name in places})
        self._identities = [file.identity for file in files]
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
        file, content = self._file(number).fileno(), b""
        # Loader processes share the file and its position, which this neither uses nor moves.
        while part := os.pread(file, size - len(content), offset + len(content)):
            content += part
        if len(content) < size:
            raise OSError(f"{self._paths[number]} ends within it")
        return content

    def _file(self, number: int) -> BinaryIO:
        file = self._open.pop(number, None) or self._opened(number)
        self._open[number] = file  # in the order of their last use
        if len(self._open) > _MOST_OPEN:
            self._open.pop(next(iter(self._open))).close()
        return file

    def _opened(self, number: int) -> BinaryIO:
        file = self._paths[number].open("rb", buffering=0)
        if _identity(file) != self._identities[number]:
            file.close()
            raise OSError(f"{self._paths[number]} was replaced since this run began")
        return file

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
    counted = re.compile(rf"{re.escape(split)}-\d{{5,}}-of-(\d{{5,}})\.tar")
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


def _contents(path: Path) -> _Contents:
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as file:
            first = file.next()
            is_indexed = first is not None and first.name == INDEX
            members = _indexed(file, first) if is_indexed else list(_scanned(file, first))
            return _Contents(members, is_indexed, _identity(file.fileobj))
    except (tarfile.TarError, OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} cannot be opened ({reason(error)}): copy or pack it again") from None


def _identity(file: BinaryIO) -> tuple[int, ...]:
    """What tells an open file from another that takes its place later."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _indexed(file: tarfile.TarFile, first: tarfile.TarInfo) -> list[Member]:
    index = json.loads(file.extractfile(first).read())
    start = first.offset_data - -first.size // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    *_, last = members = [
        (name, start + offset, size)
        for name, offset, size in zip(index["names"], index["offsets"], index["sizes"], strict=True)
    ]
    file.fileobj.seek(last[1] - tarfile.BLOCKSIZE)
    header = tarfile.TarInfo.frombuf(file.fileobj.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    is_last = header.size == last[2] and _bytes(last[0]).startswith(_bytes(header.name))
    if os.fstat(file.fileobj.fileno()).st_size != start + index["size"] or not is_last:
        raise tarfile.TarError("it is not as long or not as ordered as when it was packed")
    return members


def _bytes(name: str) -> bytes:
    """As a header holds it, where a long name's end may cut a character in two."""
    return name.encode("utf-8", "surrogateescape")


def _scanned(file: tarfile.TarFile, first: tarfile.TarInfo | None) -> Iterator[Member]:
    for member in chain([first] if first else [], iter(file.next, None)):
        file.members.clear()  # which would hold all headers
        name = member.name.removeprefix("./").lstrip("/")  # as it would be unpacked
        if not _is_image(name):
            continue
        if not member.isreg() or member.issparse():
            raise tarfile.TarError(f"{name} is a link or sparse, and a folder would have its content")
        yield name, member.offset_data, member.size
    _check_end(file)


def _check_end(file: tarfile.TarFile) -> None:
    """Refuses what tarfile takes for the end of an archive where only zeros, of which a tar file has some, are one."""
    file.fileobj.seek(file.offset)
    length = 0
    while chunk := file.fileobj.read(_CHUNK):
        length += len(chunk)
        if chunk.count(0) < len(chunk):
            raise tarfile.TarError(f"it is damaged at byte {file.offset:,}")
    if length < tarfile.BLOCKSIZE:
        raise tarfile.TarError(f"it is cut off at byte {file.offset:,}")


def _check_top(path: Path, folders: set[str]) -> None:
    common = os.path.commonpath(folders)
    if common and ("/" in common or common not in folders):
        raise UserError(
            f"{path}: all images lie below {common}/, and not the class folders themselves at the top: "
            "pack the folder that holds those"
        )


def _is_image(name: str) -> bool:
    """Whether `FolderSource` would read it: in a class's folder, with an ending that it knows."""
    return "/" in name and name.lower().endswith(IMG_EXTENSIONS)


def _class_of(name: str) -> str:
    return name.partition("/")[0]


def _place_in_folder(name: str) -> tuple[str, str, str]:
    """What `FolderSource` sorts by: the class, the folder inside it, the file."""
    folder, _, file = name.rpartition("/")
    return _class_of(name), folder, file
