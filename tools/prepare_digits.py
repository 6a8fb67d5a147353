"""Write scikit-learn's handwritten digits as an ImageNet-style folder.

Usage:
    python tools/prepare_digits.py data-digits

The 1,797 scans (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository) lie inside scikit-learn; nothing is
downloaded. Each class is split by itself: four fifths go to train/, one fifth to val/, the same ones every time.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

_VAL_IMAGES = 360
_SPLIT_SEED = 0
_WHITE = 16  # the scans count 0 to 16 inked pixels of 4 x 4


def write_digits(root: Path) -> dict[str, int]:
    """Writes root/{train,val}/<digit>/<number>.png, 8 x 8 and grey.

    Returns:
        The number of images of each split.
    """
    images, labels = load_digits(return_X_y=True)
    indices = train_test_split(np.arange(len(labels)), test_size=_VAL_IMAGES, stratify=labels, random_state=_SPLIT_SEED)
    counts = {}
    for split, numbers in zip(("train", "val"), indices, strict=True):
        for number in numbers:
            folder = root / split / str(labels[number])
            folder.mkdir(parents=True, exist_ok=True)
            grey = np.rint(images[number].reshape(8, 8) * (255 / _WHITE)).astype(np.uint8)
            Image.fromarray(grey).save(folder / f"{number:04d}.png")
        counts[split] = len(numbers)
    return counts


def main() -> None:
    """Parses, writes, says what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder to write to")
    root = parser.parse_args().root
    counts = write_digits(root)
    print(f"{root}: " + ", ".join(f"{count} images in {split}/" for split, count in counts.items()))


if __name__ == "__main__":
    main()
