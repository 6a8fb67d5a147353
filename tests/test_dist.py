"""Rank, world and device, alone and with a second process."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from helpers_unit import ALONE, ROOT, batches, plain_training, small_network, train, training_of
from torch import nn

from utils.dist import World, barrier, broadcast_buffers, choose_device, same_on_all_ranks, sum_over_ranks, world
from utils.engine import evaluate
from utils.errors import UserError
from utils.optim import Precision

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def alone(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def pretend_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


# Without a launcher


def test_without_a_launcher_a_process_is_alone(alone):
    with world("cpu") as here:
        assert here == World(0, 1, torch.device("cpu"))
        assert here.is_main
        assert not torch.distributed.is_initialized()


def test_a_launcher_of_one_process_needs_no_group(monkeypatch):
    for name, value in zip(NAMES, ("0", "1", "0", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with world("cpu") as here:
        assert (here.rank, here.size) == (0, 1)
        assert not torch.distributed.is_initialized()


def test_alone_nothing_is_exchanged():
    values = torch.tensor([1, 2])
    assert sum_over_ranks(values) is values
    assert values.tolist() == [1, 2]
    norm = nn.BatchNorm2d(2)
    broadcast_buffers(norm)
    barrier()
    assert same_on_all_ranks(3, torch.device("cpu"))
    assert norm.running_var.tolist() == [1, 1]


def test_only_rank_0_is_the_main_one():
    assert [World(rank, 3, torch.device("cpu")).is_main for rank in range(3)] == [True, False, False]


# Devices


@pytest.mark.parametrize(("name", "gpus", "device"), [("cpu", 2, "cpu"), ("auto", 0, "cpu"), ("cpu", 0, "cpu")])
def test_the_cpu_is_taken_when_asked_for_or_alone_there(monkeypatch, name, gpus, device):
    pretend_gpus(monkeypatch, gpus)
    assert choose_device(name, 0, 1) == torch.device(device)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch, name):
    pretend_gpus(monkeypatch, 2)
    assert [choose_device(name, rank, 2) for rank in range(2)] == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch):
    pretend_gpus(monkeypatch, 0)
    with pytest.raises(UserError, match="--device cpu"):
        choose_device("cuda", 0, 1)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_more_processes_than_gpus_are_an_error(monkeypatch, name):
    pretend_gpus(monkeypatch, 2)
    with pytest.raises(UserError, match=r"3 processes on a machine with 2 GPU\(s\)"):
        choose_device(name, 0, 3)


# Two processes

PROGRAM = """
import json, sys, torch
from helpers_unit import batches, plain_training, small_network, train, training_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from utils.dist import barrier, broadcast_buffers, same_on_all_ranks, sum_over_ranks, world
from utils.engine import evaluate
from utils.errors import UserError
from utils.optim import Precision

seen = {}
with world("cpu") as here:
    seen["world"] = [here.rank, here.size, here.local_size, here.device.type, here.is_main]
    seen["sum"] = sum_over_ranks(torch.tensor([here.rank + 1, 10])).tolist()
    numbers = (7, 0, here.rank, -here.rank, 5 - here.rank)
    seen["same"] = [same_on_all_ranks(number, here.device) for number in numbers]
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(here.rank + 5)
    broadcast_buffers(norm)
    seen["buffers"] = norm.running_mean.tolist()
    data = batches(5, 4)
    score = evaluate(small_network(), data[:4] if here.rank == 0 else data[4:], here, Precision("fp32", "cpu"))
    seen["score"] = [score.images, score.correct1, score.correct5, score.loss]

    network, config = small_network(), plain_training(TRAIN__ACCUMULATION_STEPS=2, DATA__BATCH_SIZE=2)
    share = [(images[here.rank :: 2], targets[here.rank :: 2]) for images, targets in data]
    training = training_of(network, 5, config, world=here, model=DistributedDataParallel(network))
    for group in training.optimizer.param_groups:
        group["initial_lr"] = 0.02
    training.scheduler.base_values = [0.02 for _ in training.scheduler.base_values]
    reports = train(training, share)
    seen["loss"] = [report.loss for report in reports]
    seen["grad_norm"] = [report.grad_norm for report in reports]
    seen["weights"] = [parameter.flatten().tolist() for parameter in network.parameters()]

    criterion = nn.CrossEntropyLoss()
    lost = lambda x, y: criterion(x, y) * (float("nan") if here.rank == 1 else 1.0)
    network = small_network()
    try:
        train(training_of(network, 2, world=here, model=DistributedDataParallel(network), criterion=lost), data[:2])
    except UserError as error:
        seen["error"] = str(error)
    barrier()
seen["left"] = not torch.distributed.is_initialized()
json.dump(seen, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes saw of each other."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fixed = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fixed |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder / f"{rank}.json")],
            env={**os.environ, **fixed, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_know_each_other_and_part(pair):
    assert [seen["world"] for seen in pair] == [[0, 2, 2, "cpu", True], [1, 2, 2, "cpu", False]]
    assert [seen["left"] for seen in pair] == [True, True]


@pytest.mark.slow
def test_sums_reach_all_ranks(pair):
    assert [seen["sum"] for seen in pair] == [[3, 20], [3, 20]]


@pytest.mark.slow
def test_all_ranks_learn_whether_they_agree(pair):
    assert [seen["same"] for seen in pair] == [[True, True, False, False, False]] * 2


@pytest.mark.slow
def test_buffers_are_rank_0s_everywhere(pair):
    assert [seen["buffers"] for seen in pair] == [[5, 5], [5, 5]]


@pytest.mark.slow
def test_a_score_does_not_depend_on_who_scored_what(pair):
    alone = evaluate(small_network(), batches(5, 4), ALONE, Precision("fp32", "cpu"))
    for seen in pair:
        assert seen["score"][:3] == [alone.images, alone.correct1, alone.correct5]
        assert seen["score"][3] == pytest.approx(alone.loss, rel=1e-6)


@pytest.mark.slow
def test_two_ranks_with_accumulation_train_as_one_with_whole_batches(pair):
    data = batches(5, 4)
    joined = [tuple(map(torch.cat, zip(*data[start : start + 2], strict=True))) for start in (0, 2, 4)]
    network = small_network()
    training = training_of(network, 3, plain_training())
    training.scheduler.base_values = [0.02 for _ in training.scheduler.base_values]
    reports = train(training, joined)
    for seen in pair:
        assert seen["loss"] == pytest.approx([report.loss for report in reports], rel=1e-9)
        assert seen["grad_norm"] == pytest.approx([report.grad_norm for report in reports], rel=1e-9)
        for found, parameter in zip(seen["weights"], network.parameters(), strict=True):
            assert found == pytest.approx(parameter.flatten().tolist(), rel=1e-7, abs=1e-9)


@pytest.mark.slow
def test_a_loss_that_one_rank_lost_ends_all_of_them(pair):
    assert all("the loss became nan" in seen["error"] for seen in pair)
