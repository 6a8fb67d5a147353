"""What packed data sets consist of: tar files of whole folders, or WebDataset shards of shuffled images.

Files come out equal, byte for byte, whenever the same images are packed: their members have no times and no owners.
"""

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path, PurePath
from typing import NamedTuple
from zlib import crc32

from data.tar import INDEX, TarSource, file_names, write_index
from tools.datasets.ahead import ahead
from utils.errors import UserError

FORMS = ("tar", "wds")
_END = bytes(2 * tarfile.BLOCKSIZE)

NameAndTarget = tuple[str, int]  # (path of the file and name in it, class number)


class Sample(NamedTuple):
    """An image: its number in the folder's order, its path inside the split, its class number and its bytes."""

    index: int
    name: str
    target: int
    size: int


class Shard(NamedTuple):
    """A file to be written: its name, its images, what lies in front of them, and its bytes."""

    name: str
    samples: list[Sample]
    front: bytes
    size: int


def plan(form: str, split: str, samples: Sequence[Sample], shard_size: int | None, least: int = 1) -> list[Shard]:
    """Deals the images of a split out to files, in the order given.

    Args:
        form: One of `FORMS`.
        split: Its name.
        samples: The images.
        shard_size: Bytes of a file, about; None for one file.
        least: Files, about, where that makes them smaller and there are so many images.
    """
    rooms = [sum(map(_room, _headers(form, sample))) for sample in samples]
    total = sum(rooms)
    count = max(-(-total // shard_size) if shard_size else 1, min(least, len(samples)))
    placed = zip(samples, accumulate(rooms, initial=0), strict=False)
    groups = [[sample for sample, _ in group] for _, group in groupby(placed, lambda place: place[1] * count // total)]
    names = file_names(split, len(groups)) if form == "wds" or len(groups) > 1 else [f"{split}.tar"]
    return [_shard(form, name, group) for name, group in zip(names, groups, strict=True)]


def _shard(form: str, name: str, samples: list[Sample]) -> Shard:
    members, end = [], 0
    for sample in samples:
        for header in _headers(form, sample):
            end += _room(header)
            members.append((header.name, end - _padded(header.size), header.size))
    size, front = end + len(_END), b""
    if form == "tar":
        index = write_index(members, size)
        front = _member(_header(INDEX, len(index)), index)
    return Shard(name, samples, front, len(front) + size)


def write(form: str, folder: Path, source: Path, shard: Shard) -> Iterator[int]:
    """Writes a file; gives the checksum of each image's bytes.

    Args:
        form: One of `FORMS`.
        folder: Where to write.
        source: The folder of the split.
        shard: What to write.

    Raises:
        UserError: If an image cannot be read.
        OSError: If the file cannot be written.
    """
    with (folder / shard.name).open("xb") as file:
        file.write(shard.front)
        contents = ahead(lambda sample: _content(source, sample), shard.samples)
        for sample, content in zip(shard.samples, contents, strict=True):
            parts = (content, str(sample.target).encode())
            file.writelines(map(_member, _headers(form, sample), parts))
            yield crc32(content)
        file.write(_END)
        file.flush()
        os.fsync(file.fileno())


def read_back(form: str, folder: Path, split: str, shards: Sequence[Shard]) -> Iterator[tuple[NameAndTarget, int]]:
    """The images in the files of a split, as training reads them, and the checksums of their bytes."""
    if form == "tar":
        source = TarSource(folder, split)
        number = {name: number for number, name in enumerate(source.classes or [])}
        for index in range(len(source)):
            yield (source.name(index), number[source.class_of(index)]), crc32(source.content(index))
        return
    for shard in shards:
        with tarfile.open(folder / shard.name, "r:", encoding="utf-8") as file:
            while image := file.next():
                label = file.next()
                content, target = (file.extractfile(member).read() for member in (image, label))
                yield (f"{folder / shard.name}/{image.name}", int(target)), crc32(content)
                file.members.clear()  # which would hold all headers


def names_and_targets(form: str, folder: Path, shards: Iterable[Shard]) -> Iterator[NameAndTarget]:
    """The images that the files of a split are to hold, as `read_back` calls them."""
    for shard in shards:
        for sample in shard.samples:
            yield f"{folder / shard.name}/{_headers(form, sample)[0].name}", sample.target


def write_info(folder: Path, classes: list[str], splits: dict[str, list[Shard]]) -> None:
    """Writes _info.json, which tells timm the splits of WebDataset shards, and this code their classes."""
    info = {
        split: {
            "name": split,
            "num_samples": sum(len(shard.samples) for shard in shards),
            "filenames": [shard.name for shard in shards],
            "shard_lengths": [len(shard.samples) for shard in shards],
        }
        for split, shards in splits.items()
    }
    (folder / "_info.json").write_text(json.dumps({"splits": info, "classes": classes}, indent=1) + "\n")


def _content(source: Path, sample: Sample) -> bytes:
    path = source / sample.name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend or remove it") from None
    if len(content) != sample.size:
        raise UserError(f"{path} changed while it was packed: pack again when nothing writes there")
    return content


def _headers(form: str, sample: Sample) -> list[tarfile.TarInfo]:
    if form == "tar":
        return [_header(sample.name, sample.size)]
    suffix = PurePath(sample.name).suffix.lower()
    ending = suffix if suffix in (".png", ".webp") else ".jpg"  # timm asks for these; the content tells what it is
    key = f"{sample.index:08d}"
    return [_header(f"{key}{ending}", sample.size), _header(f"{key}.cls", len(str(sample.target)))]


def _header(name: str, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size = size
    return header


def _member(header: tarfile.TarInfo, content: bytes) -> bytes:
    return _encoded(header) + content + bytes(_padded(header.size) - header.size)


def _encoded(header: tarfile.TarInfo) -> bytes:
    return header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _room(header: tarfile.TarInfo) -> int:
    return len(_encoded(header)) + _padded(header.size)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
