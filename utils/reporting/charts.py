"""The charts of a scoring report: the confusion matrix and the reliability diagram."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from utils.reporting.calibration import Calibration
from utils.reporting.class_scores import confusion_matrix
from utils.reporting.outcomes import Outcomes

_BLUE, _ORANGE, _GREY = "#2f6f9f", "#d9742b", "#b0b0b0"
_MOST_NUMBERED, _MOST_NAMED, _MOST_ROWS = 25, 60, 1000
_LONGEST_NAME, _LONGEST_LEVEL = 24, 5  # characters, and of names that need not be turned
_DPI = 100
_PIXELS = 1000  # of a matrix without names, about: every class takes the same whole number of them, and at least two
_LEFT, _RIGHT, _BOTTOM, _TOP = 80, 190, 60, 20  # pixels around it
_FAINT, _STRONG = 0.25, 0.45  # where scales begin in their maps: for cells, and for pixels
_OTHERS = "others"


def draw_confusion(path: Path, outcomes: Outcomes, labels: list[str]) -> None:
    """Draws what images are against what was said of them, over the classes that have images.

    Up to 25 classes come with names and numbers, up to 60 with names; more are so many pixels each, and above 1,000
    several share them. A last column stands for all classes without images, where one was said.

    Args:
        path: Where to.
        outcomes: What was said.
        labels: What to call each class of the network.
    """
    classes = np.unique(outcomes.targets)
    block = -(-len(classes) // _MOST_ROWS)
    matrix = confusion_matrix(outcomes, classes, block)
    if not matrix[:, -1].any():
        matrix = matrix[:, :-1]
    if len(classes) <= _MOST_NAMED:
        figure = _with_names(matrix, [labels[number] for number in classes])
    else:
        figure = _without_names(matrix, block, len(classes), is_whole=len(classes) == len(labels))
    FigureCanvasAgg(figure).print_png(str(path))


def _with_names(matrix: np.ndarray, names: list[str]) -> Figure:
    (rows, columns), is_numbered = matrix.shape, len(names) <= _MOST_NUMBERED
    cell, size = (0.55, 9) if is_numbered else (0.2, 7)  # inches, points
    width, height = max(columns * cell, 1.5), max(rows * cell, 1.5)
    figure = Figure((width + 3, height + 1.5), dpi=_DPI, layout="constrained")
    axis = figure.subplots()
    norm = _draw_counts(axis, axis.inset_axes((1 + 0.3 / width, 0, 0.4 / width, 1)), matrix, _FAINT)
    said = ([_shorten(name) for name in names] + [_OTHERS])[:columns]
    axis.set_yticks(range(rows), said[:rows], fontsize=size, parse_math=False)
    is_level = is_numbered and max(map(len, said)) <= _LONGEST_LEVEL
    axis.set_xticks(range(columns), said, fontsize=size, parse_math=False, rotation=0 if is_level else 90)
    axis.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="#e4e4e4", linewidth=0.6)
    axis.tick_params(which="both", length=0)
    if is_numbered:
        for row, column in zip(*matrix.nonzero(), strict=True):
            count = matrix[row, column]
            style = {"fontsize": 9 if count < 1000 else 7, "color": "white" if norm(count) > 0.6 else "#202020"}
            axis.text(column, row, f"{count:,}", ha="center", va="center", **style)
    return figure


def _without_names(matrix: np.ndarray, block: int, classes: int, is_whole: bool) -> Figure:
    (rows, columns), pixels = matrix.shape, max(_PIXELS // len(matrix), 2)
    scale = max(rows * pixels / _PIXELS, 1)  # of letters, and of the margins that hold them
    left, right, bottom, top = (round(margin * scale) for margin in (_LEFT, _RIGHT, _BOTTOM, _TOP))
    width, height, dpi = left + columns * pixels + right, bottom + rows * pixels + top, _DPI * scale
    figure = Figure((width / dpi, height / dpi), dpi=dpi)
    axis = figure.add_axes((left / width, bottom / height, columns * pixels / width, rows * pixels / height))
    legend = figure.add_axes((1 - 0.75 * right / width, bottom / height, 0.25 * right / width, 0.5))
    _draw_counts(axis, legend, matrix, _STRONG)
    axis.set_aspect("auto")  # which is equal, as the axes have that many pixels
    axis.spines[:].set_position(("outward", 1))  # of the pixels, none of which it covers
    ticks = MaxNLocator(10, integer=True).tick_values(0, classes - 1)
    ticks = ticks[(ticks >= 0) & (ticks < classes)]
    for which in (axis.xaxis, axis.yaxis):
        which.set_ticks((ticks + 0.5) / block - 0.5, [f"{tick:,.0f}" for tick in ticks])
    of = "class number" if is_whole else "place among the classes that have images"
    axis.set_ylabel(f"what the image is: {of}")
    axis.set_xlabel("what was said" + (f", the last column {_OTHERS}" if columns > rows else ""))
    return figure


def _draw_counts(axis: Axes, legend: Axes, matrix: np.ndarray, least: float) -> LogNorm:
    """Draws counts in colours of a logarithmic scale, right answers in one and mistakes in another, and the legend.

    The scales begin that far into their colour maps, so that a single image shows.
    """
    norm = LogNorm(1, max(matrix.max(), 2))
    right = np.eye(*matrix.shape, dtype=bool)
    for colours, cells in (("Blues", right), ("Oranges", ~right)):
        shown = np.ma.masked_where(~cells | (matrix == 0), matrix)
        axis.imshow(shown, cmap=_colours(colours, least), norm=norm, interpolation="nearest")
    axis.set_ylabel("what the image is")
    axis.set_xlabel("what was said")
    counts = np.geomspace(1, norm.vmax, 129)
    for left, colours in enumerate(("Blues", "Oranges")):
        legend.pcolormesh([left, left + 1], counts, counts[:-1, None], cmap=_colours(colours, least), norm=norm)
    legend.set_yscale("log")
    legend.set_ylim(1, norm.vmax)
    legend.yaxis.tick_right()
    legend.yaxis.set_label_position("right")
    legend.set_ylabel("images")
    legend.set_xticks([0.5, 1.5], ["right", "wrong"], rotation=90)
    legend.yaxis.set_major_formatter("{x:,.0f}")
    legend.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if norm.vmax < 1000 else (1,)))
    legend.yaxis.set_minor_locator(NullLocator())
    return norm


def draw_reliability(path: Path, calibration: Calibration) -> None:
    """Draws how often answers are right against how sure they are, and how many there are.

    Args:
        path: Where to.
        calibration: The bins.
    """
    figure = Figure((5.6, 6.4), dpi=_DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges, filled = calibration.edges, calibration.images > 0
    widths, middles = np.diff(edges)[filled], (edges[:-1] + edges[1:])[filled] / 2
    accuracy, confidence = calibration.accuracy[filled], calibration.confidence[filled]
    lower_edges, heights = np.minimum(accuracy, confidence), abs(accuracy - confidence)
    upper.bar(middles, lower_edges, widths, color=_BLUE, edgecolor="white", label="as often right as sure")
    for colour, are_such, label in (
        (_ORANGE, confidence > accuracy, "surer than right"),
        (_BLUE, accuracy > confidence, "more often right than sure"),
    ):
        if are_such.any():
            style = {"facecolor": "white", "edgecolor": colour, "hatch": "////", "linewidth": 0.8, "label": label}
            upper.bar(middles[are_such], heights[are_such], widths[are_such], lower_edges[are_such], **style)
    upper.plot([0, 1], [0, 1], color="#606060", linestyle="--", linewidth=1, label="perfectly calibrated")
    upper.set(ylim=(0, 1), ylabel="accuracy")
    upper.legend(loc="upper left", fontsize=8, frameon=False)
    upper.set_title(
        f"ECE {calibration.expected_error:.2%} in {len(calibration.images)} bins of equal width",
        fontsize=10,
        loc="left",
    )
    lower.bar(middles, calibration.images[filled], widths, color=_GREY, edgecolor="white")
    lower.axvline(calibration.mean_confidence, color=_ORANGE, linewidth=1.5, label="mean confidence")
    lower.axvline(calibration.mean_accuracy, color=_BLUE, linewidth=1.5, linestyle="--", label="accuracy")
    lower.set(xlim=(0, 1), ylabel="images", xlabel="confidence: the probability of the answer")
    lower.legend(loc="upper left", fontsize=8, frameon=False)
    lower.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_formatter(PercentFormatter(1))
    upper.yaxis.set_major_formatter(PercentFormatter(1))
    FigureCanvasAgg(figure).print_png(str(path))


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1].rstrip() + "…"


def _colours(name: str, least: float) -> ListedColormap:
    return ListedColormap(matplotlib.colormaps[name](np.linspace(least, 1, 256)))
