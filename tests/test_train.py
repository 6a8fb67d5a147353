"""train.py as a user starts it: what it learns, what it writes, and that a run is a function of its settings."""

import math
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import time
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from torch.nn import functional as F

from models.build import build_model
from models.groupmixformer import GroupMixBlock
from models.published import to_published
from utils import checkpoint
from utils.config import load_config

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
EPOCHS, UPDATES = 4, 8  # of the small run: 48 images in batches of 6

# Starts a program, and afterwards writes the weights of every network and moving average that this rank made, and the
# (image, seed of its augmentation) of every micro-batch that it took.
KEEP = """
import os, runpy, sys
import torch
from timm.utils import ModelEmaV3
from data.samplers import TrainBatchSampler
from models.groupmixformer import GroupMixFormer

made, batches, give = [], [], TrainBatchSampler.__iter__

def keep_batches(sampler):
    for batch in give(sampler):
        batches.append(batch)
        yield batch

TrainBatchSampler.__iter__ = keep_batches

def keep(kind):
    begin = kind.__init__
    def init(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        made.append(self)
    kind.__init__ = init

keep(GroupMixFormer)
keep(ModelEmaV3)
folder, sys.argv = sys.argv[1], sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
weights = [{name.removeprefix("module."): value for name, value in each.state_dict().items()} for each in made]
torch.save({"weights": weights, "batches": batches}, f"{folder}/rank{os.environ.get('RANK', 0)}.pth")
"""


def scalars(folder):
    """The TensorBoard scalars of a run: {tag: {update: value}}."""
    found = {}
    for path in sorted(folder.glob("runs/events.*")):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += length + 16
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def types_in(value):
    """The types of everything in a checkpoint."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return {type(value)}.union(*(types_in(item) for item in inside))


def contents(folder):
    """Every file of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parameters(weights):
    """Weights without the running statistics of batch norms, which change even at a learning rate of 0."""
    return {name: value for name, value in weights.items() if "running" not in name and "num_batches" not in name}


# What a run learns and writes


@pytest.mark.slow
def test_loss_falls_and_validation_is_learned(trained):
    assert trained.result.code == 0, trained.result.stderr
    losses = [line["loss"] for line in trained.updates()]
    assert np.mean(losses[-UPDATES:]) < 0.8 * np.mean(losses[:UPDATES])
    first, last = trained.evaluations()[0], trained.evaluations()[-1]
    assert last["loss"] < first["loss"]
    assert last["acc1"] > 40  # one class in six is 17


@pytest.mark.slow
def test_nothing_disturbs_the_console(trained):
    assert trained.result.stderr == ""  # no warnings, and no progress bar where there is no terminal


@pytest.mark.slow
def test_log_has_the_published_lines(trained):
    log = (trained.folder / "log_rank0.txt").read_text()
    line = (
        r"Train: \[(\d+)/4\]\[(\d+)/8\]\s+eta \d+:\d\d:\d\d lr \d+\.\d+\s+time \d+\.\d+\s+loss (\d+\.\d+)\s+"
        r"grad_norm \d+\.\d+\s+mem \d+MB"
    )
    found = re.findall(line, log)
    assert [(int(epoch), int(update)) for epoch, update, _ in found] == [
        (epoch, update) for epoch in range(EPOCHS) for update in range(1, UPDATES + 1)
    ]
    assert [loss for *_, loss in found] == [f"{line['loss']:.4f}" for line in trained.updates()]
    for evaluation in trained.evaluations():
        assert f" * Acc@1 {evaluation['acc1']:.3f} Acc@5 {evaluation['acc5']:.3f}" in log


@pytest.mark.slow
def test_console_has_the_lines_of_the_log(trained):
    assert trained.result.stdout.endswith((trained.folder / "log_rank0.txt").read_text())
    assert str(trained.folder) in trained.result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_metrics_have_a_line_for_each_update_and_evaluation(trained):
    updates, evaluations = trained.updates(), trained.evaluations()
    keys = {"update", "epoch", "loss", "lr", "grad_norm", "left_out", "images_per_s"}
    assert [set(line) for line in updates] == EPOCHS * UPDATES * [keys]
    assert [line["update"] for line in updates] == list(range(1, EPOCHS * UPDATES + 1))
    assert [line["epoch"] for line in updates] == [i // UPDATES for i in range(EPOCHS * UPDATES)]
    assert {line["left_out"] for line in updates} == {0}
    assert [line["update"] for line in evaluations] == [UPDATES * (epoch + 1) for epoch in range(EPOCHS)]
    assert all({"acc1", "acc5", "loss", "ema_acc1", "ema_acc5", "ema_loss"} <= set(line) for line in evaluations)
    assert all(math.isfinite(value) for line in trained.metrics() for value in line.values())


@pytest.mark.slow
def test_learning_rate_is_a_cosine_over_updates_scaled_to_the_batch(trained):
    top, least, total = 0.6 * 6 / 512, 5e-6 * 6 / 512, EPOCHS * UPDATES
    expected = [least + (top - least) * (1 + math.cos(math.pi * i / total)) / 2 for i in range(total)]
    assert [line["lr"] for line in trained.updates()] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_tensorboard_has_the_published_tags_and_ours(trained):
    found = scalars(trained.folder)
    assert set(found) >= {"loss", "grad_norm", "lr", "Acc_1", "Acc_5"}  # tensorboardX writes _ for @
    assert set(found) >= {"Acc_1_ema", "Acc_5_ema", "images_per_s", "data_time", "memory_mb"}
    assert found["loss"] == {line["update"]: pytest.approx(line["loss"]) for line in trained.updates()}
    assert found["Acc_1"] == {line["update"]: pytest.approx(line["acc1"]) for line in trained.evaluations()}
    assert found["Acc_1_ema"] == {line["update"]: pytest.approx(line["ema_acc1"]) for line in trained.evaluations()}


@pytest.mark.slow
def test_curves_are_a_picture(trained):
    with Image.open(trained.folder / "curves.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert min(picture.size) >= 300
    assert len(np.unique(pixels, axis=0)) > 50


@pytest.mark.slow
def test_checkpoint_is_plain_and_complete(trained):
    state = trained.checkpoint()
    parts = {"model", "ema", "optimizer", "scaler", "progress", "best", "config", "classes", "train_images", "versions"}
    assert set(state) == parts | {"checksum"}
    assert state["train_images"] == 48
    assert types_in(state) <= {dict, OrderedDict, list, tuple, torch.Tensor, str, int, float, bool, type(None)}
    assert state["config"] == (trained.folder / "config.yaml").read_text()
    assert len(state["classes"]) == 6
    assert state["classes"] == sorted(state["classes"])
    progress = {"epoch": EPOCHS, "place": 0, "images": 0, "updates": EPOCHS * UPDATES, "left_out": 0, "ranks": 1}
    assert state["progress"].items() >= progress.items()
    assert (state["progress"]["updates_per_epoch"], state["progress"]["images_per_update"]) == (UPDATES, 6)
    assert state["versions"]["torch"] == torch.__version__
    assert state["versions"]["timm"] == timm.__version__
    network = build_model(load_config(trained.folder / "config.yaml"), 6)
    assert set(state["model"]) == set(state["ema"]) == set(network.state_dict())


@pytest.mark.slow
def test_checkpoint_loads_with_timm(trained, differences):
    network = build_model(load_config(trained.folder / "config.yaml"), 6)
    timm.models.load_checkpoint(network, str(trained.folder / "last.pth"))
    assert not differences(dict(network.state_dict()), dict(trained.checkpoint()["model"]))


@pytest.mark.slow
def test_numbered_checkpoints_are_those_of_their_epochs(trained, differences):
    numbered = [f"ckpt_epoch_{epoch}.pth" for epoch in range(1, EPOCHS + 1)]
    assert sorted(path.name for path in trained.folder.glob("*.pth")) == ["best.pth", *numbered, "last.pth"]
    assert [trained.checkpoint(name)["progress"]["epoch"] for name in numbered] == [1, 2, 3, 4]
    assert not differences(trained.checkpoint(numbered[-1]), trained.checkpoint("last.pth"))


@pytest.mark.slow
def test_the_two_newest_checkpoints_are_kept_beside_those_of_every_so_many_epochs(train, tmp_path):
    run = train(tmp_path, "--batch-size", 24, opts="TRAIN.EPOCHS 9 SAVE_FREQ 3 KEEP 2 DATA.IMG_SIZE 32")
    assert sorted(path.name for path in run.folder.glob("ckpt_*")) == [f"ckpt_epoch_{epoch}.pth" for epoch in (6, 8, 9)]


@pytest.fixture
def written(monkeypatch):
    """The names of the numbered checkpoints that runs write from now on."""
    names, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda state, path: names.append(path.name) or save(state, path))
    return names


def test_checkpoints_inside_epochs_are_written_and_only_the_newest_is_kept(train, tmp_path, written):
    run = train(tmp_path, opts="TRAIN.EPOCHS 2 TRAIN.SAVE_UPDATES 4 KEEP 1 DATA.IMG_SIZE 32")
    inside, whole = "ckpt_epoch_{}_update_4.pth", "ckpt_epoch_{}.pth"
    assert written == [inside.format(0), whole.format(1), inside.format(1), whole.format(2)]
    assert sorted(path.name for path in run.folder.glob("ckpt_*")) == sorted(written[-2:])
    progress = run.checkpoint(inside.format(1))["progress"]
    assert (progress["epoch"], progress["place"], progress["updates"], progress["images"]) == (1, 4, UPDATES + 4, 24)


def test_checkpoints_inside_epochs_are_written_when_so_many_minutes_have_passed(train, tmp_path, written):
    train(tmp_path, "--batch-size", 12, opts="TRAIN.EPOCHS 1 TRAIN.SAVE_MINUTES 1e-9 DATA.IMG_SIZE 32")
    assert written == [f"ckpt_epoch_0_update_{update}.pth" for update in (1, 2, 3)] + ["ckpt_epoch_1.pth"]


def test_print_freq_spaces_the_lines_and_averages_between_them(train, tmp_path):
    each = train(tmp_path, opts="TRAIN.EPOCHS 1 DATA.IMG_SIZE 32", tag="each")
    third = train(tmp_path, opts="TRAIN.EPOCHS 1 DATA.IMG_SIZE 32 PRINT_FREQ 3", tag="third")
    assert [line["update"] for line in third.updates()] == [3, 6, 8]
    for key in ("loss", "grad_norm"):
        values = [line[key] for line in each.updates()]
        means = [np.mean(values[:3]), np.mean(values[3:6]), np.mean(values[6:])]
        assert [line[key] for line in third.updates()] == pytest.approx(means)


def test_number_of_classes_comes_from_the_data(train, tmp_path):
    run = train(tmp_path, "--batch-size", 24, opts="MODEL.GMA.NUM_CLASSES 0 TRAIN.EPOCHS 1 DATA.IMG_SIZE 32")
    assert run.checkpoint()["model"]["head.fc.weight"].shape == (6, 40)


# Best


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.6], ids=["without moving average", "with moving average"])
def test_best_is_the_epoch_of_the_highest_accuracy(train, call, tmp_path, tree, tiny_config, differences, decay):
    # The learning rate rises until what was learned is lost again, so that the best epoch is not the last.
    rising = "TRAIN.BASE_LR 12 TRAIN.WARMUP_EPOCHS 5 TRAIN.EPOCHS 5 DATA.IMG_SIZE 32"
    run = train(tmp_path, opts=f"{rising} TRAIN.EMA_DECAY {decay}")
    accuracies = [max(line["acc1"], line.get("ema_acc1", 0)) for line in run.evaluations()]
    highest = max(accuracies)
    assert min(accuracies) < highest
    best = run.checkpoint("best.pth")
    assert not differences(best, run.checkpoint(f"ckpt_epoch_{accuracies.index(highest) + 1}.pth"))
    assert best["best"]["acc1"] == run.checkpoint("last.pth")["best"]["acc1"] == highest
    assert f"best Acc@1 {highest:.3f}" in run.result.stdout.splitlines()[-1]

    where = ["--cfg", tiny_config, "--data-path", tree, "--resume", run.folder / "best.pth", "--batch-size", 5]
    scored = call("test.py", *where, "--opts", "DATA.IMG_SIZE", 32)
    assert f" * Acc@1 {highest:.3f} " in scored.stdout, scored.stderr


# The same settings make the same run


@pytest.mark.slow
def test_config_yaml_given_back_makes_the_same_run(trained, call, tmp_path, differences):
    where = ["--output", tmp_path, "--tag", "again", "--device", "cpu"]
    result = call("train.py", "--cfg", trained.folder / "config.yaml", *where)
    assert result.code == 0, result.stderr
    again = type(trained)(result, tmp_path / "tiny" / "again")
    assert again.numbers() == trained.numbers()
    for part in ("model", "ema", "optimizer"):
        assert not differences(again.checkpoint()[part], trained.checkpoint()[part])
    first, second = [yaml.safe_load((run.folder / "config.yaml").read_text()) for run in (trained, again)]
    assert {key for key in first if first[key] != second[key]} == {"OUTPUT", "TAG", "DEVICE"}


@pytest.fixture(scope="module")
def one_epoch(train, tmp_path_factory, everything_random):
    """One epoch with everything random turned on, with further flags and words for --opts."""

    def run(*flags, opts=""):
        return train(tmp_path_factory.mktemp("epoch"), *flags, opts=f"TRAIN.EPOCHS 1 {everything_random} {opts}")

    return run


@pytest.fixture(scope="module")
def plain(one_epoch):
    """One epoch with everything random turned on."""
    return one_epoch()


def test_another_seed_makes_another_run(plain, one_epoch):
    other = one_epoch("--seed", 1)
    one, two = plain.checkpoint()["model"], other.checkpoint()["model"]
    assert not any(torch.equal(one[name], two[name]) for name in one if name.endswith("qkv.weight"))
    assert all(a["loss"] != b["loss"] for a, b in zip(plain.updates(), other.updates(), strict=True))


def test_number_of_workers_changes_nothing(plain, one_epoch, differences):
    other = one_epoch(opts="DATA.NUM_WORKERS 2")
    assert other.numbers() == plain.numbers()
    assert not differences(other.checkpoint()["model"], plain.checkpoint()["model"])


def test_gradient_checkpointing_changes_nothing(plain, one_epoch):
    other = one_epoch("--use-checkpoint")
    for part in ("model", "ema"):
        torch.testing.assert_close(other.checkpoint()[part], plain.checkpoint()[part], rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_computes_each_block_a_second_time(one_epoch, monkeypatch):
    calls, mix = [], GroupMixBlock.mix

    def count(block, x):
        calls.append(block.training)
        return mix(block, x)

    monkeypatch.setattr(GroupMixBlock, "mix", count)
    one_epoch("--use-checkpoint", "--batch-size", 24)
    assert calls.count(True) == 2 * 4 * 2  # two steps through four blocks, forward and again in the backward pass


@pytest.mark.slow
def test_compiling_changes_nothing(train, tmp_path, monkeypatch):
    # Compiled by tracing alone: the same graph without the minutes that generating and building C++ takes.
    compiled = []
    begin = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiled.append(args) or begin(*args, **kwargs))
    short = "TRAIN.EPOCHS 1 DATA.IMG_SIZE 32 DATA.BATCH_SIZE 24"
    one = train(tmp_path, opts=short, tag="eager")
    assert not compiled
    two = train(tmp_path, opts=f"{short} TRAIN.COMPILE True", tag="compiled")
    assert compiled
    for part in ("model", "ema"):
        torch.testing.assert_close(two.checkpoint()[part], one.checkpoint()[part], rtol=1e-4, atol=1e-5)


# Stopped and resumed


@pytest.fixture(scope="session")
def train_long(train, everything_random):
    """Four epochs with everything random turned on, six updates each, of two steps of four images."""

    def run(output, *flags, opts="", code=0):
        steps = ["--batch-size", 4, "--accumulation-steps", 2]
        return train(output, *steps, *flags, opts=f"{everything_random} {opts}", code=code)

    return run


@pytest.fixture(scope="session")
def whole(train_long, shared_run):
    """That run, undisturbed."""
    return shared_run("whole", lambda output: train_long(output).result)


def check_same_weights(run, other, differences):
    """Both ended with the same weights, optimizer and progress, bit for bit."""
    for part in ("model", "ema", "optimizer", "scaler", "progress", "classes"):
        assert not differences(run.checkpoint()[part], other.checkpoint()[part]), part


def check_same_run(run, other, differences):
    """Both wrote the same checkpoints and the same metrics from their beginning to their end."""
    check_same_weights(run, other, differences)
    assert run.numbers() == other.numbers()
    names = sorted(path.name for path in other.folder.glob("*.pth"))
    assert sorted(path.name for path in run.folder.glob("*.pth")) == names
    for name in names:
        one, two = run.checkpoint(name), other.checkpoint(name)
        assert one["best"] == two["best"]
        assert not differences(one["model"], two["model"]), name


@pytest.mark.slow
def test_stopped_run_goes_on_as_if_it_had_not_been(whole, train_long, tmp_path, differences):
    folder = whole.stopped_after(1, tmp_path)
    run = train_long(tmp_path)
    assert f"going on from {folder / 'last.pth'}" in run.result.stdout
    assert "Train: [0/4]" not in run.result.stdout
    check_same_run(run, whole, differences)


@pytest.mark.slow
def test_resume_takes_the_named_file(whole, train_long, tmp_path, differences):
    run = train_long(tmp_path, "--resume", whole.folder / "ckpt_epoch_2.pth")
    check_same_weights(run, whole, differences)
    assert run.numbers() == [line for line in whole.numbers() if line["epoch"] >= 2]


def test_run_resumed_in_another_folder_has_a_best_checkpoint(whole, train_long, tmp_path):
    # At a learning rate of 0 nothing becomes better than the best before, which the new folder must have all the same.
    still = "TRAIN.EPOCHS 5 TRAIN.BASE_LR 0 TRAIN.MIN_LR 0 TRAIN.WARMUP_LR 0"
    run = train_long(tmp_path, "--resume", whole.folder / "last.pth", "--allow-changes", opts=still)
    assert run.checkpoint("best.pth")["best"] == run.checkpoint("last.pth")["best"]


@pytest.mark.slow
def test_best_epoch_of_another_run_is_not_taken_for_that_of_the_run_resumed(whole, train_long, tmp_path):
    folder = whole.stopped_after(EPOCHS, tmp_path)
    other = whole.checkpoint("best.pth")
    checkpoint.save({**other, "best": {**other["best"], "acc1": 99.0}}, folder / "best.pth")
    run = train_long(tmp_path, "--resume", folder / "ckpt_epoch_3.pth")
    assert run.checkpoint("best.pth")["best"] == run.checkpoint("last.pth")["best"] == whole.checkpoint()["best"]


@pytest.mark.slow
def test_killed_run_goes_on_as_if_it_had_not_been(
    whole, train_long, tmp_path, tree, tiny_config, everything_random, user_environment, differences
):
    where = ["--cfg", tiny_config, "--data-path", tree, "--output", tmp_path, "--tag", "run"]
    steps = ["--batch-size", 4, "--accumulation-steps", 2, "--opts", *everything_random.split()]
    words = [str(word) for word in ("python", "train.py", *where, *steps)]
    process = subprocess.Popen(words, cwd=REPOSITORY, env=user_environment(), stdout=subprocess.DEVNULL)
    folder = tmp_path / "tiny" / "run"
    while process.poll() is None and not (folder / "last.pth").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 1 <= torch.load(folder / "last.pth", weights_only=True)["progress"]["epoch"] < EPOCHS

    check_same_run(train_long(tmp_path), whole, differences)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["last.pth", "best.pth"])
def test_kill_amid_the_files_of_the_best_epoch_is_mended(whole, train_long, tmp_path, monkeypatch, differences, victim):
    class KilledError(BaseException):
        pass

    epoch = whole.checkpoint("best.pth")["progress"]["epoch"]
    replace = pathlib.Path.replace

    def kill(path, target):
        if target.name == victim and torch.load(path)["progress"]["epoch"] == epoch:
            raise KilledError
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", kill)
        with pytest.raises(KilledError):
            train_long(tmp_path)
    check_same_run(train_long(tmp_path), whole, differences)


@pytest.mark.slow
def test_resume_goes_before_the_last_checkpoint(whole, train_long, tmp_path, differences):
    named = whole.stopped_after(EPOCHS, tmp_path) / "ckpt_epoch_3.pth"
    run = train_long(tmp_path, "--resume", named)
    assert f"going on from {named}" in run.result.stdout
    assert "Train: [3/4]" in run.result.stdout
    check_same_run(run, whole, differences)


@pytest.fixture(scope="module")
def trained_weights(train, tmp_path_factory):
    """A checkpoint of the small network after an epoch."""
    return train(tmp_path_factory.mktemp("weights"), opts="TRAIN.EPOCHS 1 DATA.IMG_SIZE 32").folder / "last.pth"


@pytest.mark.slow
def test_resume_goes_before_pretrained_weights(whole, trained_weights, train_long, tmp_path, differences):
    named = ["--resume", whole.folder / "ckpt_epoch_3.pth", "--pretrained", trained_weights]
    run = train_long(tmp_path, *named, "--allow-changes")
    check_same_weights(run, whole, differences)


@pytest.mark.slow
def test_last_checkpoint_goes_before_pretrained_weights(train, trained_weights, tmp_path, differences):
    words = ["--pretrained", trained_weights, "--batch-size", 24]
    short = "TRAIN.EPOCHS 2 DATA.IMG_SIZE 32"
    tuned = train(tmp_path / "tuned", *words, opts=short)
    tuned.stopped_after(1, tmp_path / "stopped")
    again = train(tmp_path / "stopped", *words, opts=short)
    assert "Train: [0/2]" not in again.result.stdout
    check_same_run(again, tuned, differences)


@pytest.mark.parametrize("workers", [0, 2])
def test_run_goes_on_inside_an_epoch_as_if_it_had_not_been_stopped(train_long, tmp_path, differences, workers):
    # Three updates a line: the first line after the checkpoint tells of the last update before it, too.
    short = f"TRAIN.EPOCHS 1 TRAIN.SAVE_UPDATES 4 PRINT_FREQ 3 DATA.NUM_WORKERS {workers}"
    whole = train_long(tmp_path / "whole", opts=short)
    run = train_long(tmp_path / "resumed", "--resume", whole.folder / "ckpt_epoch_0_update_4.pth", opts=short)
    check_same_weights(run, whole, differences)
    assert run.numbers() == [line for line in whole.numbers() if line["update"] > 4]


# Resumed under other settings


def test_other_settings_are_shown_and_refused(whole, train_long, tmp_path):
    folder = whole.stopped_after(1, tmp_path)
    before = contents(tmp_path)
    run = train_long(tmp_path, "--seed", 3, opts="TRAIN.WEIGHT_DECAY 0.3 AUG.REMODE const", code=2)
    (error,) = run.result.errors
    for change in ("TRAIN.WEIGHT_DECAY: 0.05 -> 0.3", "AUG.REMODE: pixel -> const", "SEED: 0 -> 3"):
        assert change in error
    assert error.count("->") == 3
    for named in (folder / "last.pth", "--allow-changes", "--tag"):
        assert str(named) in error
    assert contents(tmp_path) == before


def test_other_settings_than_those_of_a_named_checkpoint_are_refused(whole, train_long, tmp_path):
    named = whole.folder / "ckpt_epoch_1.pth"
    run = train_long(tmp_path, "--resume", named, opts="TRAIN.WEIGHT_DECAY 0.3", code=2)
    (error,) = run.result.errors
    for word in (named, "TRAIN.WEIGHT_DECAY: 0.05 -> 0.3", "--allow-changes"):
        assert str(word) in error
    assert not list(tmp_path.iterdir())


def test_other_settings_are_taken_and_told_of_where_that_is_allowed(whole, train_long, tmp_path):
    whole.stopped_after(3, tmp_path)
    run = train_long(tmp_path, "--allow-changes", opts="TRAIN.WEIGHT_DECAY 0.3")
    change = "TRAIN.WEIGHT_DECAY: 0.05 -> 0.3"
    assert change in run.result.stdout
    assert change in (run.folder / "log_rank0.txt").read_text()
    assert {group["weight_decay"] for group in run.checkpoint()["optimizer"]["param_groups"]} == {0.0, 0.3}
    assert change not in train_long(tmp_path, opts="TRAIN.WEIGHT_DECAY 0.3").result.stdout  # its settings by now


@pytest.mark.slow
def test_what_changes_no_result_may_differ(whole, train_long, tmp_path, differences):
    whole.stopped_after(3, tmp_path)
    free = "DATA.NUM_WORKERS 2 SAVE_FREQ 2 KEEP 1 PRINT_FREQ 3 TRAIN.SAVE_UPDATES 4 TRAIN.SAVE_MINUTES 0"
    run = train_long(tmp_path, opts=free)
    assert "->" not in run.result.stdout
    check_same_weights(run, whole, differences)


@pytest.mark.parametrize("flags", [[], ["--allow-changes"]], ids=["unasked", "allowed"])
def test_folder_with_another_network_is_refused(whole, train_long, tmp_path, flags):
    whole.stopped_after(1, tmp_path)
    before = contents(tmp_path)
    run = train_long(tmp_path, *flags, opts="MODEL.GMA.SERIAL_DEPTHS [1,1,2,1]", code=2)
    (error,) = run.result.errors
    assert ("stages.2.blocks.1" if flags else "MODEL.GMA.SERIAL_DEPTHS: [1, 1, 1, 1] -> [1, 1, 2, 1]") in error
    assert contents(tmp_path) == before


# What begins to differ where the first class is called otherwise and comes last.
OTHERS = "0: amber_columns -> amber_rows, 1: amber_rows -> green_columns, "


@pytest.fixture
def rename_class(tmp_path):
    """A copy of a tree whose first class comes last."""

    def rename(tree):
        copy = shutil.copytree(tree, tmp_path / "renamed")
        for split in ("train", "val"):
            sorted((copy / split).iterdir())[0].rename(copy / split / "yellow")
        return copy

    return rename


@pytest.mark.parametrize("flags", [[], ["--allow-changes"]], ids=["unasked", "allowed"])
def test_data_whose_classes_have_other_numbers_are_refused(
    whole, call, tree, tiny_config, tmp_path, rename_class, flags
):
    state = checkpoint.load(whole.stopped_after(1, tmp_path) / "last.pth")
    (tmp_path / "run.yaml").write_text(state["config"])
    where = ["--cfg", tmp_path / "run.yaml", "--data-path", rename_class(tree), "--output", tmp_path]
    (error,) = call("train.py", *where, *flags).errors
    assert f"is of a run on other classes ({OTHERS}" in error


def test_folder_with_a_run_is_refused_where_auto_resume_is_off(whole, train_long, tmp_path):
    whole.stopped_after(1, tmp_path)
    (error,) = train_long(tmp_path, opts="TRAIN.AUTO_RESUME False", code=2).result.errors
    assert "TRAIN.AUTO_RESUME" in error


def test_another_number_of_updates_an_epoch_is_refused(whole, train_long, tmp_path):
    whole.stopped_after(1, tmp_path)
    before = contents(tmp_path)
    (error,) = train_long(tmp_path, "--batch-size", 6, "--allow-changes", code=2).result.errors
    assert "updates an epoch" in error
    assert contents(tmp_path) == before


def test_finished_run_started_again_is_left_as_it_is(whole, train_long, tmp_path):
    folder = whole.stopped_after(EPOCHS, tmp_path)
    kept = {path: path.read_bytes() for path in folder.iterdir() if path.suffix in (".pth", ".jsonl")}
    again = train_long(tmp_path)
    assert "Train:" not in again.result.stdout
    assert {path: path.read_bytes() for path in kept} == kept


# Accumulation


def test_accumulation_makes_the_updates_of_a_doubled_batch(train, tmp_path, monkeypatch):
    # Batch norms see half of the images at a time and so differ by nature: here they keep to their running statistics.
    def steady(norm, x):
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", steady)
    short = "TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 1 DATA.IMG_SIZE 32 TRAIN.OPTIMIZER.NAME sgd TRAIN.CLIP_GRAD 0.5"
    doubled = train(tmp_path, "--batch-size", 12, opts=short, tag="doubled")
    halves = train(tmp_path, "--batch-size", 6, opts=f"{short} TRAIN.ACCUMULATION_STEPS 2", tag="halves")
    assert [line["update"] for line in halves.updates()] == list(range(1, 9))
    for key in ("update", "epoch", "lr"):
        assert [line[key] for line in halves.updates()] == [line[key] for line in doubled.updates()]
    for key in ("loss", "grad_norm"):
        expected = pytest.approx([line[key] for line in doubled.updates()], rel=1e-4)
        assert [line[key] for line in halves.updates()] == expected
    assert halves.checkpoint()["progress"] == doubled.checkpoint()["progress"]
    for part in ("model", "ema"):
        torch.testing.assert_close(halves.checkpoint()[part], doubled.checkpoint()[part], rtol=1e-4, atol=1e-6)


def test_tail_of_an_epoch_counts_as_an_update(train, tmp_path):
    run = train(tmp_path, "--accumulation-steps", 3, opts="TRAIN.EPOCHS 2 DATA.IMG_SIZE 32")
    lines = [(line["epoch"], line["update"]) for line in run.updates()]
    assert lines == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6)]  # of eight steps an epoch: 3 + 3 + 2
    steps = {int(value) for name, value in run.checkpoint()["model"].items() if "num_batches_tracked" in name}
    assert steps == {16}  # none is dropped


# Precision


def test_bf16_trains_and_keeps_weights_in_fp32(one_epoch, plain, differences):
    run = one_epoch("--precision", "bf16")
    assert "bf16" in run.result.stdout
    weights = run.checkpoint()["model"]
    assert {value.dtype for value in parameters(weights).values()} == {torch.float32}
    assert differences(weights, plain.checkpoint()["model"])
    losses = [[line["loss"] for line in each.updates()] for each in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.slow
def test_fp16_scales_its_loss_and_resumes_exactly(train, tmp_path, differences, monkeypatch):
    from_above = partial(torch.amp.GradScaler, init_scale=2.0**40, backoff_factor=2.0**-25)
    monkeypatch.setattr(torch.amp, "GradScaler", from_above)
    words, short = ["--precision", "fp16", "--batch-size", 24], "DATA.IMG_SIZE 32 TRAIN.EPOCHS 2"
    run = train(tmp_path / "whole", *words, opts=short)
    assert run.checkpoint()["scaler"]["scale"] == 2**15
    first, *others = run.updates()  # the scaler begins with a scale that is too high, and leaves out what overflows
    assert (first["loss"], first["grad_norm"]) == (None, None)
    assert {line["left_out"] for line in run.updates()} == {1}
    assert others[0]["lr"] == first["lr"] > others[1]["lr"]
    assert all(math.isfinite(line["loss"]) for line in others)
    assert run.checkpoint()["progress"].items() >= {"updates": 3, "left_out": 1, "left_out_in_row": 0}.items()
    run.stopped_after(1, tmp_path / "stopped")
    check_same_run(train(tmp_path / "stopped", *words, opts=short), run, differences)


def test_level_of_apex_is_translated_with_a_word(train, tmp_path):
    run = train(tmp_path, "--amp-opt-level", "O1", "--batch-size", 24, opts="DATA.IMG_SIZE 32 TRAIN.EPOCHS 1")
    (said,) = [line for line in run.result.stdout.splitlines() if "O1" in line]
    assert re.search("fp32|fp16|bf16", said)


# Fine-tuning

# Weights stay where they are.
STILL = "TRAIN.EPOCHS 1 TRAIN.BASE_LR 0 TRAIN.MIN_LR 0 TRAIN.WARMUP_LR 0 DATA.IMG_SIZE 32"


@pytest.mark.parametrize("chosen_by", ["model", "ema"])
def test_fine_tuning_on_other_classes_starts_a_fresh_head_on_the_weights_that_the_best_epoch_was_chosen_by(
    call, trained_weights, make_images, tiny_config, tmp_path, chosen_by
):
    state = checkpoint.load(trained_weights)
    checkpoint.save({**state, "best": {**state["best"], "of": chosen_by}}, tmp_path / "chosen.pth")
    for split in ("train", "val"):
        make_images(tmp_path / split, 12, seed=2, classes=["blue_columns", "blue_rows", "green_columns", "green_rows"])
    where = ["--cfg", tiny_config, "--data-path", tmp_path, "--output", tmp_path, "--tag", "run"]
    options = [*STILL.split(), "MODEL.GMA.NUM_CLASSES", 4, "TRAIN.LAYER_DECAY", 0.5]
    result = call("train.py", *where, "--pretrained", tmp_path / "chosen.pth", "--opts", *options)
    assert result.code == 0, result.stderr
    assert f"starting from {'the moving average' if chosen_by == 'ema' else 'the weights'} of" in result.stdout
    (said,) = [line for line in result.stdout.splitlines() if "head" in line]
    assert "6 classes" in said
    assert "4 classes" in said
    assert "afresh" in said

    source = parameters(state[chosen_by])
    state = torch.load(tmp_path / "tiny" / "run" / "last.pth", weights_only=True)
    tuned = parameters(state["model"])
    changed = {name for name in source if not torch.equal(source[name], tuned[name])}
    assert changed == {"head.fc.weight", "head.fc.bias"}
    assert tuned["head.fc.weight"].shape == (4, 40)
    scales = sorted({group["lr_scale"] for group in state["optimizer"]["param_groups"]})
    assert scales == [0.5**i for i in reversed(range(len(scales)))]
    assert len(scales) >= 5  # from the stem to the head, each layer half of the next


def test_fine_tuning_on_as_many_classes_of_other_names_is_told_of(
    call, trained_weights, tree, tiny_config, tmp_path, rename_class
):
    where = ["--cfg", tiny_config, "--data-path", rename_class(tree), "--output", tmp_path, "--tag", "run"]
    result = call("train.py", *where, "--pretrained", trained_weights, "--opts", *STILL.split())
    assert result.code == 0, result.stderr
    assert f"has as many classes but others ({OTHERS}" in result.stdout


@pytest.mark.parametrize("form", ["published names", "bare state dict"])
def test_pretrained_weights_of_every_form_are_taken(train, trained_weights, tmp_path, differences, form):
    source = torch.load(trained_weights, weights_only=True)["model"]
    published = {"model": to_published(source), "epoch": 299, "max_accuracy": 83.4}
    torch.save(published if form == "published names" else dict(source), tmp_path / "weights.pth")
    run = train(tmp_path, "--pretrained", tmp_path / "weights.pth", "--batch-size", 24, opts=STILL)
    assert not differences(parameters(run.checkpoint()["model"]), parameters(source))


# Two processes


@pytest.fixture(scope="session")
def start_pair(start, tree, tiny_config, everything_random, shared):
    """Trains with two processes, and keeps the weights and the batches of both."""
    script = shared("scripts", lambda folder: (folder / "keep.py").write_text(KEEP)) / "keep.py"

    def run(output, *flags, ranks=2, opts=""):
        words = ["--cfg", tiny_config, "--data-path", tree, "--output", output, "--tag", "run", *flags]
        options = ["--opts", "TRAIN.EPOCHS", 2, *everything_random.split(), *opts.split()]
        return start(script, output, "train.py", *words, *options, ranks=ranks, PYTHONPATH=".")

    return run


@pytest.fixture(scope="session")
def pair(start_pair, shared_run):
    """A run of two processes."""
    return shared_run("pair", start_pair)


def kept(output, rank):
    """The weights that a rank ended with, and the batches that it took."""
    return torch.load(output / f"rank{rank}.pth", weights_only=True)


def samples_of_updates(output, ranks, accumulation):
    """The samples of each update, of all ranks."""
    batches = [kept(output, rank)["batches"] for rank in range(ranks)]
    places = range(0, len(batches[0]), accumulation)
    return [
        sorted(sample for own in batches for batch in own[at : at + accumulation] for sample in batch) for at in places
    ]


@pytest.mark.slow
def test_two_processes_end_with_equal_weights(pair, differences):
    assert pair.result.code == 0, pair.result.stderr
    network, average = kept(pair.output, 0)["weights"]
    assert not differences([network, average], kept(pair.output, 1)["weights"])
    assert not differences(dict(pair.checkpoint()["model"]), network)
    assert not differences(dict(pair.checkpoint()["ema"]), average)


@pytest.mark.slow
def test_two_processes_update_as_one_with_a_doubled_batch(pair, train, tmp_path):
    alone = train(tmp_path, "--batch-size", 12, opts="TRAIN.EPOCHS 2 DATA.IMG_SIZE 32")
    for key in ("update", "epoch", "lr"):
        assert [line[key] for line in pair.updates()] == [line[key] for line in alone.updates()]
    assert {**pair.checkpoint()["progress"], "ranks": 1} == alone.checkpoint()["progress"]


@pytest.mark.slow
def test_only_the_first_of_two_processes_speaks_and_writes(pair):
    assert pair.result.stderr == ""
    assert pair.result.stdout.count("Train:") == len(pair.updates()) == 8
    assert len(list(pair.folder.glob("runs/events.*"))) == 1
    checkpoints = ["best.pth", "ckpt_epoch_1.pth", "ckpt_epoch_2.pth", "last.pth"]
    others = ["config.yaml", "curves.png", "lock", "log_rank0.txt", "metrics.jsonl", "runs"]
    assert sorted(path.name for path in pair.folder.iterdir()) == sorted(checkpoints + others)


@pytest.mark.slow
def test_two_stopped_processes_go_on_as_if_they_had_not_been(pair, start_pair, tmp_path, differences):
    pair.stopped_after(1, tmp_path)
    result = start_pair(tmp_path)
    assert result.code == 0, result.stderr
    check_same_run(type(pair)(result, tmp_path / "tiny" / "run"), pair, differences)


# Another number of processes


@pytest.fixture(scope="session")
def fewer(pair, start_pair, shared_run):
    """The run of two processes, gone on with by one after the first epoch."""

    def begin(output):
        pair.stopped_after(1, output)
        return start_pair(output, "--elastic", ranks=1, opts="TRAIN.SAVE_UPDATES 2")

    return shared_run("fewer", begin)


@pytest.fixture(scope="session")
def more(fewer, start_pair, shared_run):
    """That run, gone on with by two inside the second epoch."""
    inside = fewer.folder / "ckpt_epoch_1_update_2.pth"
    return shared_run("more", lambda output: start_pair(output, "--elastic", "--resume", inside))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks", "steps"), [("fewer", 1, 2), ("more", 2, 1)])
def test_other_number_of_ranks_keeps_samples_and_learning_rates_of_updates(pair, request, name, ranks, steps):
    run = request.getfixturevalue(name)
    assert run.result.code == 0, run.result.stderr
    taken = samples_of_updates(run.output, ranks, steps)
    assert len(taken) == (4 if name == "fewer" else 2)
    assert taken == samples_of_updates(pair.output, 2, 1)[-len(taken) :]
    for key in ("update", "epoch", "lr"):
        assert [line[key] for line in run.updates()] == [line[key] for line in pair.updates()][-len(run.updates()) :]
    assert run.checkpoint()["progress"] == {**pair.checkpoint()["progress"], "ranks": ranks}
    assert f"2 epochs of 4 updates of 12 images, up to lr {0.6 * 12 / 512:.3g}" in run.result.stdout


@pytest.mark.slow
def test_what_another_number_of_ranks_makes_inexact_is_told(fewer, more):
    for run, change in (
        (fewer, "1 rank(s) instead of 2, in 2 step(s)"),
        (more, "2 rank(s) instead of 1, in 1 step(s)"),
    ):
        (said,) = [line for line in run.result.stdout.splitlines() if f"going on with {change} an update" in line]
        assert "no longer" in said
        for thing in ("erasing", "drop path", "mixup", "batch norms"):
            assert thing in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "named"),
    [([], ["2 rank(s)", "--elastic", "12 images"]), (["--elastic", "--batch-size", 8], ["12", "8", "--batch-size"])],
    ids=["unasked", "indivisible"],
)
def test_other_number_of_ranks_is_refused(pair, train, tmp_path, everything_random, flags, named):
    pair.stopped_after(1, tmp_path)
    before = contents(tmp_path)
    (error,) = train(tmp_path, *flags, opts=f"TRAIN.EPOCHS 2 {everything_random}", code=2).result.errors
    assert [thing for thing in named if thing not in error] == [], error
    assert contents(tmp_path) == before
