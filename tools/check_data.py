"""Read every image of a data set before training on it, and report what must be mended.

Usage:
    python tools/check_data.py --data-path D
    python tools/check_data.py --data-path D --dataset tar --workers 16 --json report.json

Images are decoded as in training, so what passes here trains. To be mended are files that cannot be decoded, classes
that one split lacks or has no images of, and images of the validation split that the training split has too: the same
pixels, whatever the format and the metadata of their files.

Exit code: 0 if there is nothing to mend, 1 if there is, 2 if the command line is wrong or the data is not there.
"""

import argparse
import hashlib
import os
import sys
import tarfile
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.build import available_cores
from data.datasets import FolderSource, Source, open_split
from data.decoding import as_mode
from data.files import endings, files_below
from data.tar import INDEX, tar_files
from utils.checkpoint import write_json
from utils.cli import Parser, at_least, check_report, run
from utils.config import default_config
from utils.console import aligned, say
from utils.errors import UserError, reason

_DATASETS = ("folder", "tar")
_SMALL = 32  # pixels: an image below that on a side is mostly a thumbnail or stands for one that was removed
_CHUNK = 32  # images that a process reads at a time
_LINES = 10  # of each list that are printed

Size = tuple[int, int]  # (width, height)


class Decoded(NamedTuple):
    """What is kept of an image: a hash of its RGB pixels, its size, PIL's mode of its file."""

    pixels: bytes
    size: Size
    mode: str


class Decoder(Dataset):
    """The images of a source, decoded; in place of a broken one the cause, in one line."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Decoded | str:
        try:
            image, _ = self._source.read(index)
            mode, image = image.mode, as_mode(image, "RGB")
            pixels = hashlib.blake2b(image.tobytes(), digest_size=16, salt=b"%dx%d" % image.size)
        except UnidentifiedImageError:  # whose message says no more than the path
            return "not an image, or of a format that cannot be read"
        except Exception as error:  # decoders raise errors of every kind at garbage
            return getattr(error, "strerror", None) or reason(error)
        return Decoded(pixels.digest(), image.size, mode)


@dataclass
class Findings:
    """What the images of a split are found to be.

    Attributes:
        broken: The cause for each that cannot be decoded, by its index.
        sizes: The number of images of each size.
        modes: The number of images of each of PIL's modes.
        indices: The images that have the same pixels, by the hash of those.
    """

    broken: dict[int, str] = field(default_factory=dict)
    sizes: Counter[Size] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    indices: dict[bytes, list[int]] = field(default_factory=dict)


def read_split(name: str, source: Source, workers: int, among: Container[bytes] | None = None) -> Findings:
    """Reads all images of a split.

    Args:
        name: What to call the split beside the progress bar.
        source: The images.
        workers: Processes to read with.
        among: Hashes of the pixels that `indices` is kept for; of all if None.

    Raises:
        UserError: If one of the processes dies.
    """
    found = Findings()
    # A loader gives chunks in order and raises when a process dies; its processes end with this one, even if killed.
    loader_settings = {"batch_size": _CHUNK, "collate_fn": list, "worker_init_fn": _begin_worker}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of more processes than cores, which a slow disk may be worth
        try:
            chunks = DataLoader(Decoder(source), num_workers=workers, **loader_settings)
            images = chain.from_iterable(chunks)
            for index, image in enumerate(tqdm(images, name, len(source), unit=" images", disable=None)):
                if isinstance(image, str):
                    found.broken[index] = image
                    continue
                found.sizes[image.size] += 1
                found.modes[image.mode] += 1
                if among is None or image.pixels in among:
                    found.indices.setdefault(image.pixels, []).append(index)
        except RuntimeError as error:
            raise UserError(
                f"a process that reads {name} died ({reason(error).strip()}): try fewer --workers"
            ) from None
    return found


def _begin_worker(_worker: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Pillow warns and libtiff prints; the report says what is wrong


def open_source(dataset: str, root: Path, split: str) -> Source:
    """Opens a split.

    Raises:
        UserError: If there is none.
    """
    if dataset == "folder":
        return FolderSource(root / split, allow_empty=True)
    config = default_config()
    config.DATA.DATASET, config.DATA.DATA_PATH = dataset, str(root)
    return open_split(config, split, is_training=False)


def count_not_read(dataset: str, root: Path, split: str, source: Source) -> dict[str, int]:
    """Counts files that are no images by their suffix, or lie outside the class folders, by their suffix."""
    files = _tar_members(tar_files(root, split)) if dataset == "tar" else map(str, files_below(root / split))
    counts = endings(files) - endings(map(source.name, range(len(source))))
    return dict(sorted(counts.items()))


def _tar_members(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        with tarfile.open(path) as file:
            yield from (member.name for member in file if member.isfile() and member.name != INDEX)


def check_data(dataset: str, root: Path, train: str, val: str, workers: int) -> dict[str, Any]:
    """Reads a data set and says what was found, as --json writes it.

    Args:
        dataset: 'folder' or 'tar'.
        root: What holds the splits.
        train: Name of the training split.
        val: Name of the validation split.
        workers: Processes to read with.

    Raises:
        UserError: If a split is missing, or a process dies.
    """
    sources = {split: open_source(dataset, root, split) for split in (train, val)}
    in_val = read_split(val, sources[val], workers)  # first, so that only its hashes need to be kept
    in_train = read_split(train, sources[train], workers, among=in_val.indices)
    report: dict[str, Any] = {"data_path": str(root), "dataset": dataset}
    for key, split, found in (("train", train, in_train), ("val", val, in_val)):
        not_read = count_not_read(dataset, root, split, sources[split])
        report[key] = {"split": split, **_describe(sources[split], found), "not_read": not_read}
    for key, other in (("train", "val"), ("val", "train")):
        report[f"only_in_{key}"] = [name for name in report[key]["classes"] if name not in report[other]["classes"]]
    report["duplicates"] = [
        {
            "train": [sources[train].name(index) for index in in_train.indices[pixels]],
            "val": [sources[val].name(index) for index in indices],
        }
        for pixels, indices in in_val.indices.items()
        if pixels in in_train.indices
    ]
    report["to_mend"] = {
        "broken": len(in_train.broken) + len(in_val.broken),
        "only_in_one_split": len(report["only_in_train"] + report["only_in_val"]),
        "without_images": len(report["train"]["without_images"] + report["val"]["without_images"]),
        "in_both_splits": sum(len(pair["val"]) for pair in report["duplicates"]),
    }
    return report


def _describe(source: Source, found: Findings) -> dict[str, Any]:
    images = Counter(map(source.class_of, range(len(source))))
    classes = {name: images[name] for name in source.classes or []}
    by_area = sorted(found.sizes.elements(), key=lambda size: (size[0] * size[1], size))
    return {
        "images": len(source),
        "classes": classes,
        "without_images": [name for name, count in classes.items() if not count],
        "broken": [
            {"path": source.name(index), "class": source.class_of(index), "cause": cause}
            for index, cause in found.broken.items()
        ],
        "sizes": {
            name: by_area[place] if by_area else None  # (width, height)
            for name, place in (("smallest", 0), ("median", (len(by_area) - 1) // 2), ("largest", -1))
        },
        "small": sum(count for size, count in found.sizes.items() if min(size) < _SMALL),
        "modes": dict(found.modes.most_common()),
    }


def in_words(report: dict[str, Any]) -> str:
    """The report as lines to read: a table of both splits, the beginnings of the lists, what to do."""
    splits = [report["train"], report["val"]]
    train, val = (split["split"] for split in splits)
    lines = aligned(_table(splits), str.rjust)
    for split, key in ((train, "only_in_train"), (val, "only_in_val")):
        lines += _section(f"classes that only {split} has", [(name,) for name in report[key]])
    for split in splits:
        lines += _section(f"classes without images in {split['split']}", [(name,) for name in split["without_images"]])
    for split in splits:
        broken = [(file["path"], f"class {file['class']}", file["cause"]) for file in split["broken"]]
        lines += _section(f"broken files in {split['split']}", broken)
    pairs = [
        (name, "=", pair["train"][0] + (f" and {more} more" if (more := len(pair["train"]) - 1) else ""))
        for pair in report["duplicates"]
        for name in pair["val"]
    ]
    lines += _section(f"images of {val} that {train} has too", pairs)
    return "\n".join([*lines, "", _verdict(report["to_mend"])])


def _table(splits: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    def row(name: str, *cells: object) -> tuple[str, ...]:
        return name, *(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells)

    def rows_of(key: str, label: str) -> list[tuple[str, ...]]:
        names = list(dict.fromkeys(name for split in splits for name in split[key]))
        return [row(f"{label} {name}", *(split[key].get(name, 0) for split in splits)) for name in names]

    counts = [split["classes"].values() for split in splits]
    sizes = [
        row(f"{name} size", *("x".join(map(str, split["sizes"][name] or "-")) for split in splits))
        for name in ("smallest", "median", "largest")
    ]
    return [
        row("", *(split["split"] for split in splits)),
        row("classes", *map(len, counts)),
        row("images", *(split["images"] for split in splits)),
        row("fewest images of a class", *(min(of_class) for of_class in counts)),
        row("most images of a class", *(max(of_class) for of_class in counts)),
        row("broken files", *(len(split["broken"]) for split in splits)),
        *sizes,
        row(f"under {_SMALL} pixels on a side", *(split["small"] for split in splits)),
        *rows_of("modes", "mode"),
        *rows_of("not_read", "not read:"),
    ]


def _section(title: str, rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    rest = [f"  and {len(rows) - _LINES:,} more, which --json FILE writes"] if len(rows) > _LINES else []
    return ["", f"{title} ({len(rows):,}):", *("  " + line for line in aligned(rows[:_LINES])), *rest]


def _verdict(to_mend: dict[str, int]) -> str:
    names = {
        "broken": ("broken file", "broken files"),
        "only_in_one_split": ("class of one split only", "classes of one split only"),
        "without_images": ("class without images", "classes without images"),
        "in_both_splits": ("image in both splits", "images in both splits"),
    }
    parts = [f"{count:,} {names[key][count > 1]}" for key, count in to_mend.items() if count]
    total = sum(to_mend.values())
    things = f"{total:,} thing{'s' * (total > 1)}"
    return f"{things} to mend before training: {', '.join(parts)}" if parts else "nothing to mend"


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: If it is wrong.
    """
    parser = Parser(__doc__)
    parser.add_argument("--data-path", type=Path, required=True, metavar="DIR", help="folder that holds the splits")
    parser.add_argument("--dataset", default="folder", metavar="D", help="folder or tar (default folder)")
    parser.add_argument("--train-split", default="train", metavar="S", help="a folder, or a tar file's stem")
    parser.add_argument("--val-split", default="val", metavar="S", help="a folder, or a tar file's stem")
    parser.add_argument(
        "--workers", type=at_least(1), default=available_cores(), metavar="N", help="processes (default: one a core)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report there too")
    arguments = parser.parse_args()
    if arguments.dataset not in _DATASETS:
        raise UserError(f"--dataset {arguments.dataset}: only {' and '.join(_DATASETS)} can be checked, no streams")
    if arguments.train_split == arguments.val_split:
        raise UserError(f"--train-split and --val-split are both {arguments.val_split}: name two splits")
    check_report(arguments.json)
    return arguments


def main() -> None:
    """Parses, reads, reports."""
    arguments = parse()
    report = check_data(
        arguments.dataset, arguments.data_path, arguments.train_split, arguments.val_split, arguments.workers
    )
    say(in_words(report))
    if arguments.json:
        write_json(arguments.json, report)
    if any(report["to_mend"].values()):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
