"""What a run starts from: which checkpoint, whether it is of the same run, and all that comes back from it."""

import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_unit import ALONE, CPU, all_of, batches, equal, plain_training, set_key, small_network, train, training_of
from torch import nn

from utils import checkpoint
from utils.dist import World
from utils.errors import UserError
from utils.progress import Progress
from utils.resume import (
    Found,
    check_classes,
    find_state,
    fit_to_ranks,
    go_back,
    lies_in,
    restore,
    start_from_pretrained,
    state_of,
    steps_of_epoch,
    tell_of_other_images,
    without_permissions,
)

CONFIG = {"TRAIN__ACCUMULATION_STEPS": 2, "TRAIN__EMA_DECAY": 0.5, "TRAIN__EPOCHS": 9}


def config_with(**changes):
    return plain_training(**{**CONFIG, **changes})


def trained(epochs=1, config=None):
    """A training after so many whole epochs of three updates, and two updates of the next one."""
    config = config or config_with()
    training = training_of(small_network(), 6, config, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    for epoch in range(epochs):
        train(training, batches(6, 4), epoch)
    training.progress.epoch, training.progress.place = epochs, 2
    training.progress.broken = ["a.png: empty"]
    return training


def save(folder, epochs=1, config=None):
    """Writes a checkpoint of a run as the keeper does; returns its path."""
    config, training = config or config_with(), trained(epochs, config)
    folder.mkdir(exist_ok=True)
    state = state_of(training, {"epoch": 0, "of": "ema", "acc1": 50.0}, config, ["a", "b"], 24)
    checkpoint.save_numbered(state, folder, is_best=False, every=1, keep=9)
    return folder / checkpoint.name_of(epochs, 2)


def spoil(path):
    """Flips a byte in the middle of a file, where its weights are."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # it may be a second name of another checkpoint
    path.write_bytes(data)


# What a checkpoint holds


def test_all_that_trains_comes_back_from_a_checkpoint(tmp_path):
    path, original = save(tmp_path), trained()
    fresh = training_of(small_network(), 6, config_with(), scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    assert not equal(all_of(fresh)["optimizer"], all_of(original)["optimizer"])
    restore(checkpoint.load(path), fresh, config_with())
    lr = [group["lr"] for group in original.optimizer.param_groups]
    for group, value in zip(fresh.optimizer.param_groups, lr, strict=True):
        group["lr"] = value  # the schedule's, which knows it from the update's number
    assert equal(all_of(fresh), all_of(original))


def test_a_run_gone_on_with_from_a_checkpoint_takes_the_same_updates(tmp_path):
    path, original = save(tmp_path), trained()
    fresh = training_of(small_network(), 6, config_with(), scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    restore(checkpoint.load(path), fresh, config_with())
    reports = [train(training, batches(6, 4), 1) for training in (original, fresh)]
    for one, other in zip(*reports, strict=True):
        assert (one.loss.hex(), one.grad_norm.hex(), one.lr.hex()) == (
            other.loss.hex(), other.grad_norm.hex(), other.lr.hex()
        )  # fmt: skip
    assert equal(all_of(fresh), all_of(original))


def test_a_run_gone_on_with_reports_the_same_learning_rate_where_an_update_is_left_out(tmp_path):
    def training_that_loses_an_update():
        training = training_of(small_network(), 6, config, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
        criterion, progress = training.criterion, training.progress

        def losing(logits, targets):
            return criterion(logits, targets) + (math.nan if (progress.epoch, progress.place) == (1, 0) else 0)

        return replace(training, criterion=losing)

    reports, config = [], config_with(TRAIN__WARMUP_EPOCHS=3, TRAIN__WARMUP_LR=0.0)
    for resumes in (False, True):
        training = training_that_loses_an_update()
        train(training, batches(6, 4))
        training.progress.end_epoch()
        if resumes:
            checkpoint.save(state_of(training, None, config, None, 24), tmp_path / "x.pth")
            training = training_that_loses_an_update()
            restore(checkpoint.load(tmp_path / "x.pth"), training, config)
        reports.append([(report.update, report.left_out, report.lr) for report in train(training, batches(6, 4), 1)])
    assert reports[0] == reports[1]
    assert reports[0][0][1] == 1


def test_a_checkpoint_tells_what_its_run_was(tmp_path):
    state = checkpoint.load(save(tmp_path))
    told = {name: state["progress"][name] for name in ("images", "updates_per_epoch", "images_per_update", "ranks")}
    assert told == {"images": 16, "updates_per_epoch": 3, "images_per_update": 8, "ranks": 1}
    assert state["classes"] == ["a", "b"]
    assert state["best"] == {"epoch": 0, "of": "ema", "acc1": 50.0}


def test_images_of_a_short_last_update_are_counted_as_they_are():
    training = training_of(small_network(), 5, config_with())
    training.progress.place = 3
    assert state_of(training, None, config_with(), None, 24)["progress"]["images"] == 20


# Which checkpoint


def test_an_empty_folder_or_none_has_nothing_to_go_on_from(tmp_path):
    assert find_state(config_with(), tmp_path, ALONE) is None
    assert find_state(config_with(), tmp_path / "none", ALONE) is None


def test_the_newest_checkpoint_of_the_folder_is_gone_on_from(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    found = find_state(config_with(), tmp_path, ALONE)
    assert (found.path, found.is_named) == (tmp_path / "last.pth", False)
    assert found.state["progress"]["epoch"] == 2


def test_a_checkpoint_of_the_folder_that_is_named_comes_before_the_newest(tmp_path):
    named = save(tmp_path, 1)
    save(tmp_path, 2)
    found = find_state(config_with(MODEL__RESUME=str(named)), tmp_path, ALONE)
    assert (found.path, found.is_named, found.state["progress"]["epoch"]) == (named, True, 1)


def test_a_checkpoint_lies_in_its_folder_by_whatever_name_that_goes(tmp_path, monkeypatch):
    (tmp_path / "run" / "older").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for folder in (Path("run"), tmp_path / "run", Path("link"), Path("run/older/..")):
        assert lies_in(folder, Path("run/last.pth")) and lies_in(tmp_path / "run", folder / "last.pth")
        assert not lies_in(folder, Path("run/older/last.pth")) and not lies_in(folder, Path("last.pth"))


@pytest.mark.parametrize("auto_resume", [True, False])
def test_a_folder_that_holds_another_run_than_the_checkpoint_that_is_named_is_refused(tmp_path, auto_resume):
    named = save(tmp_path / "other", 1)
    save(tmp_path / "run", 2)
    with pytest.raises(UserError, match=r"run holds a run already, which .*_2\.pth is not of: choose another --tag$"):
        find_state(config_with(MODEL__RESUME=str(named), TRAIN__AUTO_RESUME=auto_resume), tmp_path / "run", ALONE)


def test_a_checkpoint_that_is_named_takes_the_place_of_damaged_ones(tmp_path):
    named = save(tmp_path / "copy", 1)
    spoil(save(tmp_path / "run", 1))
    spoil(tmp_path / "run" / "last.pth")
    assert find_state(config_with(MODEL__RESUME=str(named)), tmp_path / "run", ALONE).path == named


@pytest.mark.parametrize("name", ["other", "modèles", "run: 1", "a #b", "[x]", "it's"])
def test_the_same_checkpoint_named_again_means_the_newest_of_the_run_that_began_with_it(tmp_path, name):
    named = save(tmp_path / name, 1)
    config = config_with(MODEL__RESUME=str(named))
    save(tmp_path / "run", 2, config)
    named.unlink()  # pruned by its own run by now
    assert find_state(config, tmp_path / "run", ALONE).path == tmp_path / "run" / "last.pth"
    config.TRAIN.AUTO_RESUME = False
    with pytest.raises(UserError, match=r"is not of: choose another --tag, or leave TRAIN\.AUTO_RESUME on$"):
        find_state(config, tmp_path / "run", ALONE)


def test_without_auto_resume_a_folder_that_holds_a_run_is_refused(tmp_path):
    save(tmp_path)
    with pytest.raises(UserError, match=r"holds a run already: choose another --tag, or leave TRAIN\.AUTO_RESUME on"):
        find_state(config_with(TRAIN__AUTO_RESUME=False), tmp_path, ALONE)


def test_without_auto_resume_a_run_is_refused_that_was_killed_before_last_pth_was_written(tmp_path):
    save(tmp_path)
    (tmp_path / "last.pth").unlink()
    with pytest.raises(UserError, match="holds a run already"):
        find_state(config_with(TRAIN__AUTO_RESUME=False), tmp_path, ALONE)


def test_without_auto_resume_a_checkpoint_may_be_named(tmp_path):
    named = save(tmp_path)
    assert find_state(config_with(TRAIN__AUTO_RESUME=False, MODEL__RESUME=str(named)), tmp_path, ALONE).path == named


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, caplog):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (tmp_path / "last.pth").unlink()
    spoil(newest)
    found = find_state(config_with(), tmp_path, ALONE)
    assert found.state["progress"]["epoch"] == 1
    assert [str(newest) in record.message for record in caplog.records] == [True, False]
    assert str(found.path) in caplog.records[1].message
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_where_all_checkpoints_are_damaged_nothing_starts(tmp_path):
    for epochs in (1, 2):
        spoil(save(tmp_path, epochs))
    spoil(tmp_path / "last.pth")
    with pytest.raises(UserError, match=f"no checkpoint in {re.escape(str(tmp_path))} can be read") as caught:
        find_state(config_with(), tmp_path, ALONE)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_that_is_named_has_no_other_in_its_place(tmp_path):
    save(tmp_path, 1)
    named = save(tmp_path, 2)
    spoil(named)
    with pytest.raises(UserError, match=re.escape(str(named))):
        find_state(config_with(MODEL__RESUME=str(named)), tmp_path, ALONE)


def test_weights_without_a_run_are_refused(tmp_path):
    checkpoint.save({"model": small_network().state_dict(), "config": config_with().dump()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth holds weights but no run to go on with: .*--pretrained"):
        find_state(config_with(MODEL__RESUME=str(tmp_path / "weights.pth")), tmp_path, ALONE)


@pytest.mark.parametrize("is_shared", [True, False])
def test_ranks_that_read_different_files_by_one_name_do_not_start(tmp_path, monkeypatch, is_shared):
    save(tmp_path)
    path = tmp_path / "last.pth"
    told = str(path), checkpoint.load(path)["checksum"] if is_shared else "another"
    monkeypatch.setattr("utils.resume.gather_objects", lambda own: [told, own])
    if is_shared:
        assert find_state(config_with(), tmp_path, World(1, 2, CPU)).path == path
    else:
        with pytest.raises(UserError, match=r"ranks read different files as .*last\.pth: put --output where all"):
            find_state(config_with(), tmp_path, World(1, 2, CPU))


# Its folder


def best_of(epoch):
    return {"epoch": epoch, "of": "ema", "acc1": 50.0 + epoch}


@pytest.fixture
def three_epochs(tmp_path):
    """The folder of a run of three epochs, each of them the best so far."""
    for epoch in range(3):
        training, folder = trained(epoch + 1), tmp_path / "run"
        training.progress.place = 0
        folder.mkdir(exist_ok=True)
        state = state_of(training, best_of(epoch), config_with(), None, 24)
        checkpoint.save_numbered(state, folder, is_best=True, every=1, keep=9)
    return folder


def found_in(folder, name, is_named=False):
    return Found(folder / name, checkpoint.load(folder / name), is_named)


def test_a_run_that_goes_back_has_the_best_epoch_by_then_as_best_pth_and_keeps_what_was_later(three_epochs):
    assert go_back(found_in(three_epochs, "ckpt_epoch_2.pth", is_named=True), three_epochs) == best_of(1)
    for name in ("best.pth", "last.pth"):
        assert checkpoint.load(three_epochs / name)["best"] == best_of(1)
    for name in ("ckpt_epoch_3.pth.old", "best.pth.old"):
        assert checkpoint.load(three_epochs / name)["best"] == best_of(2)


def test_a_run_that_goes_back_again_keeps_what_it_kept_before(three_epochs):
    first = (three_epochs / "ckpt_epoch_3.pth").read_bytes()
    go_back(found_in(three_epochs, "ckpt_epoch_2.pth", is_named=True), three_epochs)
    for content in (b"second", b"third"):
        (three_epochs / "ckpt_epoch_3.pth").write_bytes(content)
        go_back(found_in(three_epochs, "ckpt_epoch_2.pth", is_named=True), three_epochs)
    kept = [(three_epochs / f"ckpt_epoch_3.pth.{ending}").read_bytes() for ending in ("old", "old2", "old3")]
    assert kept == [first, b"second", b"third"]


def test_a_best_epoch_of_which_best_pth_alone_is_left_is_not_forgotten(three_epochs):
    found = found_in(three_epochs, "last.pth")
    found.state["best"] = best_of(0)
    (three_epochs / "ckpt_epoch_1.pth").replace(three_epochs / "best.pth")  # as where others were kept since
    assert go_back(found, three_epochs) == best_of(0)
    assert checkpoint.load(three_epochs / "best.pth")["best"] == best_of(0)


def test_a_best_epoch_whose_weights_are_gone_is_forgotten(three_epochs):
    found = found_in(three_epochs, "ckpt_epoch_2.pth")
    found.state["best"] = best_of(0)
    (three_epochs / "ckpt_epoch_1.pth").unlink()
    assert go_back(found, three_epochs) is None
    assert sorted(path.name for path in three_epochs.iterdir()) == ["best.pth", "ckpt_epoch_2.pth", "last.pth"]


def test_a_damaged_best_pth_is_put_back(three_epochs):
    spoil(three_epochs / "best.pth")
    assert go_back(found_in(three_epochs, "last.pth"), three_epochs) == best_of(2)
    assert checkpoint.load(three_epochs / "best.pth")["best"] == best_of(2)


def test_a_run_that_goes_on_from_another_folder_leaves_both_as_they_are(three_epochs, tmp_path):
    new, before = tmp_path / "new", sorted(path.name for path in three_epochs.iterdir())
    new.mkdir()
    assert go_back(found_in(three_epochs, "ckpt_epoch_3.pth", is_named=True), new) is None
    assert not list(new.iterdir())
    assert sorted(path.name for path in three_epochs.iterdir()) == before


def test_a_damaged_last_pth_is_put_back_by_the_run_that_goes_on_from_the_one_before(three_epochs):
    spoil(three_epochs / "last.pth")
    go_back(Found(*checkpoint.newest(three_epochs)), three_epochs)
    assert checkpoint.load(three_epochs / "last.pth")["progress"]["epoch"] == 3


# Weights to start from


@pytest.mark.parametrize(
    ("classes", "of_loading", "said"),
    [
        (["a", "b"], [], []),
        (None, [], []),
        (["a", "c"], [], ["{} has as many classes but others (1: b -> c): the head starts from theirs, by number"]),
        (["a", "b", "c"], ["the head starts afresh"], ["the head starts afresh"]),
    ],
)
def test_what_of_pretrained_weights_does_not_fit_is_said_once(tmp_path, caplog, classes, of_loading, said):
    path, given = save(tmp_path), []
    config = config_with(MODEL__PRETRAINED=str(path))
    start_from_pretrained(config, None, classes, lambda *arguments: given.append(arguments) or of_loading)
    assert caplog.messages == [sentence.format(path) for sentence in said]
    ((_, weights, source),) = given
    assert equal(weights, checkpoint.load(path)["ema"]) and source == str(path)  # its best epoch was chosen by that


def test_without_pretrained_weights_none_are_loaded():
    start_from_pretrained(config_with(), None, None, lambda *arguments: pytest.fail("loads"))


# The same run


@pytest.mark.parametrize("classes", [["b", "a"], ["a", "c"], ["a"], ["a", "b", "c"]])
def test_data_of_other_classes_are_refused(tmp_path, classes):
    found = Found(save(tmp_path), checkpoint.load(tmp_path / "last.pth"))
    with pytest.raises(UserError, match="is of a run on other classes"):
        check_classes(found, classes)


@pytest.mark.parametrize("classes", [["a", "b"], None])
def test_data_of_the_same_classes_or_of_unknown_ones_are_taken(tmp_path, classes):
    check_classes(Found(save(tmp_path), checkpoint.load(tmp_path / "last.pth")), classes)


@pytest.mark.parametrize(("images", "told"), [(23, ["24 training images", "has 23"]), (24, [])])
def test_another_number_of_training_images_is_told_of(tmp_path, images, told, caplog):
    tell_of_other_images(Found(save(tmp_path), checkpoint.load(tmp_path / "last.pth")), images)
    assert bool(caplog.text) == bool(told)
    assert [words for words in told if words not in caplog.text] == []


def test_a_checkpoint_that_does_not_tell_its_images_is_gone_on_from_without_a_word(caplog):
    tell_of_other_images(Found(Path("last.pth"), {}), 23)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("key", "value", "change"),
    [
        ("TRAIN.BASE_LR", 0.5, "TRAIN.BASE_LR: 1.0 -> 0.5"),
        ("SEED", 3, "SEED: 0 -> 3"),
        ("PRECISION", "bf16", "PRECISION: auto -> bf16"),
        ("MODEL.GMA.DROP_PATH_RATE", 0.5, "MODEL.GMA.DROP_PATH_RATE: 0.2 -> 0.5"),
    ],
)
def test_other_settings_are_refused_by_name_unless_they_are_allowed(tmp_path, key, value, change, caplog):
    path, config = save(tmp_path), config_with()
    set_key(config, key, value)
    with pytest.raises(UserError, match=re.escape(change)) as caught:
        find_state(config, tmp_path, ALONE)
    assert "--allow-changes" in str(caught.value)
    assert "--tag" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    config.TRAIN.ALLOW_CHANGES = True
    found = find_state(config, tmp_path, ALONE)
    assert found.state["progress"]["epoch"] == checkpoint.load(path)["progress"]["epoch"]
    restore(found.state, trained(), config)
    assert change in caplog.text


@pytest.mark.parametrize(("key", "value"), [("DATA.BATCH_SIZE", 8), ("TRAIN.ACCUMULATION_STEPS", 1)])
def test_another_make_up_of_an_update_is_refused_unless_the_run_is_elastic(tmp_path, key, value):
    save(tmp_path)
    config = config_with()
    set_key(config, key, value)
    with pytest.raises(UserError, match=rf"{key}: \d -> {value}.*--elastic"):
        find_state(config, tmp_path, ALONE)
    config.TRAIN.ELASTIC = True
    assert find_state(config, tmp_path, ALONE)


def test_all_settings_that_differ_are_told_at_once(tmp_path):
    save(tmp_path)
    with pytest.raises(UserError, match=r"\(TRAIN.BASE_LR: 1.0 -> 0.5, TRAIN.CLIP_GRAD: 5.0 -> 1.0, SEED: 0 -> 3\)"):
        find_state(config_with(TRAIN__BASE_LR=0.5, TRAIN__CLIP_GRAD=1.0, SEED=3), tmp_path, ALONE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DATA.DATA_PATH", "/elsewhere"),
        ("DATA.NUM_WORKERS", 3),
        ("DATA.PIN_MEMORY", False),
        ("DATA.ON_ERROR", "skip"),
        ("DATA.MAX_BROKEN", 0.5),
        ("TRAIN.SAVE_UPDATES", 5),
        ("TRAIN.SAVE_MINUTES", 5.0),
        ("TRAIN.ON_NONFINITE", "skip"),
        ("TRAIN.MAX_LEFT_OUT", 9),
        ("TRAIN.ALLOW_CHANGES", True),
        ("TRAIN.ELASTIC", True),
        ("DEVICE", "cpu"),
        ("RANK_TIMEOUT", 60),
        ("OUTPUT", "elsewhere"),
        ("TAG", "moved"),
        ("SAVE_FREQ", 2),
        ("KEEP", 9),
        ("WANDB", "project"),
        ("PRINT_FREQ", 1),
    ],
)
def test_where_things_lie_and_what_to_do_when_they_fail_may_change(tmp_path, caplog, key, value):
    save(tmp_path)
    config = config_with()
    set_key(config, key, value)
    assert config != config_with()
    restore(find_state(config, tmp_path, ALONE).state, trained(), config)
    assert not caplog.records


def test_a_run_that_is_named_takes_the_place_of_other_weights_to_start_from(tmp_path):
    named = save(tmp_path)
    config = config_with(MODEL__PRETRAINED="weights.pth")
    with pytest.raises(UserError, match=r"MODEL\.PRETRAINED:  -> weights\.pth"):
        find_state(config, tmp_path, ALONE)
    config.MODEL.RESUME = str(named)
    assert find_state(config, tmp_path, ALONE).path == named


def test_moments_have_the_layout_of_their_parameters_whatever_the_checkpoints_was():
    config, states = config_with(TRAIN__ALLOW_CHANGES=True), []

    def training(layout):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 3)).double()
        return training_of(nn.Sequential(nn.Flatten(), network).to(memory_format=layout), 6, config)

    for layouts in [(torch.contiguous_format,) * 2, (torch.contiguous_format, torch.channels_last)]:
        first, second = map(training, layouts)
        train(first, batches(6, 4), 0)
        restore(state_of(first, None, config, None, 24), second, config)
        train(second, batches(6, 4), 1)
        states.append(second.network.state_dict())
    torch.testing.assert_close(*states, rtol=1e-10, atol=1e-12)


def test_kernels_of_the_optimizer_are_those_of_the_run_that_goes_on(tmp_path):
    saved, config = checkpoint.load(save(tmp_path)), config_with()
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = None  # as before there were fused ones
    training = training_of(small_network(), 6, config)
    restore(saved, training, config)
    assert {group["fused"] for group in training.optimizer.param_groups} == {True}


def test_settings_of_the_optimizer_are_those_of_the_run_that_goes_on(tmp_path):
    path = save(tmp_path)
    config = config_with(TRAIN__WEIGHT_DECAY=0.25, TRAIN__ALLOW_CHANGES=True)
    training = training_of(small_network(), 6, config)
    restore(checkpoint.load(path), training, config)
    assert {group["weight_decay"] for group in training.optimizer.param_groups} == {0.25, 0.0}


def test_a_moving_average_that_begins_later_begins_at_the_weights(tmp_path):
    path = save(tmp_path, config=config_with(TRAIN__EMA_DECAY=0.0))
    training = training_of(small_network(), 6, config_with(TRAIN__ALLOW_CHANGES=True))
    restore(checkpoint.load(path), training, config_with())
    assert equal(dict(training.ema.module.state_dict()), dict(training.network.state_dict()))
    assert not equal(dict(training.network.state_dict()), dict(small_network().state_dict()))


def shorter_epochs():
    return training_of(small_network(), 4, config_with())


def more_classes():
    return training_of(small_network(4), 6, config_with())


def fewer_parameters():
    network = small_network()
    return training_of(network, 6, config_with(), optimizer=torch.optim.SGD([network[1].bias]))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (shorter_epochs, "has 3 updates an epoch and this run 2: use the same data"),
        (more_classes, "does not fit the network"),
        (fewer_parameters, "the checkpoint's optimizer does not fit"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(tmp_path, training, message):
    state = checkpoint.load(save(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        restore(state, training(), config_with())
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_kind_of_optimizer_is_refused(tmp_path):
    state = checkpoint.load(save(tmp_path, config=config_with(TRAIN__OPTIMIZER__NAME="sgd")))
    config = config_with(TRAIN__ALLOW_CHANGES=True)
    with pytest.raises(UserError, match="optimizer"):
        restore(state, training_of(small_network(), 6, config), config)


# Another number of ranks


TWO_RANKS = World(0, 2, CPU)


def test_another_number_of_ranks_is_refused_in_a_sentence(tmp_path):
    save(tmp_path)
    with pytest.raises(UserError, match=r"on 1 rank\(s\), and this one has 2: use as many, or add --elastic") as caught:
        find_state(config_with(), tmp_path, TWO_RANKS)
    assert "8 images an update" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "batch_size", "accumulation"), [(2, 4, 1), (1, 4, 2), (2, 2, 2), (4, 1, 2), (1, 8, 1), (8, 1, 1)]
)
def test_an_elastic_run_keeps_its_images_an_update(tmp_path, ranks, batch_size, accumulation, caplog):
    save(tmp_path)
    config = config_with(TRAIN__ELASTIC=True, DATA__BATCH_SIZE=batch_size)
    world = World(0, ranks, CPU)
    found = find_state(config, tmp_path, world)
    fitted = fit_to_ranks(config, found, world)
    steps = [one.TRAIN.ACCUMULATION_STEPS for one in (fitted, config)]
    assert steps == [accumulation, 2]
    is_exact = (ranks, batch_size) == (1, 4)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * (not is_exact)
    assert is_exact or "no longer those of one whole run" in caplog.text


def test_an_elastic_run_that_cannot_keep_its_images_an_update_is_refused(tmp_path):
    save(tmp_path)
    config, world = config_with(TRAIN__ELASTIC=True), World(0, 3, CPU)
    found = find_state(config, tmp_path, world)
    with pytest.raises(
        UserError, match=r"8 images cannot be made of steps of 12 .* --batch-size that divides 8"
    ) as caught:
        fit_to_ranks(config, found, world)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("found", "elastic"), [(None, True), (None, False), (Found("x", {}), False)])
def test_without_a_run_to_fit_or_the_flag_the_accumulation_stays(found, elastic):
    config = config_with(TRAIN__ELASTIC=elastic)
    assert fit_to_ranks(config, found, TWO_RANKS) is config


def test_an_epoch_that_is_shorter_than_an_update_is_refused():
    config = config_with(TRAIN__ACCUMULATION_STEPS=4)
    assert steps_of_epoch(config, None, 4) == 4
    with pytest.raises(UserError, match=r"TRAIN\.ACCUMULATION_STEPS is 4, but an epoch has 3 step\(s\)"):
        steps_of_epoch(config, None, 3)


@pytest.mark.parametrize(("accumulation", "steps", "wanted"), [(2, 6, 6), (2, 7, 6), (2, 5, 5), (4, 14, 12)])
def test_an_elastic_epoch_has_no_more_updates_than_that_of_the_run_it_goes_on_with(
    tmp_path, accumulation, steps, wanted
):
    save(tmp_path)
    config = config_with(TRAIN__ELASTIC=True)
    found = find_state(config, tmp_path, ALONE)
    config.TRAIN.ACCUMULATION_STEPS = accumulation
    assert steps_of_epoch(config, found, steps) == wanted
    assert steps_of_epoch(config, None, steps) == steps
    config.TRAIN.ELASTIC = False
    assert steps_of_epoch(config, found, steps) == steps


def test_permissions_to_differ_hold_for_one_start_only():
    config = config_with(TRAIN__ELASTIC=True, TRAIN__ALLOW_CHANGES=True, SEED=3)
    kept = without_permissions(config)
    assert (kept.TRAIN.ELASTIC, kept.TRAIN.ALLOW_CHANGES, kept.SEED) == (False, False, 3)
    assert config.TRAIN.ELASTIC


def test_an_elastic_run_refuses_other_settings_still(tmp_path):
    save(tmp_path)
    with pytest.raises(UserError, match="SEED: 0 -> 3"):
        find_state(config_with(TRAIN__ELASTIC=True, SEED=3), tmp_path, TWO_RANKS)


def test_progress_that_is_none_is_refused(tmp_path):
    state = {"model": small_network().state_dict(), "progress": Progress().state_dict(), "config": ""}
    checkpoint.save(state, tmp_path / "last.pth")
    with pytest.raises(UserError, match="no run to go on with"):
        find_state(config_with(), tmp_path, ALONE)
