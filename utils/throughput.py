"""Images per second of a network's forward pass."""

import time
from dataclasses import dataclass

import torch
from torch import nn
from yacs.config import CfgNode

from utils.precision import Precision, memory_format

_WARMUP = 3  # batches before the clock starts
_SECONDS = 10.0  # that a measurement lasts at least


@dataclass(frozen=True)
class Throughput:
    """Images per second, and under which conditions."""

    images_per_s: float
    batch_size: int
    image_size: int
    precision: str
    device: str
    cpu_threads: int

    def __str__(self) -> str:
        return (
            f"throughput {self.images_per_s:.1f} images/s (batch {self.batch_size}, {self.image_size} x "
            f"{self.image_size}, {self.precision}, {self.device}, {self.cpu_threads} CPU threads)"
        )


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def measure(model: nn.Module, config: CfgNode, device: torch.device, precision: Precision) -> Throughput:
    """Measures a network's forward pass in evaluation mode, at the configured batch and image size."""
    layout = memory_format(config)
    size, batch = config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE
    images = torch.randn(batch, config.MODEL.GMA.IN_DIM, size, size, device=device).to(memory_format=layout)
    model.to(device, memory_format=layout).eval()
    with precision.autocast():
        for _ in range(_WARMUP):
            model(images)
        wait(device)
        batches, start, elapsed = 0, time.perf_counter(), 0.0
        while elapsed < _SECONDS:
            model(images)
            wait(device)
            batches += 1
            elapsed = time.perf_counter() - start
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Throughput(batches * batch / elapsed, batch, size, precision.name, name, torch.get_num_threads())
