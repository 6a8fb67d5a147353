"""What a network reached on ImageNet's sets, as Markdown tables and as JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from tools.imagenet_sets.corruption_error import ALEXNET_ERRORS, SEVERITIES, corruption_error, relative_corruption_error
from tools.imagenet_sets.sets import PlannedSet
from utils.console import markdown_table
from utils.metrics import Score


@dataclass(frozen=True)
class CorruptionRow:
    """What a network reached under a corruption, or on the mean of all; errors are top-1 and in percent.

    Attributes:
        images: How many were scored.
        errors: At each severity that was scored.
        error: Their mean, None where a severity was not scored.
        ce: Corruption error in percent of AlexNet's, None where a severity was not scored; on the mean of all, the mCE.
        relative_ce: Relative corruption error, None also where the clean error is not known.
    """

    images: int
    errors: dict[int, float]
    error: float | None
    ce: float | None
    relative_ce: float | None


def corruption_row(corruption: str, scores: Mapping[int, Score], clean: Score | None) -> CorruptionRow:
    """A row of ImageNet-C's table.

    Args:
        corruption: Its name.
        scores: By severity; some may be missing.
        clean: On the images before they were corrupted, if that is known.
    """
    shares = {severity: _error(scores[severity]) for severity in SEVERITIES if severity in scores}
    is_whole, errors = len(shares) == len(SEVERITIES), list(shares.values())
    return CorruptionRow(
        images=sum(score.images for score in scores.values()),
        errors={severity: 100 * share for severity, share in shares.items()},
        error=100 * fmean(errors) if is_whole else None,
        ce=corruption_error(corruption, errors) if is_whole else None,
        relative_ce=relative_corruption_error(corruption, errors, _error(clean)) if is_whole and clean else None,
    )


def mean_row(rows: Mapping[str, CorruptionRow]) -> CorruptionRow | None:
    """The mean over the corruptions, with the mCE; None where a corruption or a severity is missing."""
    every = list(rows.values())
    if rows.keys() != ALEXNET_ERRORS.keys() or any(row.ce is None for row in every):
        return None
    has_relative = all(row.relative_ce is not None for row in every)
    return CorruptionRow(
        images=sum(row.images for row in every),
        errors={severity: fmean(row.errors[severity] for row in every) for severity in SEVERITIES},
        error=fmean(row.error for row in every),
        ce=fmean(row.ce for row in every),
        relative_ce=fmean(row.relative_ce for row in every) if has_relative else None,
    )


def _error(score: Score) -> float:
    """Top-1 error as a share."""
    return (score.images - score.correct1) / score.images


def sets_table(scores: Iterable[tuple[PlannedSet, Score]]) -> str:
    """Accuracies in percent, a row for each set."""
    rows = [[each.title, f"{score.images:,}", _number(score.acc1), _number(score.acc5)] for each, score in scores]
    return markdown_table([["set", "images", "Acc@1", "Acc@5"], *rows])


def corruptions_table(rows: Mapping[str, CorruptionRow], missing: Sequence[str]) -> str:
    """ImageNet-C's errors in percent, a row for each corruption, and the mCE below.

    Args:
        rows: By corruption.
        missing: What the folder lacks of ImageNet-C.
    """
    mean = mean_row(rows)
    head = ["ImageNet-C", "images", *(f"error at {severity}" for severity in SEVERITIES), "mean", "CE", "relative CE"]
    table = [_cells(name, row) for name, row in {**rows, **({"mean": mean} if mean else {})}.items()]
    if not any(row.relative_ce is not None for row in rows.values()):
        head, table = head[:-1], [cells[:-1] for cells in table]
    text = markdown_table([head, *table])
    if not mean:
        return f"{text}\n\nNo mCE, which takes all of ImageNet-C; missing: {', '.join(missing)}."
    relative = f", relative mCE {_number(mean.relative_ce)}" if mean.relative_ce is not None else ""
    return f"{text}\n\nmCE {_number(mean.ce)}{relative}, in percent of AlexNet's."


def _cells(name: str, row: CorruptionRow) -> list[str]:
    errors = [_number(row.errors.get(severity)) for severity in SEVERITIES]
    return [name, f"{row.images:,}", *errors, *map(_number, (row.error, row.ce, row.relative_ce))]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def sets_json(scores: Iterable[tuple[PlannedSet, Score]]) -> list[dict[str, Any]]:
    """The accuracies, and the counts that they come from."""
    return [
        {
            "set": each.title,
            "path": str(each.root),
            "images": score.images,
            "published_images": each.published_images,
            "correct1": score.correct1,
            "correct5": score.correct5,
            "acc1": score.acc1,
            "acc5": score.acc5,
        }
        for each, score in scores
    ]


def corruptions_json(rows: Mapping[str, CorruptionRow], missing: Sequence[str]) -> dict[str, Any]:
    """The errors, and what follows from them; the mean is null where something is missing."""
    mean = mean_row(rows)
    return {
        "corruptions": {corruption: asdict(row) for corruption, row in rows.items()},
        "mean": asdict(mean) if mean else None,
        "mce": mean.ce if mean else None,
        "relative_mce": mean.relative_ce if mean else None,
        "missing": list(missing),
    }
