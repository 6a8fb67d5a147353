"""Results as a bar chart."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.benchmarking.machine import machine_line
from tools.benchmarking.measure import Result
from tools.benchmarking.networks import LITERAL
from utils.sheet import write_figure

_OURS, _LITERAL, _PEER = "#2f6f9f", "#b0b0b0", "#d9742b"


def draw_chart(results: Sequence[Result], path: Path, machine: dict[str, Any]) -> None:
    """Draws images/s as bars: a panel for each table, one row for each mode and precision.

    Args:
        results: Of a run.
        path: The PNG to write.
        machine: As `describe_machine` gives it.

    Raises:
        UserError: If it cannot be written.
    """
    tables = [list(group) for _, group in groupby(results, _title)]
    ours = {result.subject.network for result in results if result.subject.form == LITERAL}
    columns = len({result.subject.batch_size for result in results})
    rows, bars = len(tables) // columns, max(map(len, tables))
    figure = Figure(figsize=(1 + 6 * columns, 0.5 + rows * (0.8 + 0.3 * bars)), dpi=120, layout="constrained")
    for axis, table in zip(figure.subplots(rows, columns, squeeze=False).flatten(), tables, strict=True):
        _draw(axis, table, ours)
    figure.suptitle(machine_line(machine), fontsize=9, x=0.01, ha="left")
    write_figure(figure, path)


def _title(result: Result) -> str:
    subject = result.subject
    return f"{subject.mode}, {subject.precision}, batch {subject.batch_size}: images/s"


def _draw(axis: Axes, panel: list[Result], ours: set[str]) -> None:
    speeds = [0.0 if result.failure else result.images_per_s for result in panel]
    spreads = [0.0 if result.failure else result.spread * result.images_per_s for result in panel]
    colours = [
        _LITERAL if result.subject.form == LITERAL else _OURS if result.subject.network in ours else _PEER
        for result in panel
    ]
    bars = axis.barh(range(len(panel)), speeds, xerr=spreads, color=colours, error_kw={"elinewidth": 0.8})
    labels = [result.failure or f"{speed:#.3g}".rstrip(".") for result, speed in zip(panel, speeds, strict=True)]
    axis.bar_label(bars, labels, padding=4, fontsize=8)
    axis.set_yticks(range(len(panel)), [result.subject.label for result in panel], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(a + b for a, b in zip(speeds, spreads, strict=True)) or 1)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(_title(panel[0]), fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
