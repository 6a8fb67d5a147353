"""One epoch of training and one evaluation, against literal forms of both."""

import contextlib
import math

import pytest
import torch
from helpers_unit import (
    ALONE,
    CPU,
    batches,
    configured,
    plain_training,
    small_network,
    train,
    training_of,
)
from torch import nn

from data.build import build_mixup
from models import GroupMixFormer
from utils.dist import World
from utils.engine import evaluate, train_one_epoch
from utils.errors import UserError
from utils.optim import Precision
from utils.seeding import seed_everything

FP32 = Precision("fp32", "cpu")


def weights_of(network):
    return [parameter.detach().clone() for parameter in network.parameters()]


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def joined(micro_batches, count):
    """The same data in micro-batches `count` times as large, the last one perhaps smaller."""
    parts = [micro_batches[start : start + count] for start in range(0, len(micro_batches), count)]
    return [tuple(map(torch.cat, zip(*part, strict=True))) for part in parts]


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
    images, targets = joined(data, accumulation)[0]
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
        train_one_epoch(training, batches(6, 4), epoch, 1, follow)
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
    training = training_of(network, 5, config, mixup=build_mixup(config, 3))
    if state is not None:
        network.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.ema.module.load_state_dict(state["ema"])
    return training


def image_batches(epoch):
    generator = torch.Generator().manual_seed(epoch)
    return [
        (torch.randn(4, 3, 64, 64, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(5)
    ]


def state_of(training, tmp_path):
    """All that has to be saved, as it comes back from a file."""
    state = {"model": training.network.state_dict(), "optimizer": training.optimizer.state_dict()}
    torch.save({**state, "ema": training.ema.module.state_dict()}, tmp_path / "state.pth")
    return torch.load(tmp_path / "state.pth", weights_only=True)


def test_a_run_gone_on_with_is_the_undisturbed_run_bit_for_bit(tmp_path):
    undisturbed = image_training()
    reports = train(undisturbed, image_batches(0))
    saved = state_of(undisturbed, tmp_path)
    reports += train(undisturbed, image_batches(1), 1)
    wanted = state_of(undisturbed, tmp_path)
    resumed = image_training(saved)
    torch.rand(5)
    again = train(resumed, image_batches(1), 1)
    assert [(r.update, r.loss, r.grad_norm, r.lr) for r in again] == [
        (r.update, r.loss, r.grad_norm, r.lr) for r in reports[3:]
    ]
    found = state_of(resumed, tmp_path)
    assert equal(found, wanted)
    assert not equal(found["model"], saved["model"])


# What cannot go on


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_loss_that_is_no_number_ends_the_run(value, step):
    data = batches(4, 4)
    calls = []

    def criterion(logits, targets):
        calls.append(None)
        return nn.functional.cross_entropy(logits, targets) + (value if len(calls) == step + 1 else 0)

    training = training_of(small_network(), 4, criterion=criterion)
    with pytest.raises(UserError, match="the loss became") as caught:
        train(training, data, every=2)
    assert "epoch 0" in str(caught.value)
    assert "TRAIN.BASE_LR" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", [0, 3])
def test_gradients_that_are_no_numbers_never_leave_an_epoch_unnoticed(step):
    calls = []

    def criterion(logits, targets):
        calls.append(None)
        lost = (logits * 0).sum().abs().sqrt() if len(calls) == step + 1 else 0  # is 0, its gradient no number
        return nn.functional.cross_entropy(logits, targets) + lost

    with pytest.raises(UserError):
        train(training_of(small_network(), 4, criterion=criterion), batches(4, 4), every=10)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loader_that_gives_too_little_is_an_error(accumulation):
    config = plain_training(TRAIN__ACCUMULATION_STEPS=accumulation)
    with pytest.raises(UserError):
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
    assert single[0].grad_norm == pytest.approx(gradient_norm(first, *data[0]), rel=1e-9)


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
    reports = train(training, [(images.float(), targets) for images, targets in batches(4, 4)])
    assert set(seen) == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]}
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in network.parameters())
    assert not torch.equal(network[1].weight, before[0])
    full = small_network().float()
    images, targets = batches(4, 4)[0]
    assert reports[0].grad_norm == pytest.approx(gradient_norm(full, images.float(), targets), rel=0.05)


def test_an_overflow_in_half_precision_skips_the_update_and_goes_on():
    network = small_network().float()
    training = training_of(network, 1, precision=Precision("fp16", "cpu"))
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0**60})
    before = weights_of(network)
    data = [(images.float(), targets) for images, targets in batches(1, 4)]
    train(training, data)
    assert equal(weights_of(network), before)
    assert training.scaler.get_scale() == 2.0**59


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_images_come_in_the_layout_asked_for(memory_format):
    seen = []

    class Noting(nn.Module):
        def forward(self, images):
            seen.append(images.is_contiguous(memory_format=memory_format))
            return images

    network = nn.Sequential(Noting(), small_network())
    train(training_of(network, 2, memory_format=memory_format), batches(2, 4))
    assert seen == [True, True]


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
    score = evaluate(Fixed(), list(zip(images.split(size), targets.split(size), strict=True)), ALONE, FP32)
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
    first = evaluate(network, batches(3, 4), ALONE, FP32)
    assert evaluate(network, batches(3, 4), ALONE, FP32) == first
    assert equal(dict(network.state_dict()), before)
    assert set(recorded) == {False}


def test_training_goes_on_in_training_mode_after_an_evaluation():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3)).double()
    training = training_of(network, 2)
    train(training, batches(2, 4))
    evaluate(network, batches(2, 4), ALONE, FP32)
    before = int(network[1].num_batches_tracked)
    train(training, batches(2, 4), 1)
    assert int(network[1].num_batches_tracked) == before + 2


def test_an_evaluation_leaves_the_next_epoch_as_it_would_be():
    networks = [small_network(), small_network()]
    for scored, network in enumerate(networks):
        training = training_of(network, 3)
        train(training, batches(3, 4))
        if scored:
            evaluate(network, batches(3, 4), ALONE, FP32)
        train(training, batches(3, 4), 1)
    assert equal(weights_of(networks[0]), weights_of(networks[1]))


def test_an_evaluation_computes_in_the_precision_asked_for():
    seen = []
    network = small_network().float()
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    data = [(images.float(), targets) for images, targets in batches(1, 4)]
    for name in ("fp32", "bf16"):
        evaluate(network, data, ALONE, Precision(name, "cpu"))
    assert seen == [torch.float32, torch.bfloat16]


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(UserError, match="0 of some"):
        evaluate(Fixed(), [], ALONE, FP32)


def test_an_evaluation_of_other_images_than_announced_is_refused():
    score = evaluate(Fixed(), batches(2, 4), ALONE, FP32, images=8)
    assert score.images == 8
    with pytest.raises(UserError, match="8 of 9"):
        evaluate(Fixed(), batches(2, 4), ALONE, FP32, images=9)
