"""What `test.py --report` writes: scores class by class, confusion, calibration and mistakes, and a page of it all."""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from utils.checkpoint import write_json
from utils.errors import UserError, reason
from utils.reporting.calibration import calibrate
from utils.reporting.charts import draw_confusion, draw_reliability
from utils.reporting.class_scores import confusions, score_classes
from utils.reporting.folder import (
    CALIBRATION,
    CLASSES,
    CONFUSIONS,
    IMAGES,
    MATRIX,
    MISTAKES,
    PAGE,
    RELIABILITY,
    SCORE,
    replacing,
)
from utils.reporting.outcomes import Outcomes
from utils.reporting.page import Findings, page
from utils.sheet import PLAIN, RIGHT, WRONG, contact_sheet, write_png

_MOST_MISTAKES, _COLUMNS, _SIDE = 30, 6, 192  # the last in pixels


class Pictures(Protocol):
    """Images with random access, in the order in which they were scored."""

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image, perhaps not decoded yet, and its class number."""

    def name(self, index: int) -> str:
        """What the image is called."""


def write_report(
    folder: Path,
    outcomes: Outcomes,
    classes: list[str],
    labels: list[str],
    pictures: Pictures | None,
    facts: dict[str, Any],
) -> None:
    """Writes a report, all of it or nothing.

    Args:
        folder: Where to; an earlier report there is replaced.
        outcomes: What was said of every image, at least one.
        classes: Class names of the network, by number.
        labels: What people call each of them.
        pictures: The images; None for a stream, of which no image is named or shown again.
        facts: What to tell of the score and how it came about: acc1, acc5, loss, images, weights, and others.

    Raises:
        UserError: If it cannot be written, or an image cannot be read again.
    """
    scores, bins = score_classes(outcomes, len(classes)), calibrate(outcomes.are_right, outcomes.confidences)
    summary = {
        "mean_class_accuracy": scores.mean_accuracy,
        "macro_precision": scores.macro_precision,
        "macro_f1": scores.macro_f1,
        "classes_with_images": len(scores.present),
        "ece": bins.expected_error,
        "ece_bins": len(bins.images),
        "mce": bins.largest_error,
        "mean_confidence": bins.mean_confidence,
    }
    found = Findings(
        facts | summary,
        distinct_labels(classes, labels),
        outcomes,
        scores,
        confusions(outcomes),
        bins,
        outcomes.worst_mistakes(_MOST_MISTAKES),
        [pictures.name(index) for index in range(len(outcomes.targets))] if pictures else None,
    )
    with replacing(folder) as new:
        write_json(new / SCORE, found.score)
        _write_classes(new / CLASSES, found, classes, labels)
        _write_confusions(new / CONFUSIONS, found, classes)
        _write_calibration(new / CALIBRATION, found)
        _write_images(new / IMAGES, found, classes)
        draw_confusion(new / MATRIX, outcomes, found.labels)
        draw_reliability(new / RELIABILITY, bins)
        if pictures and len(found.mistakes):
            _draw_mistakes(new / MISTAKES, found, pictures)
        (new / PAGE).write_text(page(found), encoding="utf-8", errors="surrogateescape")


def distinct_labels(classes: list[str], labels: list[str]) -> list[str]:
    """Short names for charts and tables: ImageNet's first word for a class, and its synset where two share that."""
    short = [
        (label if label == name else label.partition(",")[0]).encode(errors="replace").decode()
        for name, label in zip(classes, labels, strict=True)
    ]
    times = Counter(short)
    return [f"{label} ({name})" if times[label] > 1 else label for name, label in zip(classes, short, strict=True)]


def _write_classes(path: Path, found: Findings, classes: list[str], labels: list[str]) -> None:
    scores = found.classes
    columns = {
        "number": range(len(classes)),
        "class": classes,
        "label": labels,
        "images": scores.images,
        "predicted": scores.predicted,
        "correct": scores.correct,
        "accuracy": scores.accuracy,
        "accuracy5": scores.accuracy5,
        "precision": scores.precision,
        "recall": scores.accuracy,
        "f1": scores.f1,
    }
    _write_csv(path, columns)


def _write_confusions(path: Path, found: Findings, classes: list[str]) -> None:
    pairs, images = found.confusions, found.classes.images
    columns = {
        "class": [classes[pair.target] for pair in pairs],
        "predicted": [classes[pair.prediction] for pair in pairs],
        "label": [found.labels[pair.target] for pair in pairs],
        "predicted_label": [found.labels[pair.prediction] for pair in pairs],
        "images": [pair.images for pair in pairs],
        "share_of_class": [pair.images / images[pair.target] for pair in pairs],
    }
    _write_csv(path, columns)


def _write_calibration(path: Path, found: Findings) -> None:
    bins = found.calibration
    columns = {
        "above": bins.edges[:-1],
        "up_to": bins.edges[1:],
        "images": bins.images,
        "accuracy": bins.accuracy,
        "mean_confidence": bins.confidence,
    }
    _write_csv(path, columns)


def _write_images(path: Path, found: Findings, classes: list[str]) -> None:
    outcomes = found.outcomes
    columns = {
        "image": found.names or [""] * len(outcomes.targets),
        "class": [classes[number] for number in outcomes.targets],
        "predicted": [classes[number] for number in outcomes.predictions],
        "confidence": outcomes.confidences,
        "class_probability": outcomes.target_probabilities,
        "in_top5": outcomes.in_top5.astype(int),
    }
    _write_csv(path, columns)


def _write_csv(path: Path, columns: dict[str, Sequence[Any]]) -> None:
    """Writes columns of equal length; what is not a number becomes an empty cell, and names keep their bytes."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(map(_cells, zip(*columns.values(), strict=True)))


def _cells(row: Iterable[Any]) -> list[str]:
    return ["" if value != value else f"{value:.6g}" if isinstance(value, float) else str(value) for value in row]


def _draw_mistakes(path: Path, found: Findings, pictures: Pictures) -> None:
    outcomes, shown = found.outcomes, []
    for index in found.mistakes:
        said = f"{outcomes.confidences[index]:.1%} {found.labels[outcomes.predictions[index]]}"
        truth = f"{outcomes.target_probabilities[index]:.1%} {found.labels[outcomes.targets[index]]}"
        try:
            image, _ = pictures.read(int(index))
            image.load()
            if image.mode == "RGB":  # thirty photographs of many megapixels would fill the memory
                image.thumbnail((2 * _SIDE, 2 * _SIDE))
        except Exception as error:  # as readers and decoders raise
            raise UserError(
                f"{found.names[index]} cannot be read again ({reason(error)}): is it still there?"
            ) from None
        shown.append((image, [(said, WRONG), (truth, RIGHT), (Path(found.names[index]).name, PLAIN)]))
    write_png(contact_sheet(shown, _COLUMNS, _SIDE), path)
