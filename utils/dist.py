"""Rank, world and device, and sums over ranks; without a process group every function is a no-op."""

import datetime
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from utils.errors import LostRankError, UserError, listing, reason

_POLL_S = 0.02
_FORK_PAUSE_S = 0.1


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


def choose_device(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The device of a process; a GPU computes fp32 in full from then on, where convolutions at least would be TF32.

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
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False  # as torch has it unless TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set
    return torch.device("cuda", local_rank)


@contextmanager
def join_world(device: str = "auto", timeout_s: float = 600) -> Iterator[World]:
    """Joins the processes that `torchrun` or `torch.distributed.launch` started, and leaves them at the end.

    Args:
        device: As in `choose_device`.
        timeout_s: Seconds after which a rank that does not answer counts as lost.

    Raises:
        LostRankError: If another rank dies or hangs.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank, local_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(rank, size, chosen)
        return
    try:
        timeout = datetime.timedelta(seconds=timeout_s)
        store = _fresh_store(rank, size, timeout)
        settings = {"store": store, "rank": rank, "world_size": size, "timeout": timeout}
        if chosen.type == "cuda":
            torch_dist.init_process_group("nccl", device_id=chosen, **settings)
        else:
            torch_dist.init_process_group("gloo", **settings)
            if sys.version_info < (3, 12):
                os.register_at_fork(before=_pause_before_fork)
        yield World(rank, size, chosen, local_size)
    except RuntimeError as error:
        if not _lost_rank(error):
            raise
        why = reason(error).rpartition("] ")[2].partition(". ")[0]  # without gloo's source line, and its advice
        raise LostRankError(
            f"rank {rank} lost another rank, which died or did not answer for {timeout_s:g} s ({why}): "
            "see what that rank said, then start the same command again"
        ) from None
    torch_dist.destroy_process_group()  # not after an error, when it could wait for ranks that are gone


def _pause_before_fork() -> None:
    """Lets gloo's threads leave Python, as they do right after a message.

    Before Python 3.12 a process that is forked while such a thread makes its thread state hangs at its start.
    """
    if torch_dist.is_initialized():
        time.sleep(_FORK_PAUSE_S)


def _fresh_store(rank: int, size: int, timeout: datetime.timedelta) -> torch_dist.Store:
    """The store through which the ranks find one another, under a name that is new for each start.

    torchrun keeps one store over restarts, in which a rank would find the addresses of those that died. So rank 0
    makes up a name and gives it to every rank that greets it now; what dead ones left behind does no harm.
    """
    store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    store.set_timeout(timeout)
    if rank > 0:
        greeting = uuid.uuid4().hex
        store.set(f"hello {rank}", greeting)
        name = store.get(f"welcome {greeting}").decode()
        store.set(f"thanks {name} {rank}", "")
        return torch_dist.PrefixStore(name, store)
    name, patience = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing = list(range(1, size))
    while missing:
        if time.monotonic() > patience:
            raise torch_dist.DistStoreError(f"ranks {listing(missing)} did not start")
        for other in missing:
            if store.check([f"hello {other}"]):
                store.set(f"welcome {store.get(f'hello {other}').decode()}", name)
        time.sleep(_POLL_S)
        missing = [other for other in missing if not store.check([f"thanks {name} {other}"])]
    return torch_dist.PrefixStore(name, store)


def _lost_rank(error: RuntimeError) -> bool:
    # Where several messages wait for the lost rank, gloo tells of one timeout, and of the others that it gave them up.
    from_gloo = any(words in str(error).lower() for words in ("gloo", "pair closure"))
    return isinstance(error, torch_dist.DistError) or from_gloo


def sum_over_ranks(values: Tensor) -> Tensor:
    """Adds a tensor over all ranks, in place, and returns it."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(values)
    return values


def broadcast_buffers(module: nn.Module) -> None:
    """Gives every rank rank 0's buffers: outside SyncBatchNorm running statistics took in its own last images."""
    if torch_dist.is_initialized():
        for buffer in module.buffers():
            torch_dist.broadcast(buffer, src=0)


def gather(values: Tensor) -> Tensor:
    """The tensors [n] of all ranks as [ranks, n], in the order of the ranks."""
    if not torch_dist.is_initialized():
        return values[None]
    table = values.new_empty(torch_dist.get_world_size(), len(values))
    torch_dist.all_gather(list(table.unbind()), values)
    return table


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on some rank."""
    if not torch_dist.is_initialized():
        return flag
    return bool(gather(torch.tensor([float(flag)], device=device)).any())


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, of types that pickle can carry, in the order of the ranks."""
    if not torch_dist.is_initialized():
        return [value]
    values = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(values, value)
    return values


def check_alike(
    facts: Mapping[str, Any],
    advice: str = "give all of them the same command and data, and GPUs of several kinds a --precision",
) -> None:
    """Refuses ranks that do not know the same: what all of them must have alike; every rank must call.

    Args:
        facts: What this rank knows, by what to call it.
        advice: What to do where it differs.

    Raises:
        UserError: On all ranks, the first that differs.
    """
    first, *others = gather_objects(dict(facts))
    for rank, other in enumerate(others, 1):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise UserError(f"{name} is {first.get(name)} on rank 0 and {other.get(name)} on rank {rank}: {advice}")


@contextmanager
def together() -> Iterator[None]:
    """What fails on one rank fails on all: every rank enters, and no rank may wait for another inside.

    Raises:
        UserError: On all ranks, the first rank's that has one.
    """
    problem = ""
    try:
        yield
    except UserError as error:
        if not torch_dist.is_initialized():
            raise
        problem = str(error)
    for other in gather_objects(problem):
        if other:
            raise UserError(other)
