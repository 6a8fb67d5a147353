"""What keeps a run: when it is saved, what stops it, and what becomes of a loss that is no number."""

import json
import math
import re
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import helpers_unit
import pytest
import torch
from helpers_unit import (
    ALONE,
    CPU,
    all_of,
    batches,
    equal,
    plain_training,
    said_by,
    small_network,
    start_ranks,
    to_score,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import checkpoint
from utils.classification import classification
from utils.dist import World, join_world
from utils.engine import train_one_epoch
from utils.errors import Stopped, UserError
from utils.keeper import Keeper
from utils.logger import read_metrics
from utils.metrics import Score
from utils.precision import Precision
from utils.progress import Progress
from utils.report import describe_best
from utils.trainer import build_training, evaluate_epoch, run_epochs

PLACES = 6
SCORES = {"model": Score(8, 2, 8, 1.5), "ema": Score(8, 4, 8, 1.0)}


def config_with(**changes):
    """Updates of one micro-batch, a moving average, and no checkpoint inside an epoch."""
    fixed = {"TRAIN__EMA_DECAY": 0.5, "TRAIN__SAVE_MINUTES": 0.0, "PRINT_FREQ": 2, "KEEP": 9}
    return plain_training(**{**fixed, **changes})


def training_of(config=None, lost=(), world=ALONE, network=None):
    """A training of epochs with six places, of which some, as (epoch, place), lose their loss."""
    network, progress = network or small_network(), Progress()
    model = DistributedDataParallel(network) if torch.distributed.is_initialized() else network

    def criterion(logits, targets):
        is_lost = (progress.epoch, progress.place) in lost
        return nn.functional.cross_entropy(logits, targets) + (math.nan if is_lost else 0)

    settings = {"model": model, "criterion": criterion, "progress": progress, "world": world}
    return helpers_unit.training_of(network, PLACES, config or config_with(), **settings)


class FakeData:
    """The same batches in every epoch, from the place that is asked for, with a name for each."""

    classes, images = ("a", "b", "c"), 8

    def __init__(self):
        self.loader = None

    def set_epoch(self, epoch, first_batch):
        self.loader = batches(PLACES, 4)[first_batch:]

    def names(self, epoch, places):
        return [f"{place}.png" for place in places]


def keeper_of(folder, training, config=None, signal=0):
    folder.mkdir(parents=True, exist_ok=True)
    return Keeper(config or config_with(), training, folder, FakeData(), None, SimpleNamespace(asked=lambda: signal))


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr("utils.keeper.draw_curves", lambda folder, updates_per_epoch, measures: None)


@pytest.fixture
def saved(monkeypatch):
    """The epochs and places of which checkpoints are written."""
    places, save = [], checkpoint.save_numbered

    def note(state, folder, **settings):
        places.append((state["progress"]["epoch"], state["progress"]["place"]))
        save(state, folder, **settings)

    monkeypatch.setattr(checkpoint, "save_numbered", note)
    return places


def names(folder, pattern="*.pth"):
    return sorted(path.name for path in folder.glob(pattern))


def metrics(folder):
    """The metrics without the speeds, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


# When a run is saved


@pytest.mark.parametrize(("every", "places"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4]), (4, [4]), (6, []), (9, [])])
def test_a_run_is_saved_every_so_many_updates_but_not_where_its_epoch_is_saved(tmp_path, saved, every, places):
    config, training = config_with(TRAIN__SAVE_UPDATES=every), training_of()
    keeper = keeper_of(tmp_path, training, config)
    train_one_epoch(training, batches(PLACES, 4), 2, keeper)
    keeper.wait()
    assert saved == [(0, place) for place in places]
    keeper.on_epoch(SCORES)
    keeper.wait()
    assert saved[len(places) :] == [(1, 0)]


@pytest.fixture
def update_after(tmp_path, monkeypatch):
    """Takes an update after each of some numbers of minutes: `update_after(minutes, key=value)`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("utils.keeper.time", SimpleNamespace(monotonic=lambda: clock.now))

    def run(all_minutes, **changes):
        training = training_of()
        keeper = keeper_of(tmp_path, training, config_with(**changes))
        for place, minutes in enumerate(all_minutes, 1):
            clock.now += 60 * minutes
            training.progress.place = place
            keeper.on_update(0, False)
        keeper.wait()

    return run


def test_a_run_is_saved_after_so_many_minutes_since_it_was_saved_last(saved, update_after):
    update_after((14, 1, 10, 4, 20, 20), TRAIN__SAVE_MINUTES=15.0)
    assert saved == [(0, 2), (0, 5)]


def test_a_checkpoint_that_comes_by_updates_puts_off_the_one_that_comes_by_the_clock(saved, update_after):
    update_after((10, 10, 10, 10, 10, 10), TRAIN__SAVE_MINUTES=15.0, TRAIN__SAVE_UPDATES=2)
    assert saved == [(0, 2), (0, 4)]


def test_what_is_written_is_the_run_as_it_was_when_it_was_saved(tmp_path, monkeypatch):
    go_on, save = threading.Event(), checkpoint.save_numbered

    def save_late(*arguments, **settings):
        assert go_on.wait(30)
        save(*arguments, **settings)

    monkeypatch.setattr(checkpoint, "save_numbered", save_late)
    training = training_of()
    keeper = keeper_of(tmp_path, training)
    train_one_epoch(training, batches(PLACES, 4), 2, keeper)
    before = all_of(training)
    keeper.save()
    training.progress.end_epoch()
    train_one_epoch(training, batches(PLACES, 4), 2, keeper)
    go_on.set()
    keeper.wait()
    state = checkpoint.load(tmp_path / "ckpt_epoch_0_update_6.pth")
    assert all(equal(state[part], before[part]) for part in ("model", "ema", "optimizer"))
    assert {name: state["progress"][name] for name in before["progress"]} == before["progress"]
    assert not equal(before["model"], all_of(training)["model"])


def test_a_checkpoint_is_written_before_its_copy_makes_room_for_the_next_one(tmp_path, monkeypatch):
    written = []

    def write_slowly(state, *arguments, **settings):
        time.sleep(0.1)
        written.append((state["progress"]["place"], state["model"]["1.weight"].clone()))

    monkeypatch.setattr(checkpoint, "save_numbered", write_slowly)
    training, wanted = training_of(), []
    keeper = keeper_of(tmp_path, training)
    for place in (1, 2, 3):
        training.progress.place = place
        with torch.no_grad():
            training.network[1].weight.fill_(place)
        wanted.append((place, training.network[1].weight.detach().clone()))
        keeper.save()
    keeper.wait()
    assert equal(written, wanted)


@pytest.mark.parametrize(
    ("model", "ema", "best"),
    [
        ((4, 6, 5, 5), (1, 2, 5, 6), {"epoch": 1, "of": "model", "acc1": 75.0}),
        ((4, 5, 4, 6), (4, 5, 6, 6), {"epoch": 2, "of": "ema", "acc1": 75.0}),
        ((2, 4, 1, 3), (1, 4, 4, 3), {"epoch": 1, "of": "ema", "acc1": 50.0}),  # of equals the moving average
    ],
)
def test_the_best_epoch_is_the_first_that_the_weights_or_their_moving_average_were_best_after(
    tmp_path, model, ema, best
):
    keeper = keeper_of(tmp_path, training_of())
    for scores in zip(model, ema, strict=True):
        keeper.on_epoch(dict(zip(("model", "ema"), (Score(8, correct, 8, 1.0) for correct in scores), strict=True)))
    keeper.wait()
    assert keeper.best == best
    assert checkpoint.load(tmp_path / "best.pth")["progress"]["epoch"] == best["epoch"] + 1
    assert checkpoint.load(tmp_path / "last.pth")["best"] == best


def test_a_task_is_scored_and_logged_by_its_own_measures(tmp_path, caplog):
    """The first of them chooses the best epoch."""

    @dataclass(frozen=True)
    class OfAnother:
        measures: ClassVar = {"overlap": "Overlap", "edges": "Edges"}
        images: int
        overlap: float
        edges: float
        loss: float = math.nan

    caplog.set_level("INFO")
    training = training_of()
    keeper = keeper_of(tmp_path, training)
    for overlap in (40.0, 60.0, 50.0):
        keeper.on_epoch({"model": OfAnother(8, 0.0, 99.0), "ema": OfAnother(8, overlap, 100 - overlap)})
    keeper.wait()
    assert keeper.best == {"epoch": 1, "of": "ema", "overlap": 60.0}
    assert " * EMA Overlap 60.000 Edges 40.000" in caplog.messages
    assert caplog.messages[-1] == "best so far: Overlap 60.000 of the moving average after 2 epochs"
    line = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert (line["ema_overlap"], line["edges"], line["ema_loss"]) == (60.0, 99.0, None)


@pytest.mark.parametrize(("of", "whose"), [("model", ""), ("ema", " of the moving average")])
def test_the_best_epoch_is_told_with_whose_it_is(of, whose):
    best = {"epoch": 1, "of": of, "acc1": 75.0}
    assert describe_best(best, Score.measures) == f"Acc@1 75.000{whose} after 2 epochs"


def test_only_rank_0_writes(tmp_path):
    training = training_of(world=World(1, 2, CPU))
    keeper = keeper_of(tmp_path, training, config_with(TRAIN__SAVE_UPDATES=1))
    for place in range(1, 6):
        training.progress.place = place
        keeper.on_update(0, False)
    keeper.on_epoch(SCORES)
    keeper.wait()
    with pytest.raises(Stopped):
        keeper.stop(15)
    keeper.close()
    assert list(tmp_path.iterdir()) == []


# What cannot be written


def fail_to_save(monkeypatch):
    def fail(*arguments, **settings):
        raise UserError("last.pth cannot be written (No space left on device): free some space")

    monkeypatch.setattr(checkpoint, "save_numbered", fail)


def wait_for_alarm(keeper):
    until = time.monotonic() + 30
    while keeper.alarm() == (0, False):
        assert time.monotonic() < until, "the alarm never came"
        time.sleep(0.01)


def test_a_checkpoint_that_cannot_be_written_is_told_of_before_the_next_update_and_ends_the_run_after_it(
    tmp_path, monkeypatch
):
    fail_to_save(monkeypatch)
    keeper = keeper_of(tmp_path, training_of())
    assert keeper.alarm() == (0, False)
    keeper.save()
    wait_for_alarm(keeper)
    assert keeper.alarm() == (0, True)
    with pytest.raises(UserError, match="No space left on device"):
        keeper.on_update(0, True)


def test_a_checkpoint_that_cannot_be_written_ends_a_run_that_waits_for_it(tmp_path, monkeypatch):
    fail_to_save(monkeypatch)
    keeper = keeper_of(tmp_path, training_of())
    keeper.save()
    with pytest.raises(UserError, match="No space left on device"):
        keeper.wait()


def test_a_checkpoint_that_cannot_be_written_is_not_forgotten_when_the_next_one_begins(tmp_path, monkeypatch):
    with monkeypatch.context() as broken_disk:
        fail_to_save(broken_disk)
        keeper = keeper_of(tmp_path, training_of())
        keeper.save()
        wait_for_alarm(keeper)
    keeper.save()
    assert keeper.alarm() == (0, True)
    with pytest.raises(UserError, match="No space left on device"):
        keeper.wait()


def test_a_run_whose_last_checkpoint_cannot_be_written_is_not_done(tmp_path, monkeypatch):
    fail_to_save(monkeypatch)
    with pytest.raises(UserError, match="No space left on device"):
        run(tmp_path, training_of(), config_with())


def test_metrics_that_cannot_be_written_end_the_run_too(tmp_path, monkeypatch):
    def fail(*arguments):
        raise UserError("metrics.jsonl cannot be written")

    monkeypatch.setattr("utils.keeper.log_report", fail)
    training = training_of()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written"):
        train_one_epoch(training, batches(PLACES, 4), 2, keeper_of(tmp_path, training))
    assert training.progress.place == 3


# Signals


@pytest.mark.parametrize("every", [0, 1])
def test_a_signal_stops_the_run_at_the_next_update_with_one_checkpoint_of_it(tmp_path, saved, every, caplog):
    caplog.set_level("INFO")
    training = training_of()
    keeper = keeper_of(tmp_path, training, config_with(TRAIN__SAVE_UPDATES=every), signal=10)
    with pytest.raises(Stopped) as caught:
        train_one_epoch(training, batches(PLACES, 4), 2, keeper)
    assert caught.value.signal == 10
    assert saved == [(0, 1)]
    assert names(tmp_path) == ["ckpt_epoch_0_update_1.pth", "last.pth"]
    state, now = checkpoint.load(tmp_path / "last.pth"), all_of(training)
    assert all(equal(state[part], now[part]) for part in ("model", "ema", "optimizer"))
    assert state["progress"]["place"] == 1
    assert "stopped by signal 10" in caplog.text


def test_a_signal_during_the_evaluation_keeps_the_whole_epoch(tmp_path, saved):
    training = training_of()
    keeper = keeper_of(tmp_path, training)
    keeper.asked_to_stop = lambda: 15
    with pytest.raises(Stopped):
        run_epochs(config_with(), classification(), training, FakeData(), EVAL_DATA, keeper)
    assert saved == [(0, PLACES)]


# Scores


def test_kernels_are_not_measured_for_the_sizes_of_validation_images(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    training, measured = training_of(), []

    def finish(images):
        measured.append(torch.backends.cudnn.benchmark)
        return images

    keeper = keeper_of(tmp_path, training)
    evaluate_epoch(config_with(), classification(), training, replace(EVAL_DATA, finish=finish), keeper)
    assert measured and not any(measured)
    assert torch.backends.cudnn.benchmark


# A loss that is no number


EVAL_DATA = to_score(batches(2, 4), rounds=2)


def run(folder, training, config):
    """A whole run of two epochs; its keeper."""
    keeper = keeper_of(folder, training, config)
    try:
        run_epochs(config, classification(), training, FakeData(), EVAL_DATA, keeper)
    finally:
        keeper.close()
    return keeper


def test_by_default_a_loss_that_is_no_number_ends_the_run_and_its_samples_are_listed(tmp_path, saved):
    with pytest.raises(UserError) as caught:
        run(tmp_path, training_of(lost={(1, 2)}), config_with())
    listed = tmp_path / "not_finite_epoch_1_update_3.txt"
    assert listed.read_text() == "rank 0\t2.png\n"
    message = str(caught.value)
    assert message.startswith("the loss became nan on rank 0 at update 3 of epoch 1; it was not taken, and ")
    for part in (str(listed), "of rank 0: 2.png", "TRAIN.BASE_LR", "TRAIN.ON_NONFINITE skip"):
        assert part in message
    assert "\n" not in message
    assert saved == [(1, 0)]
    assert names(tmp_path) == ["best.pth", "ckpt_epoch_1.pth", "last.pth"]


def test_an_update_that_is_left_out_names_its_samples_and_does_no_harm(tmp_path, saved, caplog):
    config = config_with(TRAIN__ON_NONFINITE="skip")
    training = training_of(lost={(0, 0), (1, 5)})
    run(tmp_path, training, config)
    assert (training.progress.epoch, training.progress.updates, training.progress.left_out) == (2, 2 * PLACES - 2, 2)
    assert saved == [(1, 0), (2, 0)]
    lines = [record.message for record in caplog.records if "it is left out" in record.message]
    assert [line.split(";")[0] for line in lines] == [
        f"the loss became nan on rank 0 at update {place} of epoch {epoch}" for epoch, place in ((0, 1), (1, 6))
    ]
    assert "5.png" in lines[1]
    assert names(tmp_path, "*.txt") == ["not_finite_epoch_0_update_1.txt", "not_finite_epoch_1_update_6.txt"]


def test_an_update_that_is_left_out_leaves_the_running_statistics_of_batch_norms(tmp_path):
    config = config_with(TRAIN__ON_NONFINITE="skip")
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3)).double()
    training = training_of(config, network=network)
    data = batches(PLACES, 4)
    data[1] = (data[1][0] * math.inf, *data[1][1:])
    train_one_epoch(training, data, 2, keeper_of(tmp_path, training, config))
    assert training.progress.left_out == 1
    assert network[1].num_batches_tracked == PLACES - 1
    assert all(buffer.isfinite().all() for buffer in network.buffers())


@pytest.mark.parametrize(
    ("precision", "on_nonfinite", "most"),
    [("fp32", "stop", 0), ("bf16", "stop", 0), ("fp16", "stop", 20), ("fp32", "skip", 20)],
)
def test_a_run_that_leaves_no_update_out_keeps_no_copies_for_that(precision, on_nonfinite, most):
    config = config_with(TRAIN__ON_NONFINITE=on_nonfinite)
    network = small_network()
    network.num_classes = 3
    training = build_training(config, ALONE, Precision(precision, "cpu"), classification(), network, PLACES)
    assert training.most_left_out == most


def test_too_many_lost_updates_in_a_row_end_a_run_that_skips_them(tmp_path):
    config = config_with(TRAIN__ON_NONFINITE="skip", TRAIN__MAX_LEFT_OUT=3)
    run(tmp_path / "few", training_of(config, lost={(0, 1), (0, 2), (0, 4), (0, 5)}), config)
    training = training_of(config, lost={(0, 1), (0, 2), (0, 3)})
    with pytest.raises(UserError, match=r"update 4 of epoch 0, and 3 updates in a row were left out") as caught:
        run(tmp_path / "many", training, config)
    assert "\n" not in str(caught.value)


# Broken images


def test_a_broken_image_ends_the_run_before_its_update_unless_it_is_replaced(tmp_path):
    data = batches(PLACES, 4)
    data[2] = (*data[2][:2], ["", "a.png: empty", "", ""])
    training = training_of()
    with pytest.raises(UserError, match=re.escape("a.png: empty: mend or remove it, or set DATA.ON_ERROR skip")):
        train_one_epoch(training, data, 2, keeper_of(tmp_path / "stop", training))
    assert training.progress.updates == 2
    training = training_of()
    config = config_with(DATA__ON_ERROR="skip", DATA__MAX_BROKEN=0.5)
    keeper = keeper_of(tmp_path / "skip", training, config)
    train_one_epoch(training, data, 2, keeper)
    keeper.save()
    keeper.wait()
    assert training.progress.updates == PLACES
    assert (tmp_path / "skip" / "broken.txt").read_text() == "a.png: empty\n"
    assert checkpoint.load(tmp_path / "skip" / "last.pth")["progress"]["broken"] == ["a.png: empty"]


# Two ranks


def keep(folder):
    """How runs end on this rank where something happens on one rank only."""
    with join_world("cpu", 60) as world:
        cases = {"full": full_disk, "signal": signal_to_rank_1, "stop": lose_a_loss, "skip": skip_a_loss}
        return {name: case(Path(folder) / name, world) for name, case in cases.items()}


def full_disk(folder, world):
    """What a checkpoint that rank 0 cannot write ends with."""
    config = config_with(TRAIN__SAVE_UPDATES=1)
    error = UserError("No space left on device")
    with mock.patch.object(checkpoint, "save_numbered", side_effect=error if world.is_main else None):
        try:
            run(folder, training_of(config, world=world), config)
        except UserError as caught:
            return str(caught)


def signal_to_rank_1(folder, world):
    """How a signal to rank 1 ends, and what each rank wrote in a folder of its own."""
    own, training = folder / str(world.rank), training_of(world=world)
    try:
        train_one_epoch(training, batches(PLACES, 4), 2, keeper_of(own, training, signal=15 * world.rank))
    except Stopped as stopped:
        return [stopped.signal, training.progress.place, names(own, "*")]


def lose_a_loss(folder, world):
    """What a loss that rank 1 lost ends with, where runs stop."""
    try:
        run(folder, training_of(lost={(0, 2)} if world.rank else (), world=world), config_with())
    except UserError as error:
        return str(error)


def skip_a_loss(folder, world):
    """How far a run comes that skips a loss that rank 1 lost, and its weights."""
    config = config_with(TRAIN__ON_NONFINITE="skip", TRAIN__SAVE_UPDATES=2)
    training = training_of(config, {(0, 3)} if world.rank else (), world)
    run(folder, training, config)
    progress = training.progress
    weights = [parameter.flatten().tolist() for parameter in training.network.parameters()]
    return [progress.epoch, progress.updates, progress.left_out, weights]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two ranks of the same runs met, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("pair")
    return [said_by(process) for process in start_ranks("test_keeper", "keep", folder)], folder


@pytest.mark.slow
def test_a_disk_that_is_full_on_rank_0_ends_all_ranks(pair):
    seen, _ = pair
    assert [rank["full"] for rank in seen] == ["No space left on device"] * 2


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_update_with_one_checkpoint(pair):
    seen, _ = pair
    assert [rank["signal"][:2] for rank in seen] == [[15, 1]] * 2
    assert {"ckpt_epoch_0_update_1.pth", "last.pth"} < set(seen[0]["signal"][2])
    assert seen[1]["signal"][2] == []


@pytest.mark.slow
def test_samples_of_all_ranks_are_listed_where_one_lost_its_loss(pair):
    seen, folder = pair
    assert seen[0]["stop"] == seen[1]["stop"]
    assert "the loss became nan on rank 1 at update 3 of epoch 0; it was not taken" in seen[0]["stop"]
    assert "of rank 1: 2.png" in seen[0]["stop"]
    text = (folder / "stop" / "not_finite_epoch_0_update_3.txt").read_text()
    assert text == "rank 0\t2.png\nrank 1\t2.png\n"


@pytest.mark.slow
def test_all_ranks_leave_out_an_update_whose_loss_one_lost(pair):
    seen, _ = pair
    assert seen[0]["skip"] == seen[1]["skip"]
    assert seen[0]["skip"][:3] == [2, 2 * PLACES - 1, 1]
