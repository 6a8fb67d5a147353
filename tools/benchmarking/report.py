"""Results as Markdown tables and as JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

from tools.benchmarking.machine import machine_line
from tools.benchmarking.measure import Result
from tools.benchmarking.networks import LITERAL
from tools.benchmarking.subjects import Subject
from utils.console import markdown_table

_MODES = {"infer": "inference", "train": "training step"}


def markdown(results: Sequence[Result], peer: str | None, machine: dict[str, Any], img_size: int) -> str:
    """The tables: one for each mode, precision and batch size.

    Args:
        results: Of a run.
        peer: The network that all are compared with, beside the literal form; None for none.
        machine: As `describe_machine` gives it.
        img_size: Height and width of the images.
    """
    parts = [f"{machine_line(machine)}; {img_size} x {img_size} images."]
    for (mode, precision, batch_size), group in groupby(results, _table_of):
        lines = [_row(result, results, peer) for result in group]
        head = ["network", "images/s", "±", "ms", "peak MiB", "of literal", "GFLOP/s", "of ceiling", "x literal"]
        head += [f"x {peer}"] if peer else []
        head += ["first step, s"]
        parts.append(f"**{_MODES[mode]}, {precision}, batch {batch_size}**\n\n{markdown_table([head, *lines])}")
    return "\n\n".join([*parts, *_best(results), _LEGEND]) + "\n"


_LEGEND = """\
images/s and ms: median of rounds in which all networks of a mode and batch size take turns; ±: half the distance of
their quartiles. Peak MiB: tensors of a step above weights and optimizer state; of literal: over the literal form's.
GFLOP/s: convolutions and matrix products, two for a multiply-add. Of ceiling: the larger of GFLOP/s over a large matrix
product's (arithmetic), and of the bytes that each of these operators by itself reads and writes over a large copy's.
x literal: speed over the literal form, eager, in the same precision. x of a peer: speed over it, compiled if the row
is. First step: until it is done, compilation included."""


def _table_of(result: Result) -> tuple[str, str, int]:
    subject = result.subject
    return subject.mode, subject.precision, subject.batch_size


def _row(result: Result, results: Sequence[Result], peer: str | None) -> list[str]:
    subject = result.subject
    if result.failure:
        return [subject.label, result.failure, *[""] * (9 if peer else 8)]
    share, kind = max((result.arithmetic_share, "arithmetic"), (result.bytes_share, "bytes"))
    baseline = _literal_of(result, results)
    peers = [replace(subject, network=peer, form="plain")] if peer else []
    return [
        subject.label,
        _three(result.images_per_s),
        f"{result.spread:.1%}",
        _three(1e3 * result.step_s),
        _three(result.memory / 2**20),
        f"{result.memory / baseline.memory:.2f}" if baseline else "",
        _three(result.flops / result.step_s / 1e9),
        f"{share:.0%} {kind}",
        _ratio(result, baseline),
        *(_ratio(result, _find(results, wanted)) for wanted in peers),
        _three(result.first_s),
    ]


def _three(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:#.3g}".rstrip(".")


def _ratio(result: Result, other: Result | None) -> str:
    return f"{result.speed_over(other):.2f}" if other else ""


def _find(results: Iterable[Result], subject: Subject) -> Result | None:
    """The result of a subject, if it was measured."""
    return next((result for result in results if result.subject == subject and not result.failure), None)


def _literal_of(result: Result, results: Iterable[Result]) -> Result | None:
    return _find(results, replace(result.subject, form=LITERAL, compiled=False))


def _best(results: Sequence[Result]) -> list[str]:
    """For each mode and batch size, the fastest way to run a network that has a literal form, over that form."""
    literals = [result for result in results if result.subject.form == LITERAL and not result.failure]
    groups: dict[tuple[str, str, int], list[Result]] = {_job_of(literal): [] for literal in literals}
    for result in results:
        if _job_of(result) in groups and not result.failure:
            groups[_job_of(result)].append(result)
    lines = []
    for job, group in groups.items():
        best = min(group, key=lambda result: result.step_s)
        ratios = [f"{_ratio(best, r)} in {r.subject.precision}" for r in literals if _job_of(r) == job]
        lines.append(
            f"- best {_MODES[job[1]]} at batch {job[2]}: {best.subject.label}, {best.subject.precision}; "
            f"over the literal form {', '.join(ratios)}"
        )
    return ["\n".join(lines)] if lines else []


def _job_of(result: Result) -> tuple[str, str, int]:
    return result.subject.network, result.subject.mode, result.subject.batch_size


def as_json(results: Sequence[Result], machine: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """All that was measured and what follows from it."""
    return {"machine": machine, "settings": settings, "results": [_entry(result) for result in results]}


def _entry(result: Result) -> dict[str, Any]:
    entry = asdict(result)
    entry |= entry.pop("subject")
    if not result.failure:
        names = ("step_s", "images_per_s", "spread", "arithmetic_share", "bytes_share")
        entry |= {name: getattr(result, name) for name in names}
        entry["flops_per_s"] = result.flops / result.step_s
        entry["bytes_per_s"] = result.bytes / result.step_s
    return entry
