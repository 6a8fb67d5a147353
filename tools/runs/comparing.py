"""Draw the curves of several runs over one another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.sheet import write_figure

_COLUMNS = 3
_MOST_POINTS = 200  # of a curve: more lines than that are averaged
_NAMED_COLOURS = 10  # of tab10
_EMA = "ema_"

Line = dict[str, Any]  # of metrics.jsonl, with fractional epochs


@dataclass(frozen=True)
class Run:
    """What a run's folder tells.

    Attributes:
        settings: Its configuration, by dotted keys.
        updates: Lines of training progress.
        scores: Lines of scored epochs.
    """

    settings: dict[str, Any]
    updates: list[Line]
    scores: list[Line]


def draw_comparison(names: Sequence[str], runs: Sequence[Run], path: Path) -> None:
    """Draws losses, every score that a run has, and the learning rate, over epochs.

    Args:
        names: Of the runs.
        runs: In the order of their names.
        path: The PNG to write.

    Raises:
        UserError: If it cannot be written.
    """
    keys = dict.fromkeys(key.removeprefix(_EMA) for run in runs for line in run.scores for key in line)
    panels = [("training loss", "updates", "loss"), ("validation loss", "scores", "loss")]
    panels += [(f"{key}, %", "scores", key) for key in keys if key not in ("update", "epoch", "loss")]
    panels.append(("learning rate", "updates", "lr"))
    panels = [panel for panel in panels if any(_points(getattr(run, panel[1]), panel[2]) for run in runs)]
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(11, 2.8 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    colours = _colours(len(runs))
    for axis, (title, kind, key) in zip(axes, panels, strict=False):
        for run, colour in zip(runs, colours, strict=True):
            _draw(axis, getattr(run, kind), key, {"color": colour})
            _draw(axis, getattr(run, kind), _EMA + key, {"color": colour, "linestyle": "--"})
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[max(len(panels) - _COLUMNS, 0) : len(panels)]:
        axis.set_xlabel("epoch")
    for axis in axes[len(panels) :]:
        axis.remove()
    handles = [Line2D([], [], color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
    if any(key.startswith(_EMA) for run in runs for line in run.scores for key in line):
        handles.append(Line2D([], [], color="grey", linestyle="--", label="moving average"))
    legend = figure.legend(handles=handles, loc="outside upper left", ncols=5, fontsize=9, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a run's name is no formula
    write_figure(figure, path)


def _colours(count: int) -> list[Any]:
    if count <= _NAMED_COLOURS:
        return [colormaps["tab10"](number) for number in range(count)]
    return list(colormaps["turbo"](np.linspace(0.05, 0.95, count)))


def _points(lines: list[Line], key: str) -> list[tuple[float, float]]:
    return [(line["epoch"], line[key]) for line in lines if line.get(key) is not None]


def _draw(axis: Axes, lines: list[Line], key: str, style: dict[str, Any]) -> None:
    if points := _points(lines, key):
        means = [part.mean(0) for part in np.array_split(points, min(len(points), _MOST_POINTS))]
        marker = "o" if len(points) == 1 else None  # a line of one point would not be seen
        axis.plot(*np.transpose(means), linewidth=1.4, marker=marker, markersize=3, **style)
