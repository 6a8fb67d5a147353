"""Measures subjects of one mode and batch size together with the machine's ceilings."""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from tools.benchmarking.ceiling import COPY, Ceilings, ceilings
from tools.benchmarking.cost import count_work, peak_memory
from tools.benchmarking.networks import as_counted
from tools.benchmarking.profiling import write_profile
from tools.benchmarking.subjects import Step, Subject
from tools.benchmarking.timing import first_result, interleave, why_it_failed
from utils.errors import UserError


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: Where.
        img_size: Height and width of the images.
        rounds: Measurements of each subject.
        seconds: How long each of them lasts about; at least one step.
        profile: Folder for profiles, None for none.
    """

    device: torch.device
    img_size: int
    rounds: int
    seconds: float
    profile: Path | None = None


@dataclass
class Result:
    """What was measured of a subject.

    Attributes:
        subject: It.
        flops: Operations of a step, as `Work.of_step` counts them.
        bytes: Bytes that a step must move, likewise.
        first_s: Seconds until the first step was done, compilation included.
        memory: Bytes at the peak of a step above those held before it.
        rounds_s: Seconds of a step in each round.
        arithmetic_ceiling: FLOP/s of a large matrix product in the same precision, in each round.
        copy_ceiling: Bytes/s of a large copy in each round.
        failure: Why there are no rounds, '' if there are.
    """

    subject: Subject
    flops: float
    bytes: float
    first_s: float = 0.0
    memory: int = 0
    rounds_s: list[float] = field(default_factory=list)
    arithmetic_ceiling: list[float] = field(default_factory=list)
    copy_ceiling: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def step_s(self) -> float:
        """Seconds of a step: the median of the rounds."""
        return statistics.median(self.rounds_s)

    @property
    def images_per_s(self) -> float:
        """Images a second at the median."""
        return self.subject.batch_size / self.step_s

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the rounds, as a part of the median."""
        if len(self.rounds_s) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.rounds_s, n=4, method="inclusive")
        return (high - low) / 2 / self.step_s

    # Ratios are taken round by round, between neighbours in time, so that a drift of the machine cancels out.

    @property
    def arithmetic_share(self) -> float:
        """FLOP/s over those of a large matrix product."""
        return self._median_over(self.arithmetic_ceiling, self.flops)

    @property
    def bytes_share(self) -> float:
        """Bytes/s that must be moved over those of a large copy."""
        return self._median_over(self.copy_ceiling, self.bytes)

    def speed_over(self, other: "Result") -> float:
        """Images/s over those of another."""
        speeds = [other.subject.batch_size / seconds for seconds in other.rounds_s]
        return self._median_over(speeds, self.subject.batch_size)

    def _median_over(self, rates: list[float], work: float) -> float:
        return statistics.median(work / s / rate for s, rate in zip(self.rounds_s, rates, strict=True))


def measure(
    networks: Mapping[str, nn.Module], subjects: Sequence[Subject], settings: Settings, say: Callable[[str], None]
) -> list[Result]:
    """Measures subjects; those of one mode and batch size, which are compared with each other, take turns.

    Args:
        networks: The plain networks by name.
        subjects: What to measure.
        settings: How.
        say: Called with a line about what is going on.

    Returns:
        The result of each subject, in their order.

    Raises:
        UserError: If the device has no room for its own ceilings, before anything is measured.
    """
    limits = _warm_ceilings({subject.precision for subject in subjects}, settings.device)
    work = {name: count_work(as_counted(network), settings.img_size) for name, network in networks.items()}
    results = {
        subject: Result(subject, *work[subject.network].of_step(subject.mode, subject.precision, subject.batch_size))
        for subject in subjects
    }
    for mode, batch_size in dict.fromkeys((subject.mode, subject.batch_size) for subject in subjects):
        group = [r for r in results.values() if (r.subject.mode, r.subject.batch_size) == (mode, batch_size)]
        with _compiler(freezing=mode == "infer" and settings.device.type == "cpu"):
            _measure_group(networks, group, limits, settings, say)
    return list(results.values())


def _warm_ceilings(precisions: set[str], device: torch.device) -> Ceilings:
    try:
        limits = ceilings(precisions, device)
        for step, _ in limits.values():
            first_result(step, device)
    except Exception as error:
        raise UserError(f"the ceilings cannot be measured ({why_it_failed(error)}): free the device") from error
    return limits


def _measure_group(
    networks: Mapping[str, nn.Module],
    results: list[Result],
    limits: Ceilings,
    settings: Settings,
    say: Callable[[str], None],
) -> None:
    device = settings.device
    steps: dict[Subject | str, Callable[[], object]] = {name: step for name, (step, _) in limits.items()}
    for result in results:
        say(f"first steps of {result.subject}")
        try:
            steps[result.subject] = _warm(result, networks[result.subject.network], settings)
        except Exception as error:  # of whatever network; it must not take the others' numbers with it
            result.failure = why_it_failed(error)
    say(f"{settings.rounds} rounds of all {len(results)}")
    times, failures = interleave(steps, settings.rounds, settings.seconds, device)
    failures |= {name: f"no ceiling of {name}: {failures[name]}" for name in limits if name in failures}
    for result in results:
        precision = result.subject.precision
        needed = (result.subject, precision, COPY)
        result.failure = next((failures[name] for name in needed if name in failures), result.failure)
        if not result.failure:
            result.rounds_s = times[result.subject]
            result.arithmetic_ceiling, result.copy_ceiling = (
                [limits[name][1] / seconds for seconds in times[name]] for name in (precision, COPY)
            )


def _warm(result: Result, network: nn.Module, settings: Settings) -> Step:
    """A subject's step, and in its result what is measured once."""
    step = Step(result.subject, network, settings.img_size, settings.device)
    result.first_s = first_result(step, settings.device)
    step()  # the first one may have set up what later ones do not need memory for
    result.memory = peak_memory(step, settings.device)
    if settings.profile:
        write_profile(step, result.subject, settings.profile, settings.device)
    return step


@contextlib.contextmanager
def _compiler(freezing: bool) -> Iterator[None]:
    """torch.compile for a group: it keeps the code of every subject, each for its exact shapes.

    Args:
        freezing: Whether inductor takes weights as constants, which it lays out anew and folds on a CPU.
    """
    torch.compiler.reset()
    # By default shapes become dynamic, and what was compiled often runs eagerly, as sizes and precisions differ.
    limits = torch._dynamo.config.patch(recompile_limit=64, automatic_dynamic_shapes=False)
    with limits, torch._inductor.config.patch(freezing=freezing):
        yield
