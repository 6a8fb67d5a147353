"""Split one folder of class folders into training and validation images: once, or into folds for cross-validation.

Usage:
    python tools/split_dataset.py --data-path D --output O --val-share 0.2
    python tools/split_dataset.py --data-path D --output O --folds 5
    python tools/split_dataset.py --data-path D --output O --folds 5 --group-by 'patient(\\d+)'

D holds D/<class>/**/<image>. O gets train/ and val/, or fold0/train/, fold0/val/, fold1/train/ and so on, where every
image is in val/ of one fold and in train/ of all others. Every class is divided as evenly as its images allow, and the
same images are divided in the same way every time. Files that are equal bit for bit stay on one side, and so do those
that --group-by gives one name: what its first parenthesis, or else all of it, finds in the path below D.

D is only read. O appears whole or not at all, and split.csv in it tells where each image went.
"""

import argparse
import csv
import hashlib
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Hashable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from data.datasets import FolderSource
from data.files import endings, files_below
from tools.datasets.ahead import ahead
from tools.datasets.appearing import appearing_whole, check_free
from tools.datasets.splitting import deal, join
from utils.cli import Parser, at_least, run
from utils.errors import UserError, listing

_MODES = {"symlink": os.symlink, "hardlink": os.link, "copy": shutil.copy2}


def groups_by_name(names: list[str], pattern: re.Pattern[str]) -> list[str]:
    """What a pattern finds in each name.

    Raises:
        UserError: Naming files in which it finds nothing.
    """
    found = [pattern.search(name) for name in names]
    without = [name for name, match in zip(names, found, strict=True) if not match]
    if without:
        raise UserError(f"--group-by finds nothing in {len(without)} name(s) ({listing(without)}): mend the pattern")
    return [next((part for part in match.groups() if part is not None), match[0]) for match in found if match]


def content_keys(paths: list[str]) -> list[Hashable]:
    """A key for each file; two files have the same key exactly if their bytes are equal.

    Raises:
        UserError: Naming files that cannot be read.
    """
    sizes = list(tqdm(ahead(_size, paths), "looking", len(paths), unit=" files", disable=None))
    unreadable = [path for path, size in zip(paths, sizes, strict=True) if size is None]
    if unreadable:
        raise UserError(f"{len(unreadable)} file(s) cannot be read ({listing(unreadable)}): mend or remove them")
    common = Counter(sizes)
    alike = [path for path, size in zip(paths, sizes, strict=True) if common[size] > 1]
    hashes = tqdm(ahead(_hash, alike), "comparing files of one size", len(alike), unit=" files", disable=None)
    by_path = dict(zip(alike, hashes, strict=True))
    return [by_path.get(path, path) for path in paths]


def _size(path: str) -> int | None:
    file = Path(path)
    return file.stat().st_size if file.is_file() and os.access(file, os.R_OK) else None


def _hash(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def write_split(root: Path, names: list[str], is_val: list[bool], mode: str, output: Path) -> None:
    """Makes output/{train,val}/<class>/**/<image>.

    Args:
        root: The folder of the images.
        names: Their paths in it.
        is_val: Whether each is for validation.
        mode: 'symlink', 'hardlink' or 'copy'.
        output: Where to.
    """
    for name, in_val in zip(tqdm(names, output.name, unit=" files", disable=None), is_val, strict=True):
        place = output / ("val" if in_val else "train") / name
        place.parent.mkdir(parents=True, exist_ok=True)
        _MODES[mode]((root / name).resolve(), place)


def write_table(path: Path, names: list[str], classes: list[str], groups: list[int], sides: list[str]) -> None:
    """Writes where each image went, and the first image of its group."""
    with open(path, "w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "class", "first_of_group", "side"))
        for name, of_class, group, side in zip(names, classes, groups, sides, strict=True):
            writer.writerow((name, of_class, names[group], side))


def check_output(root: Path, output: Path) -> None:
    """Refuses a place that is taken, in no folder, or inside the images.

    Raises:
        UserError: If it is.
    """
    check_free(output)
    if output.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--output {output} lies in --data-path {root}, where it would be a class: name another")


def in_words(classes: list[str], sides: list[str], names: list[str]) -> str:
    """Of each split, how many images it has and how many there are of its rarest and of its most frequent class."""
    lines = [f"{'':8}  {'train':>9}  {'val':>9}  of a class in val"]
    for side in names:
        per_class = Counter(of_class for of_class, at in zip(classes, sides, strict=True) if at == side)
        in_val = per_class.total()
        least, most = min(per_class.values()), max(per_class.values())
        lines.append(f"{side:8}  {len(classes) - in_val:9,}  {in_val:9,}  {least:,} to {most:,}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: If it is wrong.
    """
    parser = Parser(__doc__)
    parser.add_argument(
        "--data-path", type=Path, required=True, metavar="D", help="folder with a folder for each class"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="O", help="folder to make")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--folds", type=at_least(2), metavar="K", help="folds for cross-validation")
    kind.add_argument("--val-share", type=float, metavar="S", help="share of the images held out, such as 0.2")
    parser.add_argument("--mode", choices=_MODES, default="symlink", help="how files get there (default symlink)")
    parser.add_argument("--group-by", metavar="REGEX", help="images whose paths give the same name stay together")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another one divides otherwise (default 0)")
    arguments = parser.parse_args()
    if arguments.val_share is not None and not 0 < arguments.val_share < 1:
        raise UserError(f"--val-share {arguments.val_share}: give a share between 0 and 1")
    try:
        arguments.group_by = re.compile(arguments.group_by) if arguments.group_by else None
    except re.error as error:
        raise UserError(f"--group-by {arguments.group_by}: {error}: give a regular expression") from None
    check_output(arguments.data_path, arguments.output)
    return arguments


def main() -> None:
    """Parses, looks, divides, writes, says what came of it."""
    arguments = parse()
    root, output, folds = arguments.data_path, arguments.output, arguments.folds
    source = FolderSource(root)
    if {"train", "val"} <= set(source.classes):
        raise UserError(
            f"{root} is split already, into train/ and val/: train on it as it is, or name the folder that holds the "
            f"class folders, such as {root / 'train'}"
        )
    paths = [source.name(index) for index in range(len(source))]
    names = [os.path.relpath(path, root) for path in paths]
    classes = [source.class_of(index) or "" for index in range(len(source))]
    keys = [[key] for key in content_keys(paths)]
    duplicates = len(keys) - len({key for (key,) in keys})
    if arguments.group_by:
        for of_image, group in zip(keys, groups_by_name(names, arguments.group_by), strict=True):
            of_image.append(("group", group))
    groups = join(keys)
    shares = [1 / folds] * folds if folds else [1 - arguments.val_share, arguments.val_share]
    splits = [f"fold{number}" for number in range(folds)] if folds else ["train", "val"]
    sides = [splits[number] for number in deal(names, classes, groups, shares, arguments.seed)]
    places = {split: split for split in splits} if folds else {"val": ""}  # of what each one is the validation side
    with appearing_whole(output) as folder:
        for split, place in places.items():
            write_split(root, names, [side == split for side in sides], arguments.mode, folder / place)
        write_table(folder / "split.csv", names, classes, groups, sides)
    print(in_words(classes, sides, list(places)))
    if duplicates:
        print(f"{duplicates:,} image(s) equal others bit for bit: each on the side of its equals")
    if left_out := endings(map(str, files_below(root))) - endings(paths):
        of_each = ", ".join(f"{ending} {count:,}" for ending, count in sorted(left_out.items()))
        print(f"{left_out.total():,} file(s) left out, no images by their endings or in no class folder: {of_each}")
    first = shlex.quote(str(output / "fold0" if folds else output))
    print(f"train on it with --data-path {first} --opts MODEL.GMA.NUM_CLASSES {len(source.classes)}")


if __name__ == "__main__":
    run(main)
