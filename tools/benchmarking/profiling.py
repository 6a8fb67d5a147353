"""Writes where the time of a subject's steps goes: its top operators as text, and a trace for chrome://tracing."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tools.benchmarking.subjects import Subject
from utils.throughput import wait

_STEPS, _OPERATORS = 3, 30


def write_profile(step: Callable[[], object], subject: Subject, folder: Path, device: torch.device) -> None:
    """Profiles a few steps of a subject into two files that are named after it."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(_STEPS):
            step()
        wait(device)
    path = folder / re.sub(r"[^\w.]+", "_", str(subject))
    averages = profiler.key_averages(group_by_input_shape=True)
    table = averages.table(sort_by=f"self_{device.type}_time_total", row_limit=_OPERATORS, max_name_column_width=60)
    path.with_name(path.name + ".txt").write_text(f"{subject}: {_STEPS} steps\n{table}\n")
    profiler.export_chrome_trace(str(path.with_name(path.name + ".json")))
