"""Pack an ImageNet folder into a few large files, for file systems that are slow at many small ones.

Usage:
    python tools/pack_dataset.py --data-path D --output P
    python tools/pack_dataset.py --data-path D --output P --shard-size 4G
    python tools/pack_dataset.py --data-path D --output P --form wds

`tar` (the default) is read with random access: training on P is training on D, bit for bit, with the same order,
augmentation, scores and resumption. `wds` writes WebDataset shards, which are streamed and shuffled through a buffer;
they hold the images in a random order, so that the buffer sees all classes.

Files are packed as they are, broken images too: find those first, with tools/check_data.py. P appears once all that is
in it was read back and found equal; kill -9 leaves P.part to be removed.
"""

import argparse
import os
import re
import shlex
import shutil
import sys
from array import array
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from stat import S_ISREG

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from data.datasets import FolderSource, check_same_classes
from tools.datasets.ahead import ahead
from tools.datasets.appearing import appearing_whole, check_free
from tools.datasets.packing import FORMS, Sample, Shard, names_and_targets, plan, read_back, write, write_info
from utils.cli import Parser, run
from utils.errors import UserError, listing
from utils.seeding import number_for

_SPLITS = ("train", "val")
_WDS_SHARD = 128 << 20  # bytes: over a thousand shards for ImageNet, enough for all loader processes of a large run
_WDS_LEAST = 64  # training shards of small data sets, of which each loader process needs one too
_UNITS = {unit: 1024**power for power, unit in enumerate(("", "K", "M", "G", "T"))}


def find_samples(folder: Path, source: FolderSource) -> list[Sample]:
    """The images of a split, in its order.

    Args:
        folder: The split's.
        source: What reads it.

    Raises:
        UserError: Naming files that cannot be packed.
    """
    paths = [source.name(index) for index in range(len(source))]
    numbers = {name: number for number, name in enumerate(source.classes)}
    samples, refused = [], []
    found = tqdm(ahead(_size_or_complaint, paths), f"{folder.name}: looking", len(paths), unit=" files", disable=None)
    for index, size in enumerate(found):
        if isinstance(size, str):
            refused.append(f"{paths[index]}: {size}")
            continue
        name = paths[index].removeprefix(f"{folder}{os.sep}")
        samples.append(Sample(index, name, numbers[source.class_of(index)], size))
    if refused:
        raise UserError(f"{len(refused)} file(s) cannot be packed ({listing(refused)}): mend or remove them")
    return samples


def _size_or_complaint(path: str) -> int | str:
    try:
        status = Path(path).stat()
    except OSError as error:
        return error.strerror
    if not S_ISREG(status.st_mode):
        return "no file"
    if not os.access(path, os.R_OK):
        return "no permission to read it"
    return status.st_size or "empty"


def pack(form: str, source: Path, folder: Path, shards: list[Shard]) -> None:
    """Writes a split's files and reads them back.

    Args:
        form: How.
        source: The folder of the split.
        folder: Where to.
        shards: What.

    Raises:
        UserError: If an image cannot be read, or reads back otherwise than it was written.
        OSError: If the files cannot be written.
    """
    count = sum(len(shard.samples) for shard in shards)
    bar = partial(tqdm, total=count, unit=" images", disable=None)
    written = chain.from_iterable(write(form, folder, source, shard) for shard in shards)
    checksums = array("L", bar(written, f"{source.name}: packing"))
    wanted = zip(names_and_targets(form, folder, shards), checksums, strict=True)
    found = bar(read_back(form, folder, source.name, shards), f"{source.name}: reading back")
    for image, other in zip_longest(found, wanted):
        if image != other:
            name = (other or image)[0][0]
            raise UserError(f"{name} does not read back as it was written: check the disk and pack again")


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: If it is wrong.
    """
    parser = Parser(__doc__)
    parser.add_argument("--data-path", type=Path, required=True, metavar="D", help="folder that holds train/ and val/")
    parser.add_argument("--output", type=Path, required=True, metavar="P", help="folder to make")
    parser.add_argument("--form", choices=FORMS, default="tar", help="random access, or a stream (default tar)")
    parser.add_argument(
        "--shard-size",
        metavar="BYTES",
        help="of a file, about, such as 4G (default: tar one file a split, wds 128M or less for 64 training shards)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order in wds shards (default 0)")
    arguments = parser.parse_args()
    if arguments.shard_size is not None:
        arguments.shard_size = _bytes(arguments.shard_size)
    check_free(arguments.output)
    return arguments


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([1-9]\d*)([KMGT]?)", text.upper())
    if not found:
        raise UserError(f"--shard-size {text}: give a number of bytes such as 500M or 4G")
    return int(found[1]) * _UNITS[found[2]]


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 2**30:.2f} GiB free, but {needed / 2**30:.2f} GiB must fit: "
            "free some space or name another --output"
        )


def main() -> None:
    """Parses, looks, packs, says how to train on it."""
    arguments = parse()
    form, root, output = arguments.form, arguments.data_path, arguments.output
    sources = {split: FolderSource(root / split) for split in _SPLITS}
    classes = sources["train"].classes
    check_same_classes(classes, sources["val"].classes)
    splits = {}
    for split, source in sources.items():
        samples = find_samples(root / split, source)
        if form == "wds":
            Random(number_for(arguments.seed, f"packing {split}")).shuffle(samples)
        size, least = arguments.shard_size, 1
        if form == "wds" and size is None:
            size, least = _WDS_SHARD, _WDS_LEAST if split == "train" else 1
        splits[split] = plan(form, split, samples, size, least)
    _check_space(output.resolve().parent, sum(shard.size for shards in splits.values() for shard in shards))
    with appearing_whole(output) as folder:
        for split, shards in splits.items():
            pack(form, root / split, folder, shards)
        if form == "wds":
            write_info(folder, classes, splits)
    for split, shards in splits.items():
        images, size = sum(len(shard.samples) for shard in shards), sum(shard.size for shard in shards)
        print(f"{split}: {images:,} images in {len(shards):,} file(s), {size / 2**20:,.1f} MiB, read back and equal")
    name = "tar" if form == "tar" else "wds/"
    print(f"train on it with --data-path {shlex.quote(str(output))} --opts DATA.DATASET {name}")
    if form == "wds":
        most = len(splits["train"])
        processes = f"{most:,} loader process{'es' * (most > 1)}"
        print(f"with at most {processes} on all ranks together (DATA.NUM_WORKERS a rank)")


if __name__ == "__main__":
    run(main)
