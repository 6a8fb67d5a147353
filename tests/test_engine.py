"""One epoch of training and one evaluation, against literal forms of both."""

import contextlib
import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers_unit import (
    ALONE,
    CPU,
    all_of,
    batches,
    configured,
    equal,
    fine,
    plain_training,
    small_network,
    to_score,
    train,
    training_of,
)
from torch import nn

from data.build import EvalData, build_mixup
from models import GroupMixFormer
from utils.dist import World
from utils.engine import Watch, evaluate, train_one_epoch
from utils.errors import BrokenDataError, OneRankError, Stopped, UserError
from utils.precision import Precision
from utils.progress import Steps
from utils.seeding import seed_everything

FP32 = Precision("fp32", "cpu")


def weights_of(network):
    return [parameter.detach().clone() for parameter in network.parameters()]


def joined(micro_batches, count):
    """The same data in micro-batches `count` times as large, the last one perhaps smaller."""
    parts = [micro_batches[start : start + count] for start in range(0, len(micro_batches), count)]
    return fine(tuple(torch.cat([batch[i] for batch in part]) for i in range(2)) for part in parts)


def in_single(micro_batches):
    return fine((images.float(), targets) for images, targets, _ in micro_batches)


def gradient_norm(network, images, targets):
    """The norm of the gradients of the mean loss, by itself."""
    loss = nn.functional.cross_entropy(network(images), targets)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients))


# Accumulation


@pytest.mark.parametrize(("steps", "accumulation"), [(4, 2), (5, 2), (6, 4), (2, 3)])
def test_accumulating_micro_batches_is_training_on_their_whole(steps, accumulation):
    data = batches(steps, 4)
    pieces, whole = small_network(), small_network()
    config = plain_training(TRAIN__ACCUMULATION_STEPS=accumulation)
    reports = train(training_of(pieces, steps, config), data)
    config = plain_training(DATA__BATCH_SIZE=4 * accumulation)
    whole_reports = train(training_of(whole, math.ceil(steps / accumulation), config), joined(data, accumulation))
    assert len(reports) == len(whole_reports) == math.ceil(steps / accumulation)
    for ours, theirs in zip(reports, whole_reports, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-12)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-12)
        assert ours.lr == theirs.lr
    torch.testing.assert_close(weights_of(pieces), weights_of(whole), rtol=1e-10, atol=1e-12)
    assert not torch.equal(weights_of(pieces)[0], weights_of(small_network())[0])


def test_gradients_are_exchanged_only_in_the_last_step_of_an_update():
    class Wrapped(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.silent, self.calls = network, False, []

        @contextlib.contextmanager
        def no_sync(self):
            self.silent = True
            yield
            self.silent = False

        def forward(self, images):
            self.calls.append(self.silent)
            return self.network(images)

    network = small_network()
    model = Wrapped(network)
    train(training_of(network, 5, plain_training(TRAIN__ACCUMULATION_STEPS=2), model=model), batches(5, 4))
    assert model.calls == [True, False, True, False, False]


# Clipping


def sgd_step(clip, accumulation=1, lr=0.1):
    """A step of plain gradient descent on a batch; the report, the weights' change, and the gradients."""
    network, data = small_network(), batches(accumulation, 4)
    before = weights_of(network)
    images, targets, _ = joined(data, accumulation)[0]
    gradients = torch.autograd.grad(
        nn.functional.cross_entropy(network(images), targets), list(network.parameters()), materialize_grads=True
    )
    config = plain_training(TRAIN__CLIP_GRAD=clip, TRAIN__ACCUMULATION_STEPS=accumulation, TRAIN__EPOCHS=1)
    training = training_of(network, accumulation, config, optimizer=torch.optim.SGD(network.parameters(), lr=lr))
    (report,) = train(training, data)
    changes = [after - was for after, was in zip(weights_of(network), before, strict=True)]
    return report, changes, gradients


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_gradient_of_an_update_is_clipped_once_and_reported_unclipped(accumulation):
    clip = 0.01
    report, changes, gradients = sgd_step(clip, accumulation)
    norm = math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients))
    assert norm > 10 * clip
    assert report.grad_norm == pytest.approx(norm, rel=1e-9)
    wanted = [-0.1 * gradient * clip / norm for gradient in gradients]
    torch.testing.assert_close(changes, wanted, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("clip", [0.0, 1e6])
def test_small_gradients_and_those_that_nothing_clips_stay_whole(clip):
    report, changes, gradients = sgd_step(clip)
    torch.testing.assert_close(changes, [-0.1 * gradient for gradient in gradients], rtol=1e-9, atol=1e-12)
    assert report.grad_norm > 0


# Schedule


def test_the_schedule_moves_on_once_an_update():
    class Recorder:
        def __init__(self):
            self.updates = []

        def step_update(self, update):
            self.updates.append(update)

    recorder = Recorder()
    config = plain_training(TRAIN__ACCUMULATION_STEPS=2, TRAIN__EPOCHS=3)
    training = training_of(small_network(), 5, config, scheduler=recorder)
    for epoch in range(3):
        train(training, batches(5, 4), epoch)
    assert recorder.updates == list(range(9))


def test_an_update_is_taken_at_its_own_learning_rate():
    config = plain_training(TRAIN__EPOCHS=4, TRAIN__WARMUP_EPOCHS=2, TRAIN__WARMUP_LR=0.0)
    network = small_network()
    training = training_of(network, 1, config)
    (first,) = train(training, batches(1, 4), 0)
    assert first.lr == 0.0
    assert equal(weights_of(network), weights_of(small_network()))
    (second,) = train(training, batches(1, 4), 1)
    assert second.lr == pytest.approx(1.0 * 4 / 512 / 2)
    assert not equal(weights_of(network), weights_of(small_network()))


# Moving average


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_moving_average_copies_first_and_then_decays_once_an_update(accumulation):
    decay, network = 0.8, nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3)).double()
    config = plain_training(TRAIN__EMA_DECAY=decay, TRAIN__ACCUMULATION_STEPS=accumulation)
    training = training_of(network, 6, config)
    average = None

    def follow(report):
        nonlocal average
        state = {name: value.clone() for name, value in network.state_dict().items()}
        if average is None:
            average = state
        for name, value in state.items():
            decayed = decay * average[name] + (1 - decay) * value if value.is_floating_point() else value
            average[name] = decayed if report.update > 1 else value

    for epoch in range(2):
        train(training, batches(6, 4), epoch, follow=follow)
    found = training.ema.module.state_dict()
    assert set(found) == set(average)
    for name, value in found.items():
        torch.testing.assert_close(value, average[name], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found["2.weight"], network.state_dict()["2.weight"])


# Randomness


class Draws(nn.Module):
    """A network that notes what the generators give in every step."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(12, 3, dtype=torch.float64), []

    def forward(self, images):
        self.seen.append(float(torch.rand(())))
        return self.layer(images.flatten(1))


def draws(seed=0, rank=0, accumulation=1, epochs=(0,), steps=4):
    network = Draws()
    world = World(rank, 1, CPU)
    config = plain_training(SEED=seed, TRAIN__ACCUMULATION_STEPS=accumulation)
    training = training_of(network, steps, config, world=world)
    for epoch in epochs:
        train(training, batches(steps, 4), epoch)
    return network.seen


def test_a_steps_randomness_repeats_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = draws(accumulation=2, epochs=(0, 1))
    torch.manual_seed(2)
    assert draws(accumulation=2, epochs=(0, 1)) == first
    assert draws(accumulation=2, epochs=(1,)) == first[4:]


def test_a_steps_randomness_differs_by_seed_update_step_and_rank():
    seen = draws(accumulation=2, epochs=(0, 1)) + draws(accumulation=2, seed=1) + draws(accumulation=2, rank=1)
    assert len(set(seen)) == len(seen) == 16


def drawn_by_finish(seed=0, rank=0, epochs=(0, 1)):
    """What the generators of Python and torch give to `finish` in every step, and to mixup and the network after it."""
    seen = []

    def finish(images):
        seen.append((random.random(), float(torch.rand(()))))
        return images

    def mixup(images, targets):
        seen.append("mixup")
        return images, targets

    network = small_network()
    network.register_forward_pre_hook(lambda module, inputs: seen.append("network"))
    config = plain_training(SEED=seed, TRAIN__ACCUMULATION_STEPS=2)
    training = training_of(network, 4, config, world=World(rank, 1, CPU), finish=finish, batch_transform=mixup)
    for epoch in epochs:
        train(training, batches(4, 4), epoch)
    return seen


def test_images_are_finished_by_the_steps_randomness_ahead_of_mixup():
    torch.manual_seed(1)
    first = drawn_by_finish()
    assert first[1::3] == ["mixup"] * 8
    assert first[2::3] == ["network"] * 8
    random.seed(2)
    assert drawn_by_finish(epochs=(1,)) == first[12:]
    assert len({*first[::3], *drawn_by_finish(seed=1)[::3], *drawn_by_finish(rank=1)[::3]}) == 24


def test_evaluation_finishes_images_too():
    plain = evaluate(Fixed(), to_score(batches(2, 4)), ALONE, FP32)
    halved = fine((images / 2, targets) for images, targets, _ in batches(2, 4))
    assert evaluate(Fixed(), EvalData(halved, lambda images: images * 2, None, 0, 0), ALONE, FP32) == plain


def test_what_the_loader_draws_does_not_reach_the_network():
    def drawing(count):
        for batch in batches(4, 4):
            torch.rand(count)
            yield batch

    networks = [Draws(), Draws()]
    for count, network in enumerate(networks):
        train(training_of(network, 4), drawing(count))
    assert networks[0].seen == networks[1].seen


def image_training(state=None):
    """A real network with drop path, mixup and a moving average, over two epochs of five micro-batches of four."""
    config = configured(
        DATA__BATCH_SIZE=4,
        TRAIN__EPOCHS=2,
        TRAIN__WARMUP_EPOCHS=1,
        TRAIN__BASE_LR=0.1,
        TRAIN__ACCUMULATION_STEPS=2,
        TRAIN__EMA_DECAY=0.5,
        TRAIN__LAYER_DECAY=0.9,
    )
    seed_everything(5 if state is None else 77)
    network = GroupMixFormer(
        embed_dims=(40,) * 4,
        depths=(1,) * 4,
        mlp_ratios=(2,) * 4,
        num_classes=3,
        drop_path_rate=0.5,
        proj_drop_rate=0.1,
    )
    training = training_of(network, 5, config, batch_transform=build_mixup(config, 3))
    if state is not None:
        network.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.ema.module.load_state_dict(state["ema"])
        training.progress.load_state_dict(state["progress"])
    return training


def image_batches(epoch):
    generator = torch.Generator().manual_seed(epoch)
    return fine(
        (torch.randn(4, 3, 64, 64, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(5)
    )


class Diary(Watch):
    """Keeps, for each update, all that has to be saved after it, and its numbers as hex floats."""

    def __init__(self, training):
        self.training, self.states, self.numbers, self.report = training, [], [], None

    def on_report(self, report):
        self.report = report.update, report.loss.hex(), report.grad_norm.hex(), report.lr.hex()

    def on_update(self, signal, failed):
        self.states.append(all_of(self.training))
        progress = self.training.progress
        window = progress.window.updates, progress.window.loss.hex(), progress.window.grad_norm.hex()
        self.numbers.append((progress.epoch, progress.place, self.report, window))
        self.report = None


def to_the_end(training):
    """Trains to the end of the run as train.py does, with a report every two updates; what was noted on the way."""
    diary, steps = Diary(training), training.steps
    while training.progress.epoch < steps.epochs:
        left = image_batches(training.progress.epoch)[training.progress.place * steps.accumulation :]
        train_one_epoch(training, left, 2, diary)
        training.progress.end_epoch()
    return diary


@pytest.fixture(scope="module")
def undisturbed():
    return to_the_end(image_training())


@pytest.mark.parametrize("update", range(1, 6))
def test_a_run_gone_on_with_after_any_update_is_the_undisturbed_run_bit_for_bit(undisturbed, update, tmp_path):
    torch.save(undisturbed.states[update - 1], tmp_path / "state.pth")
    resumed = image_training(torch.load(tmp_path / "state.pth", weights_only=True))
    torch.rand(5)
    diary = to_the_end(resumed)
    assert diary.numbers == undisturbed.numbers[update:]
    assert equal(diary.states, undisturbed.states[update:])


def test_the_undisturbed_run_has_a_window_open_inside_each_epoch_and_never_stands_still(undisturbed):
    assert [(place, bool(report), window[0]) for _, place, report, window in undisturbed.numbers] == [
        (1, False, 1), (2, True, 0), (3, True, 0), (1, False, 1), (2, True, 0), (3, True, 0),
    ]  # fmt: skip
    for name in ("model", "ema", "optimizer"):
        states = [state[name] for state in undisturbed.states]
        assert not any(equal(one, next_one) for one, next_one in itertools.pairwise(states))


# What cannot go on


def losing(calls_lost, value=math.nan):
    """A loss that is no number in some of its calls, numbered from 0."""
    calls = itertools.count()
    return lambda x, y: nn.functional.cross_entropy(x, y) + (value if next(calls) in calls_lost else 0)


def losing_gradients(calls_lost):
    """A loss that is a number, but whose gradient is none in some of its calls."""
    calls = itertools.count()

    def criterion(logits, targets):
        lost = (logits * 0).sum().abs().sqrt() if next(calls) in calls_lost else 0  # is 0, its gradient no number
        return nn.functional.cross_entropy(logits, targets) + lost

    return criterion


def losing_training(criterion, steps=6, **others):
    """Two micro-batches an update, a moving average, and a loss that spoils some updates."""
    config = plain_training(TRAIN__ACCUMULATION_STEPS=2, TRAIN__EMA_DECAY=0.5)
    return training_of(small_network(), steps, config, criterion=criterion, **others)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [2, 3])
def test_a_loss_that_is_no_number_is_seen_before_its_update(value, step):
    training = losing_training(losing({step}, value))
    diary = Diary(training)
    with pytest.raises(UserError, match=f"the loss became {value} on rank 0 at update 2 of epoch 0") as caught:
        train_one_epoch(training, batches(6, 4), 10, diary)
    assert "\n" not in str(caught.value)
    assert len(diary.states) == 1
    assert equal(all_of(training), diary.states[0])


def test_gradients_that_are_no_numbers_are_seen_before_their_update():
    training = losing_training(losing_gradients({2}))
    diary = Diary(training)
    with pytest.raises(UserError, match="the norm of the gradients became nan at update 2 of epoch 0"):
        train_one_epoch(training, batches(6, 4), 10, diary)
    assert equal(all_of(training), diary.states[0])


# Updates that are left out


def scaler():
    """A loss scaler whose powers of two change no bits of what fits double precision."""
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)


def without(lost):
    """The training that never had some of its six updates, which others are scheduled as."""
    whole = losing_training(losing(()), steps=12, scaler=scaler())
    data = [batch for place in range(6) if place not in lost for batch in batches(12, 4)[2 * place : 2 * place + 2]]
    training = replace(whole, steps=Steps(len(data), 2, whole.steps.epochs))
    train_one_epoch(training, data, 10, Watch())
    return training


LOSSES_OF_UPDATES_2_3_AND_5 = {2, 5, 8, 9}


@pytest.mark.parametrize("spoil", [losing, losing_gradients])
def test_under_a_loss_scaler_updates_that_are_no_numbers_are_left_out_and_the_rest_is_as_without_them(spoil):
    training = losing_training(spoil(LOSSES_OF_UPDATES_2_3_AND_5), steps=12, scaler=scaler())
    diary = Diary(training)
    train_one_epoch(training, batches(12, 4), 10, diary)
    counts = [(p["place"], p["updates"], p["left_out"], p["left_out_in_row"]) for p in progress_of(diary)]
    assert counts == [(1, 1, 0, 0), (2, 1, 1, 1), (3, 1, 2, 2), (4, 2, 2, 0), (5, 2, 3, 1), (6, 3, 3, 0)]
    wanted = all_of(without({1, 2, 4}))
    for part in ("model", "ema", "optimizer"):
        assert equal(all_of(training)[part], wanted[part])


def progress_of(diary):
    return [state["progress"] for state in diary.states]


def test_an_update_that_is_left_out_changes_nothing_but_the_scale():
    training = losing_training(losing_gradients({2}), scaler=scaler())
    diary = Diary(training)
    train_one_epoch(training, batches(6, 4), 10, diary)
    before, after = diary.states[:2]
    assert all(equal(before[part], after[part]) for part in ("model", "ema", "optimizer"))
    assert (before["scaler"]["scale"], after["scaler"]["scale"]) == (1024.0, 512.0)


def test_the_schedule_counts_only_updates_that_are_taken():
    updates = []

    class Recorder:
        def step_update(self, update):
            updates.append(update)

    train_one_epoch(
        losing_training(losing(LOSSES_OF_UPDATES_2_3_AND_5), steps=12, scaler=scaler(), scheduler=Recorder()),
        batches(12, 4), 10, Watch(),
    )  # fmt: skip
    assert list(dict.fromkeys(updates)) == [0, 1, 2]


def test_too_many_updates_left_out_in_a_row_end_the_run_and_a_good_one_begins_a_new_row():
    training = losing_training(losing({0, 2, 6, 8}), steps=12, scaler=scaler(), most_left_out=3)
    train_one_epoch(training, batches(12, 4), 10, Watch())
    assert training.progress.left_out == 4
    training = losing_training(losing({0, 4, 6, 8}), steps=12, scaler=scaler(), most_left_out=3)
    with pytest.raises(UserError, match="at update 5 of epoch 0, and 3 updates in a row were left out: ") as caught:
        train_one_epoch(training, batches(12, 4), 10, Watch())
    assert "\n" not in str(caught.value)


def test_a_row_of_updates_left_out_goes_on_in_a_resumed_run():
    training = losing_training(losing({2, 4}), scaler=scaler(), most_left_out=3)
    train_one_epoch(training, batches(6, 4), 10, Watch())
    resumed = losing_training(losing({0}), scaler=scaler(), most_left_out=3)
    resumed.progress.load_state_dict(training.progress.state_dict())
    resumed.progress.end_epoch()
    with pytest.raises(UserError, match="at update 1 of epoch 1, and 3 updates in a row"):
        train_one_epoch(resumed, batches(6, 4), 10, Watch())


def test_a_report_tells_of_updates_left_out_and_averages_the_others():
    data = batches(4, 4)
    plain = train(training_of(small_network(), 1), data[:1])
    training = training_of(small_network(), 4, criterion=losing({1, 2, 3}), scaler=scaler())
    first, second = train(training, data, every=2)
    assert (first.loss, first.left_out, first.update) == (plain[0].loss, 1, 2)
    assert math.isnan(second.loss)
    assert math.isnan(second.grad_norm)
    assert (second.left_out, second.update) == (3, 4)


def test_a_forward_pass_that_overflows_leaves_no_running_statistics_that_are_no_numbers():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3)).double()
    data = batches(3, 4)
    data[1] = (data[1][0] * math.inf, *data[1][1:])
    try:
        train(training_of(network, 3, scaler=scaler()), data)
    except UserError:
        return
    assert all(buffer.isfinite().all() for buffer in network.buffers())


class Lenient(Diary):
    """Lets updates that are no numbers be left out, and notes what it is told of them."""

    def __init__(self, training):
        super().__init__(training)
        self.told = []

    def on_not_finite(self, what, losses):
        self.told.append((what, [math.isfinite(loss) for loss in losses], self.training.progress.place))


@pytest.mark.parametrize("spoil", [losing, losing_gradients])
def test_without_a_loss_scaler_the_watch_decides_whether_an_update_that_is_no_number_is_left_out(spoil):
    training = losing_training(spoil({2}))
    watch = Lenient(training)
    train_one_epoch(training, batches(6, 4), 10, watch)
    ((what, losses_are_finite, place),) = watch.told
    assert what.endswith(" at update 2 of epoch 0")
    assert (losses_are_finite, place) == ([spoil is losing_gradients], 1)
    progress = training.progress
    assert (progress.place, progress.updates, progress.left_out) == (3, 2, 1)
    data = batches(6, 4)
    unharmed = replace(losing_training(losing(())), steps=Steps(4, 2, training.steps.epochs))
    train_one_epoch(unharmed, [*data[:2], *data[4:]], 10, Watch())
    assert all(equal(all_of(training)[part], all_of(unharmed)[part]) for part in ("model", "ema", "optimizer"))


def test_an_update_that_is_left_out_takes_no_randomness_from_the_others():
    config, network, calls = plain_training(TRAIN__ACCUMULATION_STEPS=2), Draws(), itertools.count()
    training = training_of(network, 6, config)
    criterion = training.criterion
    losing_one = replace(training, criterion=lambda x, y: criterion(x, y) + (math.nan if next(calls) == 2 else 0))
    train_one_epoch(losing_one, batches(6, 4), 10, Lenient(losing_one))
    assert network.seen == draws(accumulation=2, steps=6)


# What the loop tells, and asks


class Alarmed(Watch):
    """Notes what it is told, and gives alarms, one for each update."""

    def __init__(self, training, alarms=(), broken_stop=False):
        self.training, self.alarms, self.told = training, iter(alarms), []
        self.broken_stop = broken_stop

    def alarm(self):
        return next(self.alarms, (0, False))

    def on_broken(self, complaints):
        self.told.append((self.training.progress.place, complaints))

    def on_update(self, signal, failed):
        self.told.append((self.training.progress.place, signal, failed))


def with_complaints(micro_batches, **complaints):
    """The same data, with complaints about the first images of some micro-batches: batch_1=["...", "..."]."""
    data = list(micro_batches)
    for name, texts in complaints.items():
        number = int(name.removeprefix("batch_"))
        images, targets, _ = data[number]
        data[number] = images, targets, [*texts, *[""] * (len(targets) - len(texts))]
    return data


def test_complaints_about_images_are_told_before_their_update():
    training = training_of(small_network(), 5, plain_training(TRAIN__ACCUMULATION_STEPS=2))
    watch = Alarmed(training)
    data = with_complaints(batches(5, 4), batch_2=["a", "b"], batch_3=["c"], batch_4=["a"])
    train_one_epoch(training, data, 10, watch)
    assert watch.told == [(1, 0, False), (1, ["a", "b", "c"]), (2, 0, False), (2, ["a"]), (3, 0, False)]


def test_by_default_an_update_with_a_broken_image_is_not_taken():
    training = losing_training(losing(()))
    diary = Diary(training)
    with pytest.raises(BrokenDataError, match=r"^a\.png is broken$"):
        train_one_epoch(training, with_complaints(batches(6, 4), batch_3=["a.png is broken"]), 10, diary)
    assert len(diary.states) == 1
    assert equal(all_of(training), diary.states[0])


def test_alarms_are_told_after_the_update_that_they_came_before():
    training = training_of(small_network(), 4)
    watch = Alarmed(training, [(0, False), (15, False), (0, True), (10, True)])
    train_one_epoch(training, batches(4, 4), 10, watch)
    assert watch.told == [(1, 0, False), (2, 15, False), (3, 0, True), (4, 10, True)]


def test_what_a_watch_raises_after_an_update_ends_the_epoch_there():
    class Leaving(Watch):
        def on_update(self, signal, failed):
            raise Stopped(15)

    training = training_of(small_network(), 4)
    with pytest.raises(Stopped):
        train_one_epoch(training, batches(4, 4), 10, Leaving())
    assert training.progress.place == 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loader_that_gives_too_little_is_an_error_that_its_rank_tells_of(accumulation):
    config = plain_training(TRAIN__ACCUMULATION_STEPS=accumulation)
    with pytest.raises(OneRankError, match="fewer than the 5 batches of epoch 0"):
        train(training_of(small_network(), 5, config), batches(3, 4))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loader_that_gives_too_much_does_no_harm(accumulation):
    config = plain_training(TRAIN__ACCUMULATION_STEPS=accumulation)
    exact, longer = small_network(), small_network()
    train(training_of(exact, 3, config), batches(5, 4)[:3])
    training = training_of(longer, 3, config)
    try:
        train(training, batches(5, 4))
    except UserError:
        return
    assert equal(weights_of(longer), weights_of(exact))
    assert all(parameter.grad is None for parameter in longer.parameters())


# Reports


@pytest.mark.parametrize(
    ("every", "accumulation", "at"), [(1, 1, [1, 2, 3, 4, 5]), (2, 1, [2, 4, 5]), (9, 1, [5]), (2, 2, [2, 3])]
)
def test_reports_come_every_so_many_updates_and_at_the_end(every, accumulation, at):
    config = plain_training(TRAIN__ACCUMULATION_STEPS=accumulation)
    training = training_of(small_network(), 5, config)
    per_epoch = math.ceil(5 / accumulation)
    for epoch in (0, 1):
        reports = train(training, batches(5, 4), epoch, every)
        assert [report.update_in_epoch for report in reports] == at
        assert [report.update for report in reports] == [epoch * per_epoch + update for update in at]
        assert {report.epoch for report in reports} == {epoch}


def test_a_report_averages_since_the_last_one():
    data = batches(5, 4)
    single = train(training_of(small_network(), 5), data, every=1)
    pairs = train(training_of(small_network(), 5), data, every=2)
    for name in ("loss", "grad_norm"):
        values = [getattr(report, name) for report in single]
        wanted = [(values[0] + values[1]) / 2, (values[2] + values[3]) / 2, values[4]]
        assert [getattr(report, name) for report in pairs] == pytest.approx(wanted, rel=1e-12)
    assert [report.lr for report in pairs] == [single[1].lr, single[3].lr, single[4].lr]
    first = small_network()
    assert single[0].loss == pytest.approx(nn.functional.cross_entropy(first(data[0][0]), data[0][1]).item(), rel=1e-12)
    assert single[0].grad_norm == pytest.approx(gradient_norm(first, *data[0][:2]), rel=1e-9)


@pytest.mark.parametrize("rates", [(0.1, 0.2), (0.2, 0.1)])
def test_a_report_tells_the_largest_learning_rate(rates):
    network = small_network()
    groups = [{"params": [parameter], "lr": lr} for parameter, lr in zip(network.parameters(), rates, strict=False)]
    unscheduled = SimpleNamespace(step_update=lambda update: None)
    training = training_of(network, 1, optimizer=torch.optim.SGD(groups), scheduler=unscheduled)
    (report,) = train(training, batches(1, 4))
    assert report.lr == 0.2


def test_a_report_measures_time_and_memory():
    (report,) = train(training_of(small_network(), 3), batches(3, 4), every=3)
    assert report.images_per_s == pytest.approx(4 / report.seconds)
    assert report.seconds > 0
    assert 0 <= report.data_share <= 1
    assert report.memory_mb > 10


# Precision and layout


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_a_network_trains_in_every_precision(name):
    network = small_network().float()
    before, seen = weights_of(network), []
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    precision = Precision(name, "cpu")
    training = training_of(network, 4, plain_training(TRAIN__BASE_LR=1e-2), precision=precision)
    if name == "fp16":
        training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 256.0})
    reports = train(training, in_single(batches(4, 4)))
    assert set(seen) == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]}
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in network.parameters())
    assert not torch.equal(network[1].weight, before[0])
    full = small_network().float()
    images, targets, _ = batches(4, 4)[0]
    assert reports[0].grad_norm == pytest.approx(gradient_norm(full, images.float(), targets), rel=0.05)


def test_an_overflow_in_half_precision_skips_the_update_and_goes_on():
    network = small_network().float()
    training = training_of(network, 1, precision=Precision("fp16", "cpu"))
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0**60})
    before = weights_of(network)
    train(training, in_single(batches(1, 4)))
    assert equal(weights_of(network), before)
    assert training.scaler.get_scale() == 2.0**59
    assert (training.progress.updates, training.progress.left_out) == (0, 1)


# Evaluation


class Fixed(nn.Module):
    """Gives back the first pixels as logits."""

    def forward(self, images):
        return images.flatten(1)[:, :6]


@pytest.mark.parametrize("size", [1, 3, 7, 23, 50])
def test_an_evaluation_counts_exactly_whatever_the_batch_size(size):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(23, 3, 2, 2, generator=generator)
    targets = torch.randint(6, (23,), generator=generator)
    logits = images.flatten(1)[:, :6]
    score = evaluate(Fixed(), to_score(fine(zip(images.split(size), targets.split(size), strict=True))), ALONE, FP32)
    assert score.images == 23
    assert score.correct1 == int((logits.argmax(1) == targets).sum())
    assert score.correct5 == 23 - int((logits.argmin(1) == targets).sum())
    assert score.loss == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), rel=1e-5)


def test_an_evaluation_changes_nothing_of_the_network_and_takes_no_gradient():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 3)).double()
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    recorded = []
    network.register_forward_hook(lambda module, inputs, output: recorded.append(output.requires_grad))
    first = evaluate(network, to_score(batches(3, 4)), ALONE, FP32)
    assert evaluate(network, to_score(batches(3, 4)), ALONE, FP32) == first
    assert equal(dict(network.state_dict()), before)
    assert set(recorded) == {False}


def test_training_goes_on_in_training_mode_after_an_evaluation():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3)).double()
    training = training_of(network, 2)
    train(training, batches(2, 4))
    evaluate(network, to_score(batches(2, 4)), ALONE, FP32)
    before = int(network[1].num_batches_tracked)
    train(training, batches(2, 4), 1)
    assert int(network[1].num_batches_tracked) == before + 2


def test_an_evaluation_leaves_the_next_epoch_as_it_would_be():
    networks = [small_network(), small_network()]
    for scored, network in enumerate(networks):
        training = training_of(network, 3)
        train(training, batches(3, 4))
        if scored:
            evaluate(network, to_score(batches(3, 4)), ALONE, FP32)
        train(training, batches(3, 4), 1)
    assert equal(weights_of(networks[0]), weights_of(networks[1]))


def test_an_evaluation_computes_in_the_precision_asked_for():
    seen = []
    network = small_network().float()
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    data = in_single(batches(1, 4))
    for name in ("fp32", "bf16"):
        evaluate(network, to_score(data), ALONE, Precision(name, "cpu"))
    assert seen == [torch.float32, torch.bfloat16]


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(UserError, match="0 of some"):
        evaluate(Fixed(), to_score([]), ALONE, FP32)


def test_an_evaluation_of_other_images_than_announced_is_refused():
    score = evaluate(Fixed(), to_score(batches(2, 4), images=8), ALONE, FP32)
    assert score.images == 8
    with pytest.raises(UserError, match="8 of 9"):
        evaluate(Fixed(), to_score(batches(2, 4), images=9), ALONE, FP32)


def test_an_evaluation_ends_at_a_broken_image():
    data = with_complaints(batches(3, 4), batch_1=["", "a.png is broken"], batch_2=["b.png is broken"])
    with pytest.raises(BrokenDataError, match=r"^a\.png is broken: mend or remove it$"):
        evaluate(Fixed(), to_score(data), ALONE, FP32)


@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("at", [1, 3, 4])
def test_an_evaluation_ends_when_it_is_asked_to(at, rounds):
    asked, seen = itertools.count(1), []
    network = Fixed()
    network.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with pytest.raises(Stopped) as caught:
        data = to_score(batches(3, 4), rounds=rounds)
        evaluate(network, data, ALONE, FP32, asked_to_stop=lambda: 15 * (next(asked) == at))
    assert caught.value.signal == 15
    assert len(seen) == (at - 1 if rounds else 3)
