"""What a benchmark ran on."""

import platform
from pathlib import Path
from typing import Any

import timm
import torch

from data.build import available_cores


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores and threads, GPU if it is the device, and versions, as the report's JSON holds them."""
    machine = {
        "cpu": _processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return machine


def machine_line(machine: dict[str, Any]) -> str:
    """The same in words."""
    gpu = f"{machine['gpu']}, CUDA {machine['cuda']}, " if "gpu" in machine else ""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return f"{gpu}{machine['cpu']}, {machine['cores']} cores, {threads}, torch {machine['torch']}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
