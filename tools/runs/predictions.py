"""What a network sees in images, and how predict.py writes and draws it."""

import csv
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.decoding import as_mode
from utils.checkpoint import write_output
from utils.sheet import PLAIN, RIGHT, WRONG, contact_sheet, write_png
from utils.trained import Trained

_COLUMNS, _CELL = 6, 192  # of the sheet: pictures of a row, and their size in pixels


@dataclass(frozen=True)
class Guess:
    """One of the first classes of an image.

    Attributes:
        number: The class.
        name: What its folder is called, or None where the checkpoint does not tell.
        label: What people call it.
        probability: From 0 to 1.
    """

    number: int
    name: str | None
    label: str
    probability: float

    def __str__(self) -> str:
        words = self.label if self.label == self.name else self.label.split(",")[0]  # the first of ImageNet's words
        return f"{words} ({self.probability:.1%})"


@dataclass(frozen=True)
class Prediction:
    """What the network sees in an image.

    Attributes:
        path: The image.
        top: Its first classes, the most probable first; none if the image is broken.
        complaint: What is wrong with the image; empty if nothing is.
    """

    path: Path
    top: list[Guess]
    complaint: str


def name_classes(trained: Trained, numbers: list[int], probabilities: list[float]) -> list[Guess]:
    """Classes by their numbers, with their names."""
    names = trained.classes or [None] * len(trained.labels)
    return [
        Guess(number, names[number], trained.labels[number], probability)
        for number, probability in zip(numbers, probabilities, strict=True)
    ]


def as_json(predictions: list[Prediction]) -> dict[str, Any]:
    """What was predicted, and which images are broken."""
    images = [
        {"path": str(prediction.path), "top": list(map(vars, prediction.top))}
        for prediction in predictions
        if not prediction.complaint
    ]
    broken = [
        {"path": str(prediction.path), "error": prediction.complaint}
        for prediction in predictions
        if prediction.complaint
    ]
    return {"images": images, "broken": broken}


def write_csv(predictions: list[Prediction], path: Path) -> None:
    """Writes a row for each class of an image; broken images have none."""

    def write(place: Path) -> None:
        # Names of files may hold bytes that are no text; they are written as they are.
        with open(place, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(["path", "rank", "number", "name", "label", "probability"])
            for prediction in predictions:
                for rank, guess in enumerate(prediction.top, 1):
                    table.writerow([prediction.path, rank, *astuple(guess)])

    write_output(path, write)


def draw_sheet(predictions: list[Prediction], classes: list[str] | None, path: Path) -> None:
    """Draws images with their classes below them.

    The first class is green where it is the name of the image's folder, and red where another class is.
    """
    pictures = []
    for prediction in predictions:
        with Image.open(prediction.path) as image:
            picture = as_mode(image, "RGB")
        picture.thumbnail((_CELL, _CELL))
        folder = prediction.path.absolute().parent.name
        is_known = folder in (classes or [])
        colour = (RIGHT if prediction.top[0].name == folder else WRONG) if is_known else PLAIN
        first, *others = map(str, prediction.top)
        lines = [(prediction.path.name, PLAIN), (first, colour), *((other, PLAIN) for other in others)]
        pictures.append((picture, lines))
    write_png(contact_sheet(pictures, _COLUMNS, _CELL), path)
