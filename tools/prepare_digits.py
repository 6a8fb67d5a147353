"""Write scikit-learn's handwritten digits as an ImageNet-style folder, or as scenes to segment and to find digits in.

Usage:
    python tools/prepare_digits.py data-digits
    python tools/prepare_digits.py data-scenes --scenes
    python tools/prepare_digits.py data-scenes --scenes --png scenes.png

The 1,797 scans (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository) lie inside scikit-learn; nothing is
downloaded. Each class is split by itself: four fifths go to train/, one fifth to val/, the same ones every time.
Scenes are composed of the scans of their own split, and are written twice: as ADE20K's tree in ade/ and as COCO's
in coco/.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from utils.cli import Parser, check_report, run
from utils.errors import UserError, not_written

_VAL_IMAGES = 360
_SPLIT_SEED = 0
_WHITE = 16  # the scans count 0 to 16 inked pixels of 4 x 4
_SCENES = {"train": 2400, "val": 200}


def load_splits() -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """The scans, [1797, 8, 8] with ink at 255, their digits, and the numbers of those of each split."""
    images, labels = load_digits(return_X_y=True)
    indices = train_test_split(np.arange(len(labels)), test_size=_VAL_IMAGES, stratify=labels, random_state=_SPLIT_SEED)
    grey = np.rint(images.reshape(-1, 8, 8) * (255 / _WHITE)).astype(np.uint8)
    return grey, labels, dict(zip(("train", "val"), indices, strict=True))


def write_digits(root: Path) -> dict[str, int]:
    """Writes root/{train,val}/<digit>/<number>.png, 8 x 8 and grey.

    Returns:
        The number of images of each split.

    Raises:
        UserError: If they cannot be written.
    """
    images, labels, splits = load_splits()
    try:
        for split, numbers in splits.items():
            for number in numbers:
                folder = root / split / str(labels[number])
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[number]).save(folder / f"{number:04d}.png")
    except OSError as error:
        raise not_written(root, error) from None
    return {split: len(numbers) for split, numbers in splits.items()}


def write_all_scenes(root: Path, counts: dict[str, int]) -> dict[str, int]:
    """Writes scenes of both splits to root/{ade,coco}, in place of those that are there.

    Args:
        root: A folder that holds nothing else.
        counts: The number of scenes of each split.

    Returns:
        The number of digits in the scenes of each split.

    Raises:
        UserError: If the folder holds something else, or cannot be written.
    """
    from tools.datasets.appearing import appearing_whole
    from tools.datasets.scenes import Digits, are_scenes, write_scenes

    if root.exists() and not (root.is_dir() and (are_scenes(root) or not any(root.iterdir()))):
        raise UserError(f"{root} holds something else than scenes: name another folder")
    images, labels, splits = load_splits()
    with appearing_whole(root) as folder:
        digits = {
            split: write_scenes(folder, split, counts[split], Digits(images[numbers], labels[numbers], numbers))
            for split, numbers in splits.items()
        }
        if root.exists():
            shutil.rmtree(root.resolve())  # of a link the folder is replaced, and not the link
    return digits


def main() -> None:
    """Parses, writes, says what was written."""
    arguments = parse()
    root = arguments.root
    if arguments.scenes:
        digits = write_all_scenes(root, _SCENES)
        print(f"{root}: " + ", ".join(f"{_SCENES[split]} {split} scenes of {digits[split]} digits" for split in digits))
        if arguments.png:
            from tools.datasets.scenes_picture import draw_scenes

            draw_scenes(root, arguments.png)
    else:
        counts = write_digits(root)
        print(f"{root}: " + ", ".join(f"{count} images in {split}/" for split, count in counts.items()))


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: If it is wrong.
    """
    parser = Parser(__doc__)
    parser.add_argument("root", type=Path, help="folder to write to")
    parser.add_argument("--scenes", action="store_true", help="compose scenes, with masks and boxes")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw a few of the scenes")
    arguments = parser.parse_args()
    if arguments.png and not arguments.scenes:
        raise UserError("--png draws scenes: add --scenes")
    check_report(arguments.png, "--png", ".png")
    return arguments


if __name__ == "__main__":
    run(main)
