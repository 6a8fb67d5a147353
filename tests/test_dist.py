"""Rank, world and device, alone and with a second process."""

import copy
import itertools
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers_unit import (
    ALONE,
    batches,
    fine,
    plain_training,
    said_by,
    small_network,
    start_ranks,
    to_score,
    train,
    training_of,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from utils import trainer
from utils.dist import (
    World,
    any_rank,
    broadcast_buffers,
    check_alike,
    choose_device,
    gather,
    gather_objects,
    join_world,
    sum_over_ranks,
    together,
)
from utils.engine import Watch, evaluate, train_one_epoch
from utils.errors import BrokenDataError, LostRankError, Stopped, UserError
from utils.precision import Precision
from utils.trainer import share_gradients

FP32 = Precision("fp32", "cpu")
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
    with join_world("cpu") as world:
        assert world == World(0, 1, torch.device("cpu"))
        assert world.is_main
        assert not torch.distributed.is_initialized()


def test_a_launcher_of_one_process_needs_no_group(monkeypatch):
    for name, value in zip(NAMES, ("0", "1", "0", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with join_world("cpu") as world:
        assert (world.rank, world.size) == (0, 1)
        assert not torch.distributed.is_initialized()


def test_alone_nothing_is_exchanged():
    values = torch.tensor([1, 2])
    assert sum_over_ranks(values) is values
    assert values.tolist() == [1, 2]
    norm = nn.BatchNorm2d(2)
    broadcast_buffers(norm)
    assert norm.running_var.tolist() == [1, 1]
    assert gather(torch.tensor([1.0, math.nan])).isnan().tolist() == [[False, True]]
    assert [any_rank(flag, torch.device("meta")) for flag in (False, True)] == [False, True]  # with no device's help
    assert gather_objects({"a": 1}) == [{"a": 1}]


def test_alone_what_fails_is_raised_as_it_is():
    error = BrokenDataError("a.png is broken")
    with pytest.raises(BrokenDataError) as caught, together():
        raise error
    assert caught.value is error
    with together():
        pass


@pytest.fixture
def fail(monkeypatch):
    """Fails with an error in a group of two that was never formed."""
    for name, value in zip(NAMES, ("1", "2", "1", "2"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *arguments, **settings: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr("utils.dist._fresh_store", lambda *arguments: None)

    def fail_with(error):
        with join_world("cpu", 30):
            raise error

    return fail_with


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), UserError("disk full"), KeyError("x")])
def test_an_error_that_no_lost_rank_makes_passes_as_it_is(fail, error):
    with pytest.raises(type(error)) as caught:
        fail(error)
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:12"),
            "Connection closed by",
        ),
        (RuntimeError("[/x/gloo/tcp.cc:84] Timed out waiting 6000ms for recv. Look above\nTrace"), "Timed out w"),
        (RuntimeError("Application timeout caused pair closure"), "Application timeout"),
        (torch.distributed.DistBackendError("NCCL error\nat 0x1"), "NCCL error"),
    ],
)
def test_an_error_that_a_lost_rank_makes_says_so_in_one_line(fail, error, why):
    with pytest.raises(LostRankError, match=rf"^rank 1 lost another rank, .* for 30 s \({why}[^.]*\): see") as caught:
        fail(error)
    assert "\n" not in str(caught.value)


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


def test_a_gpu_computes_float32_in_full(monkeypatch):
    pretend_gpus(monkeypatch, 1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.backends.cuda.matmul.allow_tf32 = True  # as an environment variable of NVIDIA's containers has it
    choose_device("auto", 0, 1)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


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


class Told(Watch):
    """Gives this rank's alarms, one for each update, and notes what it is told."""

    def __init__(self, alarms=()):
        self._alarms, self.told = iter(alarms), []

    def alarm(self):
        return next(self._alarms, (0, False))

    def on_broken(self, complaints):
        self.told.append(complaints)

    def on_update(self, signal, failed):
        self.told.append([signal, failed])


def meet():
    """What a process sees of another one."""
    with join_world("cpu", 60) as world:
        seen = {
            "world": [world.rank, world.size, world.local_size, world.device.type, world.is_main],
            "sum": sum_over_ranks(torch.tensor([world.rank + 1, 10])).tolist(),
            "gather": gather(torch.tensor([world.rank, 5.0 if world.rank == 0 else math.nan])).tolist(),
            "any": [any_rank(flag, world.device) for flag in (True, False, world.rank == 0, world.rank == 1)],
            "objects": gather_objects({"rank": world.rank, "text": "x" * world.rank}),
            "together": [fail_together(world, failing) for failing in ((), (0,), (1,), (0, 1), ())],
            "alike": know_alike(world),
            "apart": train_apart(world),
            "score": score_shares(world),
            "stops": stop_evaluations(world),
            "complaints": meet_broken_images(world),
            "alarms": raise_alarms(world),
            "lost": lose_a_loss(world),
            "left_out": leave_out_an_update(world),
        }
        norm = nn.BatchNorm1d(2)
        norm.running_mean.fill_(world.rank + 5)
        broadcast_buffers(norm)
        seen["buffers"] = norm.running_mean.tolist()
        seen["own_statistics"] = keep_own_statistics(world)
        seen |= train_shares(world)
        seen["pauses"] = [pauses_before_a_fork()]
    seen["pauses"].append(pauses_before_a_fork())
    seen["left"] = not torch.distributed.is_initialized()
    return seen


def pauses_before_a_fork():
    with mock.patch("time.sleep", wraps=time.sleep) as sleep:
        child = os.fork()
        if child == 0:
            os._exit(0)
    os.waitpid(child, 0)
    return sleep.call_count


def fail_together(world, failing):
    try:
        with together():
            if world.rank in failing:
                raise BrokenDataError(f"rank {world.rank} has no disk")
    except UserError as error:
        return str(error)
    return None


def know_alike(world):
    """What is said where both ranks know the same, where rank 1 knows another value, and where it knows one more."""
    said = []
    for own in ({}, {"SEED": world.rank}, {"class 1": "cat"} if world.rank else {}):
        try:
            check_alike({"the precision": "bf16", **own})
            said.append("")
        except UserError as error:
            said.append(str(error))
    return said


def train_apart(world):
    """What is said where ranks would train on other data, in folders of their own."""
    data = SimpleNamespace(classes=["a"], images=8 + world.rank, steps_per_epoch=2, loader=DataLoader([]))
    task = SimpleNamespace(
        open_data=lambda *_: (data, data), build_network=lambda *_: small_network(), load_to_start=None
    )
    config = plain_training(OUTPUT="nowhere", DATA__DATA_PATH=f"folder of rank {world.rank}")
    try:
        trainer.train(config, world, FP32, task)
    except UserError as error:
        return str(error)


def score_shares(world):
    data = batches(5, 4)
    share = data[:4] if world.rank == 0 else data[4:]
    score = evaluate(small_network(), to_score(share, images=20, rounds=1), world, FP32)
    return [score.images, score.correct1, score.correct5, score.loss]


def stop_evaluations(world):
    """How evaluations end where one rank must stop, at its first batch or its last."""
    cases = itertools.product(range(2), (0, 2), ("first", "last"), ("broken", "asked"))
    return {" ".join(map(str, case)): stop_evaluation(world, *case) for case in cases}


def stop_evaluation(world, rank, rounds, at, why):
    """How an evaluation of 3 batches on rank 0 and 2 on rank 1 ends, and how many batches this rank scored."""
    count, scored, network = 3 - world.rank, [], small_network()
    data, number = batches(count, 4), 0 if at == "first" else count - 1
    asked, stops = itertools.count(), world.rank == rank
    if stops and why == "broken":
        data[number] = (*data[number][:2], ["", "a.png is broken", "", ""])
    network.register_forward_hook(lambda module, inputs, output: scored.append(None))
    signals = (lambda: 15 * (next(asked) >= number)) if stops and why == "asked" else int
    try:
        evaluate(network, to_score(data, rounds=rounds), world, FP32, asked_to_stop=signals)
    except (BrokenDataError, Stopped) as error:
        return [str(error), len(scored)]


def meet_broken_images(world):
    """What a watch is told when rank 1 meets a broken image, and what the default one makes of it."""
    data = batches(2, 4)
    if world.rank == 1:
        data[1] = (*data[1][:2], ["a.png", "b.png", "", ""])
    watch, network = Told(), small_network()
    train_one_epoch(in_ddp(network, 2, world), data, 10, watch)
    network = small_network()
    training = in_ddp(network, 2, world)
    try:
        train_one_epoch(training, data, 10, Watch())
    except BrokenDataError as error:
        return [watch.told, str(error), training.progress.updates]


def raise_alarms(world):
    alarms = [(15, False), (0, False), (0, False)] if world.rank == 1 else [(0, False), (0, True), (0, False)]
    watch = Told(alarms)
    train_one_epoch(in_ddp(small_network(), 3, world), batches(3, 4), 10, watch)
    return watch.told


def losing_on_rank_1(world, at):
    calls = itertools.count()
    return lambda x, y: nn.functional.cross_entropy(x, y) + (math.nan if next(calls) == at and world.rank == 1 else 0)


def lose_a_loss(world):
    """What ends a run in which rank 1's loss is no number, and what is left of it."""
    network = small_network()
    training = in_ddp(network, 2, world, criterion=losing_on_rank_1(world, 1))
    states = []
    watch, losses = Told(), []
    watch.on_not_finite = lambda what, of_ranks: losses.extend(of_ranks) or Watch.on_not_finite(watch, what, of_ranks)
    watch.on_update = lambda signal, failed: states.append(copy.deepcopy(network.state_dict()))
    try:
        train_one_epoch(training, batches(2, 4), 10, watch)
    except UserError as error:
        kept = all(torch.equal(value, states[0][name]) for name, value in network.state_dict().items())
        return [str(error), list(map(math.isfinite, losses)), kept, training.progress.updates]


def leave_out_an_update(world):
    training = in_ddp(
        small_network(), 3, world, criterion=losing_on_rank_1(world, 1), scaler=torch.amp.GradScaler("cpu")
    )  # fmt: skip
    train_one_epoch(training, batches(3, 4), 10, Watch())
    progress = training.progress
    return [progress.place, progress.updates, progress.left_out, training.network[1].weight.flatten().tolist()]


def in_ddp(network, steps, world, config=None, **others):
    return training_of(network, steps, config, world=world, model=DistributedDataParallel(network), **others)


def keep_own_statistics(world):
    """A batch norm's running mean of ranks that started with other ones, after two steps of training."""
    network = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, momentum=0.0))
    model = share_gradients(network, world)
    network[1].running_mean.fill_(world.rank + 5)
    for _ in range(2):
        model(torch.randn(2, 1)).sum().backward()
    return network[1].running_mean.tolist()


def train_shares(world):
    network, config = small_network(), plain_training(TRAIN__ACCUMULATION_STEPS=2, DATA__BATCH_SIZE=2)
    share = fine((images[world.rank :: 2], targets[world.rank :: 2]) for images, targets, _ in batches(5, 4))
    training = in_ddp(network, 5, world, config)
    for group in training.optimizer.param_groups:
        group["initial_lr"] = 0.02
    training.scheduler.base_values = [0.02 for _ in training.scheduler.base_values]
    reports = train(training, share)
    return {
        "loss": [report.loss for report in reports],
        "grad_norm": [report.grad_norm for report in reports],
        "weights": [parameter.flatten().tolist() for parameter in network.parameters()],
    }


@pytest.fixture(scope="module")
def pair():
    """What two processes saw of each other."""
    return [said_by(process) for process in start_ranks("test_dist", "meet")]


@pytest.mark.slow
def test_two_processes_know_each_other_and_part(pair):
    assert [seen["world"] for seen in pair] == [[0, 2, 2, "cpu", True], [1, 2, 2, "cpu", False]]
    assert [seen["left"] for seen in pair] == [True, True]


@pytest.mark.slow
def test_a_process_of_several_pauses_before_it_forks(pair):
    pauses = int(sys.version_info < (3, 12))  # newer ones need none
    assert [seen["pauses"] for seen in pair] == [[pauses, 0]] * 2


@pytest.mark.slow
def test_sums_reach_all_ranks(pair):
    assert [seen["sum"] for seen in pair] == [[3, 20], [3, 20]]


@pytest.mark.slow
def test_what_is_gathered_stands_in_the_order_of_the_ranks_and_may_be_no_number(pair):
    for seen in pair:
        assert seen["gather"][0] == [0, 5]
        assert seen["gather"][1][0] == 1
        assert math.isnan(seen["gather"][1][1])
        assert seen["objects"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x"}]


@pytest.mark.slow
def test_a_flag_of_any_rank_is_known_to_all(pair):
    assert [seen["any"] for seen in pair] == [[True, False, True, True]] * 2


@pytest.mark.slow
def test_what_fails_on_one_rank_fails_on_all(pair):
    of_0, of_1 = "rank 0 has no disk", "rank 1 has no disk"
    assert [seen["together"] for seen in pair] == [[None, of_0, of_1, of_0, None]] * 2


@pytest.mark.slow
def test_ranks_that_do_not_know_the_same_are_refused_on_all(pair):
    for seen in pair:
        same, other, more = seen["alike"]
        assert same == ""
        assert other.startswith("SEED is 0 on rank 0 and 1 on rank 1: ")
        assert more.startswith("class 1 is None on rank 0 and cat on rank 1: ")
        assert seen["apart"].startswith("the number of training images is 8 on rank 0 and 9 on rank 1: ")


def test_buffers_are_rank_0s_everywhere(pair):
    assert [seen["buffers"] for seen in pair] == [[5, 5], [5, 5]]


@pytest.mark.slow
def test_training_exchanges_no_running_statistics(pair):
    assert [seen["own_statistics"] for seen in pair] == [[5], [6]]


@pytest.mark.slow
def test_a_score_does_not_depend_on_who_scored_what(pair):
    alone = evaluate(small_network(), to_score(batches(5, 4)), ALONE, FP32)
    for seen in pair:
        assert seen["score"][:3] == [alone.images, alone.correct1, alone.correct5]
        assert seen["score"][3] == pytest.approx(alone.loss, rel=1e-6)


@pytest.mark.slow
def test_two_ranks_with_accumulation_train_as_one_with_whole_batches(pair):
    data = batches(5, 4)
    joined = fine(tuple(torch.cat([batch[i] for batch in data[at : at + 2]]) for i in (0, 1)) for at in (0, 2, 4))
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
def test_a_loss_that_is_no_number_on_one_rank_is_seen_by_all_before_the_update(pair):
    message = "the loss became nan on rank 1 at update 2 of epoch 0"
    assert [seen["lost"] for seen in pair] == [[message, [True, False], True, 1]] * 2


@pytest.mark.slow
def test_under_a_loss_scaler_all_ranks_leave_out_an_update_that_one_lost(pair):
    assert pair[0]["left_out"][:3] == [3, 2, 1]
    assert pair[0]["left_out"] == pair[1]["left_out"]


@pytest.mark.slow
def test_complaints_of_one_rank_are_told_on_all_before_the_update(pair):
    assert [seen["complaints"] for seen in pair] == [[[[0, False], ["a.png", "b.png"], [0, False]], "a.png", 1]] * 2


@pytest.mark.slow
def test_alarms_of_any_rank_are_told_on_all(pair):
    assert [seen["alarms"] for seen in pair] == [[[15, False], [0, True], [0, False]]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("why", "message"), [("broken", "a.png is broken: mend or remove it"), ("asked", "stopped by signal 15")]
)
def test_an_evaluation_that_one_rank_must_end_ends_on_all_at_the_same_batch(pair, rank, why, message):
    assert [seen["stops"][f"{rank} 2 first {why}"] for seen in pair] == [[message, 0]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("why", ["broken", "asked"])
def test_an_evaluation_that_one_rank_must_end_late_ends_on_all(pair, rank, rounds, why):
    message = {"broken": "a.png is broken: mend or remove it", "asked": "stopped by signal 15"}[why]
    assert [seen["stops"][f"{rank} {rounds} last {why}"][0] for seen in pair] == [message] * 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_where_no_rounds_are_known_an_evaluation_ends_after_the_last_batch(pair, rank):
    assert [seen["stops"][f"{rank} 0 first asked"] for seen in pair] == [
        ["stopped by signal 15", 3],
        ["stopped by signal 15", 2],
    ]


# A rank that is lost


def lose(how, lost, timeout, where, folder):
    """Loses a rank; gives what the other one says at its next exchange, and after how many seconds."""
    wait_for_both(Path(folder))
    try:
        with join_world("cpu", float(timeout)) as world:
            gather(torch.zeros(1))
            training = in_ddp(small_network(), 2, world)
            since = time.monotonic()
            if world.rank == int(lost):
                os.kill(os.getpid(), {"dies": signal.SIGKILL, "hangs": signal.SIGSTOP}[how])
            exchange_in(where, training)
    except LostRankError as error:
        return [str(error), time.monotonic() - since]


def wait_for_both(folder):
    """Lets both processes come to be, which on a busy machine may take one of them longer than a short timeout."""
    (folder / os.environ["RANK"]).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.02)


def exchange_in(where, training):
    if where == "training":
        train_one_epoch(training, batches(2, 4), 10, Watch())
    elif where == "evaluation":
        evaluate(small_network(), to_score(batches(2, 4), rounds=2), training.world, FP32)
    with together():
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "lost", "timeout", "where"),
    [("dies", 0, 60, "training"), ("dies", 1, 60, "evaluation"), ("hangs", 0, 5, "training"), ("hangs", 1, 5, "words")],
)
def test_the_other_rank_ends_in_one_line_when_one(how, lost, timeout, where, tmp_path):
    processes = start_ranks("test_dist", "lose", how, lost, timeout, where, tmp_path)
    try:
        said, seconds = said_by(processes[1 - lost])
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert said.startswith(f"rank {1 - lost} lost another rank, which died or did not answer for {timeout} s (")
    assert said.endswith("): see what that rank said, then start the same command again")
    assert "\n" not in said
    assert ".cc" not in said
    assert len(said) < 250
    if how == "hangs":
        assert timeout - 1 <= seconds <= 2 * timeout
    else:
        assert seconds < timeout / 2
