"""Rank, world and device, and sums over ranks; without a process group every function is a no-op."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from utils.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all of them.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: The device that this process computes on.
        local_size: Number of processes on this machine.
    """

    rank: int
    size: int
    device: torch.device
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes."""
        return self.rank == 0


def choose_device(name: str, local_rank: int, local_size: int) -> torch.device:
    """The device of a process.

    Args:
        name: 'auto' (a GPU where there is one), 'cpu' or 'cuda'.
        local_rank: Number of the process on its machine.
        local_size: Number of processes on that machine.

    Raises:
        UserError: If GPUs are asked for and there are none, or too few.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("DEVICE is cuda but PyTorch sees no GPU on this machine: use --device cpu or auto")
    if local_size > torch.cuda.device_count():
        raise UserError(
            f"{local_size} processes on a machine with {torch.cuda.device_count()} GPU(s): "
            "start at most one a GPU (--nproc_per_node), or use --device cpu"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Joins the processes that `torchrun` or `torch.distributed.launch` started, and leaves them at the end.

    Args:
        device: As in `choose_device`.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank, local_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(rank, size, chosen)
        return
    if chosen.type == "cuda":
        torch_dist.init_process_group("nccl", device_id=chosen)
    else:
        torch_dist.init_process_group("gloo")
    try:
        yield World(rank, size, chosen, local_size)
    finally:
        torch_dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Adds a tensor over all ranks, in place, and returns it."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(values)
    return values


def broadcast_buffers(module: nn.Module) -> None:
    """Gives every rank rank 0's buffers: outside SyncBatchNorm each rank keeps running statistics of its own."""
    if torch_dist.is_initialized():
        for buffer in module.buffers():
            torch_dist.broadcast(buffer, src=0)


def same_on_all_ranks(number: int, device: torch.device) -> bool:
    """Whether all ranks came with the same number; every rank must ask."""
    if not torch_dist.is_initialized():
        return True
    bounds = torch.tensor([number, -number], device=device)
    torch_dist.all_reduce(bounds, torch_dist.ReduceOp.MAX)
    return bounds[0].item() == -bounds[1].item()


def barrier() -> None:
    """Waits for all ranks."""
    if torch_dist.is_initialized():
        torch_dist.barrier()
