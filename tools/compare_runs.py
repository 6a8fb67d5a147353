"""Compare training runs: the keys in which their configurations differ, their best scores, and their curves.

Usage:
    python tools/compare_runs.py output/digits/a output/digits/b
    python tools/compare_runs.py output/digits/* --png compared.png --markdown compared.md

A run is the folder that holds its config.yaml and metrics.jsonl; one that still trains can be compared once an epoch is
scored. Runs of different tasks can be compared too: each has the scores of its own task. Scores whose names begin with
ema_ are those of the moving average, whose curves are dashed. OUTPUT and TAG, which name the folder, are not compared.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml
from yacs.config import CfgNode

from tools.runs.comparing import Run, draw_comparison
from utils.checkpoint import write_text
from utils.cli import Parser, check_report, run
from utils.config import flatten
from utils.console import aligned, markdown_table, say
from utils.errors import UserError, reason
from utils.logger import read_metrics

_NAMES_OF_FOLDERS = ("OUTPUT", "TAG")
_NO_MEASURES = ("update", "epoch", "loss", "ema_loss")  # of the lines of a scored epoch

Row = tuple[str, ...]


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        UserError: If it holds no run, or one that has scored no epoch yet.
    """
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if not (config.is_file() and metrics.is_file()):
        raise UserError(f"{folder} holds no run (config.yaml and metrics.jsonl): name a folder such as output/NAME/TAG")
    try:
        settings = dict(flatten(CfgNode(yaml.safe_load(config.read_text()))))
        lines = read_metrics(metrics)
        scores = [line for line in lines if "lr" not in line]
        if not scores:
            raise UserError(f"{folder} has scored no epoch yet: wait for its first one, or leave it out")
        updates_per_epoch = scores[-1]["update"] / (scores[-1]["epoch"] + 1)
        for line in lines:
            line["epoch"] = line["update"] / updates_per_epoch
    except (OSError, ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{folder} cannot be read as a run ({reason(error)}): leave it out") from None
    return Run(settings, [line for line in lines if "lr" in line], scores)


def names_of(folders: Sequence[Path]) -> list[str]:
    """The ends of the folders' paths, as long as it takes to tell them apart.

    Raises:
        UserError: If a folder is named twice.
    """
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        raise UserError(
            f"{max(folders, key=lambda folder: whole.count(folder.resolve()))} is named twice: name it once"
        )
    for depth in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(names):
            break
    return names


def table_of(names: Sequence[str], runs: Sequence[Run]) -> list[Row]:
    """What to print: a column for each run, under a row of their names.

    The best of every score and the epochs after which it was reached come first, then the keys that differ.
    """
    settings, scores = [each.settings for each in runs], [each.scores for each in runs]
    measures = dict.fromkeys(key for line in chain(*scores) for key in line if key not in _NO_MEASURES)
    rows = [("", *names), ("epochs scored", *(str(len(lines)) for lines in scores))]
    rows += [(f"best {measure}", *(_best(lines, measure) for lines in scores)) for measure in measures]
    for key in dict.fromkeys(chain(*settings)):
        values = tuple(str(of_run[key]) if key in of_run else "-" for of_run in settings)
        if len(set(values)) > 1 and key not in _NAMES_OF_FOLDERS:
            rows.append((key, *(value or "''" for value in values)))
    return rows


def _best(lines: list[dict[str, Any]], measure: str) -> str:
    points = [(line[measure], -line["epoch"]) for line in lines if line.get(measure) is not None]
    if not points:
        return "-"
    value, epochs = max(points)
    return f"{value:.3f} after {-epochs:g}"


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: If it is wrong.
    """
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, such as output/NAME/TAG")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curves of all runs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    arguments = parser.parse_args()
    if len(arguments.runs) < 2:
        raise UserError(f"only {arguments.runs[0]} is named: name the runs to compare it with")
    check_report(arguments.png, "--png", ".png")
    check_report(arguments.markdown, "--markdown")
    return arguments


def main() -> None:
    """Parses, reads, compares."""
    arguments = parse()
    names = names_of(arguments.runs)
    runs = [read_run(folder) for folder in arguments.runs]
    rows = table_of(names, runs)
    say("\n".join(aligned(rows)))
    if not any(row[0] in each.settings for row in rows for each in runs):
        print("the configurations are equal")
    if arguments.markdown:
        write_text(arguments.markdown, markdown_table(rows) + "\n")
    if arguments.png:
        draw_comparison(names, runs, arguments.png)


if __name__ == "__main__":
    run(main)
