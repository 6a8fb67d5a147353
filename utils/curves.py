"""curves.png: a run's loss, score, learning rate and gradient norm, drawn from its metrics.jsonl."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.logger import read_metrics
from utils.sheet import write_figure

_BLUE, _ORANGE = "#2f6f9f", "#d9742b"
_OTHERS = ("#b0b0b0", "#7a9e7e", "#8d7aa8", "#5f6a72", "#c2a14d")  # of the measures after the first, again and again


def draw_curves(folder: Path, updates_per_epoch: int, measures: Mapping[str, str]) -> None:
    """Draws curves.png from metrics.jsonl in a run's folder.

    Args:
        folder: The run's folder.
        updates_per_epoch: Optimizer steps of an epoch.
        measures: Keys of the scores, the chosen one first, and what to call them.
    """
    lines = read_metrics(folder / "metrics.jsonl")
    for line in lines:
        line["epoch"] = line["update"] / updates_per_epoch
    updates = [line for line in lines if "lr" in line]
    scores = [line for line in lines if "lr" not in line]
    first, *others = measures
    colours = {first: _BLUE} | dict(zip(others, cycle(_OTHERS), strict=False))
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    _draw(axes[0, 0], updates, {"loss": ("training", _BLUE)}, "loss")
    _draw(axes[0, 0], scores, {"loss": ("validation", _ORANGE)}, "loss")
    _draw(axes[0, 1], scores, {name: (label, colours[name]) for name, label in measures.items()}, "score, %")
    _draw(axes[0, 1], scores, {f"ema_{first}": (f"{measures[first]} of the moving average", _ORANGE)}, "score, %")
    _draw(axes[1, 0], updates, {"lr": ("", _BLUE)}, "learning rate")
    _draw(axes[1, 1], updates, {"grad_norm": ("", _BLUE)}, "gradient norm")
    for axis in axes.flat:
        axis.set_xlim(left=0)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    write_figure(figure, folder / "curves.png")


def _draw(axis: Axes, lines: list[dict[str, Any]], curves: dict[str, tuple[str, str]], title: str) -> None:
    for key, (label, colour) in curves.items():
        points = [(line["epoch"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            marker = "o" if len(points) < 60 and "lr" not in lines[0] else None
            axis.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.5, marker=marker, markersize=3)
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=8, frameon=False)
