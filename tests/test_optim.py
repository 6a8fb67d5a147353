"""Optimizer, schedule, moving average and loss from the configuration."""

import itertools
import math
import re

import pytest
import torch
from helpers_unit import configured, examples, small_network
from hypothesis import given
from hypothesis import strategies as st
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import get_optimizer_info, list_optimizers, muon
from timm.utils import ModelEmaV3
from torch import nn

from models import GroupMixFormer
from utils.errors import UserError
from utils.optim import build_ema, build_loss, build_optimizer, build_scheduler, learning_rate_scale
from utils.progress import Steps

CUDA = torch.device("cuda")


def group_mix_former(depth=1):
    return GroupMixFormer(embed_dims=(40,) * 4, depths=(depth,) * 4, mlp_ratios=(2,) * 4, num_classes=3)


# Optimizer


@pytest.mark.parametrize(
    ("batch", "ranks", "accumulation", "scale"),
    [(64, 8, 1, 1.0), (64, 8, 0, 1.0), (64, 8, 2, 2.0), (64, 1, 1, 0.125), (128, 4, 1, 1.0), (32, 1, 16, 1.0)],
)
def test_learning_rates_are_for_512_images_and_scale_with_the_batch(batch, ranks, accumulation, scale):
    config = configured(DATA__BATCH_SIZE=batch, TRAIN__ACCUMULATION_STEPS=accumulation)
    assert learning_rate_scale(config, ranks) == scale
    optimizer = build_optimizer(config, small_network(), ranks)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4 * scale}


def test_the_recipes_optimizer_is_adamw():
    optimizer = build_optimizer(configured(), small_network(), 4)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (tuple(group["betas"]), group["eps"]) == ((0.9, 0.999), 1e-8)
    config = configured(TRAIN__OPTIMIZER__BETAS=[0.8, 0.95], TRAIN__OPTIMIZER__EPS=1e-6)
    group = build_optimizer(config, small_network(), 4).param_groups[0]
    assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.95), 1e-6)


def test_sgd_takes_the_momentum():
    config = configured(TRAIN__OPTIMIZER__NAME="SGD", TRAIN__OPTIMIZER__MOMENTUM=0.7)
    optimizer = build_optimizer(config, small_network(), 4)
    assert type(optimizer) is torch.optim.SGD
    assert {group["momentum"] for group in optimizer.param_groups} == {0.7}


@pytest.mark.parametrize("layer_decay", [1.0, 0.9])
def test_biases_and_one_dimensional_tensors_do_not_decay(layer_decay):
    network = group_mix_former()
    optimizer = build_optimizer(configured(TRAIN__LAYER_DECAY=layer_decay), network, 1)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        spared = parameter.ndim <= 1 or name.endswith(".bias")
        assert decays[id(parameter)] == (0.0 if spared else 0.05), name


def test_each_parameter_is_optimized_once():
    network = group_mix_former()
    optimizer = build_optimizer(configured(TRAIN__LAYER_DECAY=0.8), network, 1)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, network.parameters()))


def test_layer_decay_grows_by_its_factor_from_the_stem_to_the_head():
    network = group_mix_former(depth=2)
    optimizer = build_optimizer(configured(TRAIN__LAYER_DECAY=0.5), network, 1)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    layers = {name: round(-math.log2(scales[id(p)]), 6) for name, p in network.named_parameters()}
    assert {layer for name, layer in layers.items() if name.startswith("head.")} == {0}
    order = [r"^stem\."]
    for stage in range(4):
        order += [rf"^stages\.{stage}\.patch_embed\.", rf"^stages\.{stage}\.blocks\.0\."]
        order += [rf"^stages\.{stage}\.blocks\.1\."]
    order += [r"^norm\.", r"^head\."]
    found = [{layer for name, layer in layers.items() if re.match(pattern, name)} for pattern in order]
    assert all(len(layer) == 1 for layer in found)  # one learning rate for a layer
    numbers = [layer.pop() for layer in found]
    assert all(before - after in (0, 1) for before, after in itertools.pairwise(numbers))
    assert numbers[0] >= 8  # two blocks of four stages lie between


def test_an_unknown_optimizer_is_refused_by_its_key():
    with pytest.raises(UserError, match=r"TRAIN\.OPTIMIZER\.NAME is 'adamx'"):
        build_optimizer(configured(TRAIN__OPTIMIZER__NAME="adamx"), small_network(), 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list_optimizers())
def test_an_optimizer_of_timm_trains_or_is_refused_by_its_key(name):
    info, betas = get_optimizer_info(name), [0.9, 0.99, 0.999]
    values = {"TRAIN__OPTIMIZER__NAME": name, "TRAIN__OPTIMIZER__BETAS": betas[: max(info.num_betas, 2)]}
    try:
        optimizer = build_optimizer(configured(**values), small_network(), 1)
    except UserError as error:
        assert "TRAIN.OPTIMIZER" in str(error)
        return
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert not info.second_order  # such ones need gradients of gradients
    group = optimizer.param_groups[0]
    assert "betas" not in group or list(group["betas"]) == betas[: info.num_betas]


@pytest.mark.parametrize(("name", "betas"), [("adan", [0.9, 0.999]), ("adamw", [0.9, 0.99, 0.999])])
def test_another_number_of_betas_than_the_optimizer_takes_is_refused(name, betas):
    with pytest.raises(UserError, match=rf"{name} takes \d betas, and TRAIN\.OPTIMIZER\.BETAS is \[.*\]: give as many"):
        build_optimizer(configured(TRAIN__OPTIMIZER__NAME=name, TRAIN__OPTIMIZER__BETAS=betas), small_network(), 1)


def test_settings_that_an_optimizer_cannot_have_are_refused_in_its_words():
    config = configured(TRAIN__OPTIMIZER__NAME="sgd", TRAIN__OPTIMIZER__MOMENTUM=0.0)
    with pytest.raises(UserError, match=r"TRAIN\.OPTIMIZER\.NAME sgd cannot be used here \(Nesterov momentum requires"):
        build_optimizer(config, small_network(), 1)


def test_muon_computes_in_float32_on_a_cpu():
    layer = nn.Linear(6, 4, bias=False)
    nn.init.zeros_(layer.weight)
    layer.weight.grad = torch.randn(4, 6)
    values = {"TRAIN__OPTIMIZER__NAME": "muon", "TRAIN__WEIGHT_DECAY": 0.0}
    optimizer = build_optimizer(configured(**values), layer, 1)
    optimizer.load_state_dict(optimizer.state_dict())  # as a run does that goes on
    optimizer.step()
    step = -layer.weight.detach().double()
    exact = muon.zeropower_via_newtonschulz(
        layer.weight.grad.double(), 5, muon._COEFFICIENTS["quintic"], dtype=torch.float64
    )
    torch.testing.assert_close(step / step.norm(), exact / exact.norm(), rtol=0, atol=1e-4)  # bfloat16 is off by 1e-2


# Schedule


def scheduled(config, steps, ranks=1, parameters=None):
    """The learning rate of every update, and of a few after the last."""
    network = parameters or small_network()
    optimizer = build_optimizer(config, network, ranks)
    scheduler = build_scheduler(config, optimizer, steps, ranks)
    rates = []
    for update in range(steps.updates):
        scheduler.step_update(update)
        rates.append(max(group["lr"] for group in optimizer.param_groups))
    return rates


SHAPES = given(
    epochs=st.integers(1, 12),
    warmup=st.integers(0, 12),
    steps_per_epoch=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    batch=st.sampled_from([2, 64, 100]),
)


def literal_rates(config, steps, batch, accumulation, after_warmup):
    """Warm-up inside the epochs, then `after_warmup` of (update, all updates, largest, smallest)."""
    scale = batch * accumulation / 512
    base, first, least = 5e-4 * scale, 5e-7 * scale, 5e-6 * scale
    per_epoch = math.ceil(steps.steps_per_epoch / accumulation)
    total, warmup = config.TRAIN.EPOCHS * per_epoch, config.TRAIN.WARMUP_EPOCHS * per_epoch
    return [
        first + (base - first) * update / warmup if update < warmup else after_warmup(update, total, base, least)
        for update in range(total)
    ]


def shaped(name, epochs, warmup, steps_per_epoch, accumulation, batch, **values):
    config = configured(
        TRAIN__EPOCHS=epochs,
        TRAIN__WARMUP_EPOCHS=min(warmup, epochs),
        TRAIN__ACCUMULATION_STEPS=accumulation,
        DATA__BATCH_SIZE=batch,
        TRAIN__LR_SCHEDULER__NAME=name,
        **values,
    )
    return config, Steps(steps_per_epoch, accumulation, epochs)


@SHAPES
@examples(40)
def test_the_cosine_is_the_recipes(epochs, warmup, steps_per_epoch, accumulation, batch):
    config, steps = shaped("cosine", epochs, warmup, steps_per_epoch, accumulation, batch)

    def cosine(update, total, base, least):
        return least + (base - least) * (1 + math.cos(math.pi * update / total)) / 2

    assert scheduled(config, steps) == pytest.approx(literal_rates(config, steps, batch, accumulation, cosine))


@SHAPES
@examples(40)
def test_linear_falls_straight_to_the_least(epochs, warmup, steps_per_epoch, accumulation, batch):
    config, steps = shaped("linear", epochs, warmup, steps_per_epoch, accumulation, batch)

    def linear(update, total, base, least):
        return base + (least - base) * update / total

    assert scheduled(config, steps) == pytest.approx(literal_rates(config, steps, batch, accumulation, linear))


@SHAPES
@examples(40)
def test_step_falls_by_its_rate_every_so_many_epochs(epochs, warmup, steps_per_epoch, accumulation, batch):
    values = {"TRAIN__LR_SCHEDULER__DECAY_EPOCHS": 3, "TRAIN__LR_SCHEDULER__DECAY_RATE": 0.5}
    config, steps = shaped("step", epochs, warmup, steps_per_epoch, accumulation, batch, **values)

    def falling(update, total, base, least):
        return base * 0.5 ** (update // (3 * total // epochs))

    assert scheduled(config, steps) == pytest.approx(literal_rates(config, steps, batch, accumulation, falling))


@given(milestones=st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True).map(sorted))
@examples(40)
def test_multistep_falls_by_its_rate_at_the_first_update_after_each_milestone(milestones):
    values = {"TRAIN__LR_SCHEDULER__MILESTONES": milestones, "TRAIN__LR_SCHEDULER__DECAY_RATE": 0.1}
    config, steps = shaped("multistep", 12, 0, 7, 2, 64, **values)

    def falling(update, total, base, least):
        return base * 0.1 ** sum(update >= milestone * steps.updates_per_epoch for milestone in milestones)

    assert scheduled(config, steps) == pytest.approx(literal_rates(config, steps, 64, 2, falling))


def test_warm_up_can_be_told_in_updates():
    config, steps = shaped("linear", 4, 1, 5, 1, 512, TRAIN__WARMUP_UPDATES=3)
    rates = scheduled(config, steps)
    low, high = config.TRAIN.WARMUP_LR, config.TRAIN.BASE_LR
    assert rates[:3] == pytest.approx([low, low + (high - low) / 3, low + 2 * (high - low) / 3])
    assert rates[3] > rates[4] > rates[-1]
    assert rates[3] == pytest.approx(config.TRAIN.MIN_LR + (high - config.TRAIN.MIN_LR) * 17 / 20)


def test_a_warm_up_that_is_longer_than_the_run_is_refused():
    config, steps = shaped("cosine", 4, 0, 5, 2, 64, TRAIN__WARMUP_UPDATES=12)
    scheduled(config, steps)
    config.TRAIN.WARMUP_UPDATES = 13
    with pytest.raises(UserError, match=r"TRAIN\.WARMUP_UPDATES 13 is more than the run's 12 updates: lower it"):
        scheduled(config, steps)


def test_rates_are_for_an_update_of_as_many_images_as_configured():
    assert learning_rate_scale(configured(DATA__BATCH_SIZE=2, TRAIN__LR_BATCH=16), 8) == 1.0
    assert learning_rate_scale(configured(DATA__BATCH_SIZE=2, TRAIN__LR_BATCH=16), 4) == 0.5


@pytest.mark.parametrize("name", ["cosine", "linear", "step"])
def test_every_schedule_keeps_the_layers_proportions(name):
    config, steps = shaped(name, 4, 1, 5, 1, 64, TRAIN__LAYER_DECAY=0.7)
    optimizer = build_optimizer(config, group_mix_former(), 1)
    scheduler = build_scheduler(config, optimizer, steps, 1)
    plain_config, _ = shaped(name, 4, 1, 5, 1, 64)
    rates = scheduled(plain_config, steps)
    for update in (0, 3, 5, 12, 19):
        scheduler.step_update(update)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(rates[update] * group["lr_scale"])


@pytest.mark.parametrize("name", ["cosine", "linear", "step"])
def test_a_rate_depends_on_the_updates_number_only(name):
    config, steps = shaped(name, 6, 2, 5, 1, 64)
    rates = scheduled(config, steps)
    optimizer = build_optimizer(config, small_network(), 1)
    scheduler = build_scheduler(config, optimizer, steps, 1)
    for update in (17, 3, 29, 0):
        scheduler.step_update(update)
        assert optimizer.param_groups[0]["lr"] == rates[update]


# Moving average, loss


def test_a_moving_average_is_built_where_asked_for():
    network = small_network()
    assert build_ema(configured(), network) is None
    ema = build_ema(configured(TRAIN__EMA_DECAY=0.9), network)
    assert isinstance(ema, ModelEmaV3)
    assert ema.decay == 0.9
    assert not ema.module.training


def test_the_moving_average_follows_faster_at_first_where_it_warms_up():
    plain, warm = (
        build_ema(configured(TRAIN__EMA_DECAY=0.9, TRAIN__EMA_WARMUP=on), nn.Linear(1, 1)) for on in (False, True)
    )
    assert plain.get_decay(5) == 0.9
    assert warm.get_decay(5) < 0.7 < warm.get_decay(20) < warm.get_decay(1000) == 0.9


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({}, SoftTargetCrossEntropy),
        ({"AUG__MIXUP": 0.0}, SoftTargetCrossEntropy),
        ({"AUG__CUTMIX": 0.0}, SoftTargetCrossEntropy),
        ({"AUG__MIXUP": 0.0, "AUG__CUTMIX": 0.0}, LabelSmoothingCrossEntropy),
        ({"AUG__MIXUP": 0.0, "AUG__CUTMIX": 0.0, "MODEL__LABEL_SMOOTHING": 0.0}, nn.CrossEntropyLoss),
    ],
)
def test_the_loss_follows_from_what_is_on(values, kind):
    assert type(build_loss(configured(**values))) is kind


def test_label_smoothing_is_the_configured_one():
    logits, targets = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])
    loss = build_loss(configured(AUG__MIXUP=0.0, AUG__CUTMIX=0.0, MODEL__LABEL_SMOOTHING=0.3))(logits, targets)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, targets, label_smoothing=0.3))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"AUG__MIXUP": 0.0, "AUG__CUTMIX": 0.0},
        {"AUG__MIXUP": 0.0, "AUG__CUTMIX": 0.0, "MODEL__LABEL_SMOOTHING": 0.0},
    ],
    ids=["soft targets", "label smoothing", "plain"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_of_logits_in_half_precision_is_computed_in_float32(values, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator).mul(3).to(dtype)
    targets = torch.randn(6, 50, generator=generator).softmax(1) if not values else torch.arange(6)
    loss = build_loss(configured(**values))
    with torch.autocast("cpu", dtype):
        found = loss(logits, targets)
    assert torch.equal(found, loss(logits.float(), targets))
