"""Times steps in rounds that take turns, so that a machine that drifts slows all of them alike."""

import time
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch

from utils.errors import is_out_of_memory, reason
from utils.throughput import wait

Key = TypeVar("Key", bound=Hashable)
Step = Callable[[], object]


def time_calls(step: Step, calls: int, device: torch.device) -> float:
    """Seconds of one call, on average: by events on a GPU, by the clock on a CPU."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    since = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - since) / calls


def first_result(step: Step, device: torch.device) -> float:
    """Seconds until the first call is done, compilation included."""
    since = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - since


def interleave(
    steps: dict[Key, Step], rounds: int, seconds: float, device: torch.device
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Times each step in each round; the order moves on by one from round to round.

    Args:
        steps: What to time, warm already; those that fail are taken out of it.
        rounds: Measurements of each step.
        seconds: How long a measurement lasts about.
        device: Where the steps compute.

    Returns:
        Seconds of a call in each round, and why the steps that were taken out failed.
    """
    failures: dict[Key, str] = {}

    def guarded(key: Key, calls: int) -> float:
        try:
            return time_calls(steps[key], calls, device)
        except Exception as error:  # of whatever network; it must not take the others' numbers with it
            failures[key] = why_it_failed(error)
            steps.pop(key)
            return seconds

    calls = {key: max(1, round(seconds / guarded(key, 1))) for key in list(steps)}
    times: dict[Key, list[float]] = {key: [] for key in steps}
    for turn in range(rounds):
        for key in in_turn(steps, turn):
            times[key].append(guarded(key, calls[key]))
    return {key: times[key] for key in steps}, failures


def in_turn(keys: Iterable[Key], turn: int) -> list[Key]:
    """The order of a round, which moves on by one from round to round."""
    order = list(keys)
    shift = turn % max(len(order), 1)
    return order[shift:] + order[:shift]


def why_it_failed(error: Exception) -> str:
    """What became of a step, in a few words where memory ran out and else in a line."""
    torch.cuda.empty_cache()  # does nothing where CUDA was not used
    return "out of memory" if is_out_of_memory(error) else reason(error)
