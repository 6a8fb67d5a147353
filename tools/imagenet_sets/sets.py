"""The sets that an ImageNet-1K network is scored on beside its own validation images: classes, labels, folders.

A class's *number* is its place among ImageNet-1K's 1000 synsets in the order of their names.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.files import files_below, folders_in
from tools.imagenet_sets.corruption_error import ALEXNET_ERRORS, SEVERITIES
from utils.errors import UserError, listing

# Images of the published sets; of ImageNet-C, of each severity of a corruption; of ReaL, those that have a label.
PUBLISHED_IMAGES = {
    "ImageNet": 50_000,
    "ImageNet-ReaL": 46_837,
    "ImageNet-V2": 10_000,
    "ImageNet-A": 7_500,
    "ImageNet-R": 30_000,
    "ImageNet-Sketch": 50_889,
    "ImageNet-C": 50_000,
}
_SUBSETS = {"ImageNet-A": "imagenet_a_synsets.txt", "ImageNet-R": "imagenet_r_synsets.txt"}
_V2_VARIANTS = ("matched-frequency", "threshold0.7", "top-images")
_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})(_n\d{8})?\.(jpe?g|png|webp)", re.IGNORECASE)


def imagenet_synsets() -> list[str]:
    """ImageNet-1K's classes by number."""
    return ImageNetInfo().label_names()


def set_synsets(name: str) -> list[str]:
    """The classes of a set: 200 of ImageNet-A and of ImageNet-R, from timm's tables, and all of the others.

    Args:
        name: As in `PUBLISHED_IMAGES`.
    """
    return _timm_table(_SUBSETS[name]).split() if name in _SUBSETS else imagenet_synsets()


def real_labels() -> list[list[int]]:
    """ReaL's class numbers for each of the 50,000 validation images in the order of their names, from timm's table."""
    return json.loads(_timm_table("imagenet_real_labels.json"))


def _timm_table(name: str) -> str:
    return (files("timm.data") / "_info" / name).read_text()


def network_numbers(classes: list[str] | None, num_classes: int) -> dict[str, int]:
    """A network's own number of each of ImageNet-1K's synsets.

    Args:
        classes: The network's class names by number; None if they are not known, as of published weights.
        num_classes: How many classes it has; 1000 without names are taken to be numbered as ImageNet-1K's.

    Raises:
        UserError: If it has other classes.
    """
    synsets = imagenet_synsets()
    classes = classes or (synsets if num_classes == len(synsets) else [])
    if sorted(classes) != synsets:
        unknown = sorted(set(synsets) - set(classes))
        raise UserError(
            f"the network's {num_classes} classes are not ImageNet-1K's (it does not know {listing(unknown, 3)}): "
            "name a checkpoint that was trained on the 1000 synsets"
        )
    return {synset: number for number, synset in enumerate(classes)}


def folder_synsets(root: Path, wanted: list[str]) -> list[str]:
    """The synset of each class folder, in the order of the folders' names.

    Folders are called as their synset, or, where all 1000 classes are wanted, by its number, as ImageNet-V2's are.

    Args:
        root: A folder of class folders.
        wanted: The synsets that there must be.

    Raises:
        UserError: If there are others, or fewer.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder: name one that holds {len(wanted)} class folders")
    folders = folders_in(root)
    by_number = dict(enumerate(imagenet_synsets())) if len(wanted) == len(imagenet_synsets()) else {}
    found = [by_number.get(int(folder), folder) if folder.isdecimal() else folder for folder in folders]
    missing, extra = Counter(wanted) - Counter(found), Counter(found) - Counter(wanted)
    if missing or extra:
        sides = [("lacks", missing), ("has besides", extra)]
        difference = "; ".join(f"{verb} {listing(sorted(names.elements()))}" for verb, names in sides if names)
        raise UserError(
            f"{root} must hold the {len(wanted)} class folders of its set and nothing else, but {difference}: "
            "unpack it again, or name the folder that holds the classes"
        )
    return found


def v2_variant(root: Path) -> str:
    """Which of ImageNet-V2's three variants a folder holds, by its name or by that of one above; else the name."""
    parts = reversed(root.resolve().parts)
    return next((variant for part in parts for variant in _V2_VARIANTS if variant in part), root.resolve().name)


class RealSource:
    """ImageNet's validation images that ReaL has labels for, by their original names, in whatever folders.

    A sample's class number is its place in `labels`, which holds the numbers of the classes that are right for it.

    Args:
        root: The folder.

    Raises:
        UserError: If it holds none, an image that has another name, or one twice.
    """

    classes: list[str] | None = None

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root} is no folder: name one that holds ImageNet's validation images")
        table = real_labels()
        paths = _validation_images(root, len(table))
        labelled = [number for number in sorted(paths) if table[number - 1]]
        if not labelled:
            raise UserError(f"{root} holds no ILSVRC2012_val_*.JPEG that ReaL has labels for: name another folder")
        self._paths = [paths[number] for number in labelled]
        self.labels = [table[number - 1] for number in labelled]

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Opens a file."""
        return Image.open(self._paths[index]), index

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self._paths[index])

    def class_of(self, index: int) -> str | None:
        """None: an image may be of several classes."""


@dataclass(frozen=True)
class ClassFolders:
    """A folder of class folders.

    Attributes:
        root: The folder.
        synsets: What is in the class folders, in the order of their names.
    """

    root: Path
    synsets: list[str]


@dataclass(frozen=True)
class PlannedSet:
    """A set to score, which is known to be there.

    Attributes:
        title: What to call it.
        root: Its folder.
        published_images: How many images the published set has.
        images: What it holds.
    """

    title: str
    root: Path
    published_images: int
    images: ClassFolders | RealSource


def _validation_images(root: Path, most: int) -> dict[int, Path]:
    """The files by the number in their names, from 1."""
    paths: dict[int, Path] = {}
    for path in sorted(path for path in files_below(root) if path.suffix.lower() in IMG_EXTENSIONS):
        matched = _VALIDATION_IMAGE.fullmatch(path.name)
        number = int(matched[1]) if matched else 0
        if not 1 <= number <= most:
            raise UserError(f"{path} has not its name in ILSVRC2012, by which ReaL labels it: keep the original names")
        if number in paths:
            raise UserError(f"{path} and {paths[number]} are the same validation image: remove one")
        paths[number] = path
    return paths


def find_corruptions(root: Path) -> dict[str, dict[int, Path]]:
    """The folders of ImageNet-C by corruption and severity, in the order of its paper.

    They are root/<corruption>/<severity>, or have the folder of a group (noise, blur, weather, digital) between.

    Raises:
        UserError: If there are none, or a corruption is there twice.
    """
    found: dict[str, dict[int, Path]] = {}
    for corruption in ALEXNET_ERRORS:
        places = [path for path in (root / corruption, *sorted(root.glob(f"*/{corruption}"))) if path.is_dir()]
        if len(places) > 1:
            raise UserError(f"{places[0]} and {places[1]} are the same corruption: remove one")
        severities = {severity: places[0] / str(severity) for severity in SEVERITIES} if places else {}
        if present := {severity: path for severity, path in severities.items() if path.is_dir()}:
            found[corruption] = present
    if not found:
        raise UserError(
            f"{root} holds none of ImageNet-C's corruptions: unpack its tar files there, so that there are "
            f"{root}/<corruption>/<severity>/<class>/ or {root}/<group>/<corruption>/<severity>/<class>/"
        )
    return found


def missing_corruptions(found: dict[str, dict[int, Path]]) -> list[str]:
    """What ImageNet-C has and was not found: corruptions, or single severities of them."""
    missing = []
    for corruption in ALEXNET_ERRORS:
        severities = found.get(corruption, {})
        lacking = [f"{corruption}/{severity}" for severity in SEVERITIES if severity not in severities]
        missing += lacking if severities else [corruption]
    return missing
