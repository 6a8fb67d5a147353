"""The page of a scoring report, which shows all of it from the files beside it and needs no network."""

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from utils.reporting.calibration import Calibration
from utils.reporting.class_scores import ClassScores, Confusion
from utils.reporting.folder import (
    CALIBRATION,
    CLASSES,
    CONFUSIONS,
    GENERATOR,
    IMAGES,
    MATRIX,
    MISTAKES,
    RELIABILITY,
    SCORE,
)
from utils.reporting.html_page import count, document, share, table, text
from utils.reporting.outcomes import Outcomes

_MOST_CONFUSIONS = 30


@dataclass(frozen=True)
class Findings:
    """All that a report tells.

    Attributes:
        score: Names of numbers and settings, and their values, as score.json has them.
        labels: What to call each class of the network, by number.
        outcomes: What was said of each image.
        classes: Scores class by class.
        confusions: Pairs of classes of which one was taken for the other, the most frequent first.
        calibration: Whether the network is right as often as it is sure.
        mistakes: Indices of the mistakes to show.
        names: What the images are called; None for a stream, which has no names and cannot show an image again.
    """

    score: dict[str, Any]
    labels: list[str]
    outcomes: Outcomes
    classes: ClassScores
    confusions: list[Confusion]
    calibration: Calibration
    mistakes: np.ndarray
    names: list[str] | None


def page(found: Findings) -> str:
    """The whole page, in HTML."""
    sections = [
        ("confusion", "Confusion matrix", _matrix()),
        ("pairs", "Most confused pairs", _pairs(found)),
        ("calibration", "Calibration", _calibration(found.calibration)),
        ("mistakes", "Most confident mistakes", _mistakes(found)),
        ("classes", "Class by class", _classes(found)),
        ("settings", "What was scored", _settings(found.score)),
    ]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "\n".join(
        f'<section id="{key}">\n<h2>{title}</h2>\n{content}\n</section>' for key, title, content in sections
    )
    head = f"<h1>Scoring report</h1>\n<p><code>{escape(str(found.score['weights']))}</code></p>\n<nav>{links}</nav>"
    return document("Scoring report", GENERATOR, f"{head}\n{_cards(found)}\n{body}")


def _cards(found: Findings) -> str:
    score, present = found.score, len(found.classes.present)
    of = f" of {len(found.labels):,}" if present < len(found.labels) else ""
    cards = {
        "Acc@1": f"{score['acc1']:.2f}%",
        "Acc@5": f"{score['acc5']:.2f}%",
        "mean accuracy of classes": f"{score['mean_class_accuracy']:.2%}",
        "mean F1 of classes": f"{score['macro_f1']:.2%}",
        f"calibration error (ECE, {score['ece_bins']} bins)": f"{score['ece']:.2%}",
        "cross-entropy": f"{score['loss']:.4f}",
        "images": f"{score['images']:,}",
        "classes with images": f"{present:,}{of}",
    }
    shown = (f'<div class="card"><b>{value}</b><span>{name}</span></div>' for name, value in cards.items())
    return f'<div class="cards">{"".join(shown)}</div>'


def _picture(file: str, what: str) -> str:
    return f'<a href="{file}"><img src="{file}" alt="{what}"></a>'


def _link(file: str) -> str:
    return f'<a href="{file}">{file}</a>'


def _matrix() -> str:
    return (
        "<p>A row is what images are, a column what was said of them, over the classes that have images. The scale of "
        "colours is logarithmic, right answers in blue and mistakes in orange. Click it for its full size.</p>\n"
        + _picture(MATRIX, "confusion matrix")
    )


def _pairs(found: Findings) -> str:
    if not found.confusions:
        return "<p>No class was taken for another.</p>"
    shown, labels, images = found.confusions[:_MOST_CONFUSIONS], found.labels, found.classes.images
    rows = [
        (
            text(labels[pair.target]),
            text(labels[pair.prediction]),
            count(pair.images),
            share(pair.images / images[pair.target]),
        )
        for pair in shown
    ]
    lead = f"<p>{len(shown):,} of {len(found.confusions):,} pairs; all are in {_link(CONFUSIONS)}.</p>\n"
    return lead + table(("images of", "taken for", "images", "share of the class"), rows)


def _calibration(bins: Calibration) -> str:
    gap = bins.mean_confidence - bins.mean_accuracy
    lead = (
        f"<p>Answers given with a probability of 80% should be right 80% of the time. These were given with "
        f"{bins.mean_confidence:.2%} on average and were right {bins.mean_accuracy:.2%} of the time: "
        f"{abs(gap):.2%} too {'sure' if gap > 0 else 'unsure'}. ECE, the mean over images of the distance between "
        f"accuracy and mean confidence in their bin, is {bins.expected_error:.2%} with {len(bins.images)} bins of "
        f"equal width; the largest distance is {bins.largest_error:.2%}. The bins are in {_link(CALIBRATION)}.</p>\n"
    )
    rows = [
        (
            text(f"{bins.edges[number]:.1%} to {bins.edges[number + 1]:.1%}"),
            count(bins.images[number]),
            share(bins.accuracy[number]),
            share(bins.confidence[number]),
        )
        for number in np.flatnonzero(bins.images)
    ]
    bins_table = table(("confidence", "images", "accuracy", "mean confidence"), rows)
    return f'{lead}<div class="columns"><div>{_picture(RELIABILITY, "reliability diagram")}</div>{bins_table}</div>'


def _mistakes(found: Findings) -> str:
    rest = f"What was said of every image is in {_link(IMAGES)}."
    if not len(found.mistakes):
        return f"<p>There are none. {rest}</p>"
    outcomes, labels, names = found.outcomes, found.labels, found.names
    rows = [
        (
            text(labels[outcomes.predictions[index]]),
            share(outcomes.confidences[index]),
            text(labels[outcomes.targets[index]]),
            share(outcomes.target_probabilities[index]),
            text(names[index] if names else ""),
        )
        for index in found.mistakes
    ]
    listed = table(("said", "with a probability of", "it is", "which got", "image"), rows)
    if names is None:
        return f"<p>The data is a stream: its images have no names and are not shown again. {rest}</p>\n{listed}"
    lead = "Red is what was said, and with what probability; green what the image is, and the probability of that."
    return f"<p>{lead} {rest}</p>\n{_picture(MISTAKES, 'the images')}\n{listed}"


def _classes(found: Findings) -> str:
    scores = found.classes
    shares = (scores.accuracy, scores.accuracy5, scores.precision, scores.f1)
    rows = [
        (
            count(number),
            text(found.labels[number]),
            count(scores.images[number]),
            count(scores.predicted[number]),
            *(share(values[number]) for values in shares),
        )
        for number in np.argsort(scores.accuracy, kind="stable")
    ]
    lead = (
        "<p>The least accurate come first; click a heading to sort by it. Accuracy, which is recall, is the share of a "
        "class's images that it was said of; precision is the share of the images that it was said of that are its. "
        f"What is not defined is blank. The same is in {_link(CLASSES)}.</p>\n"
    )
    return lead + table(("number", "class", "images", "said of", "accuracy", "in top 5", "precision", "F1"), rows)


def _settings(score: dict[str, Any]) -> str:
    lead = f"<p>The same is in {_link(SCORE)}.</p>\n"
    return lead + table(("name", "value"), [(text(name), text(value)) for name, value in score.items()])
