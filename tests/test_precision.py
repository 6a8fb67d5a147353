"""Precision and kernels, as the configuration and the device have it."""

import os

import pytest
import torch
from helpers_unit import CPU, configured
from torch import nn

from utils.precision import (
    Precision,
    choose_kernels,
    choose_precision,
    choose_scoring_precision,
    unmeasured_kernels,
)

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("level", "device", "name"),
    [
        ("O0", CPU, "fp32"),
        ("O1", CPU, "fp32"),
        ("O2", CPU, "fp32"),
        ("O0", CUDA, "fp32"),
        ("O1", CUDA, "fp16"),
        ("O2", CUDA, "fp16"),
    ],
)
def test_apexs_names_are_translated_with_a_word(level, device, name, caplog):
    caplog.set_level("INFO")
    assert choose_precision(configured(AMP_OPT_LEVEL=level), device) == Precision(name, device.type)
    assert caplog.messages == [f"AMP_OPT_LEVEL {level} is apex's name: computing in {name} on {device.type}"]


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_precision_that_is_asked_for_is_taken_without_a_word(name, device, caplog):
    caplog.set_level("INFO")
    assert choose_precision(configured(PRECISION=name), device) == Precision(name, device.type)
    assert not caplog.messages


@pytest.mark.parametrize(("has_bf16", "name"), [(True, "bf16"), (False, "fp16")])
def test_the_precision_follows_the_device_by_itself(monkeypatch, has_bf16, name):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )
    assert choose_precision(configured(), CPU) == Precision("fp32", "cpu")
    assert choose_precision(configured(), CUDA) == Precision(name, "cuda")


@pytest.mark.parametrize(
    ("values", "name"), [({}, "fp32"), ({"PRECISION": "bf16"}, "bf16"), ({"AMP_OPT_LEVEL": "O1"}, "fp16")]
)
def test_scores_are_computed_in_fp32_on_a_gpu_too_unless_another_precision_is_asked_for(monkeypatch, values, name):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_scoring_precision(configured(**values), CUDA) == Precision(name, "cuda")


@pytest.mark.parametrize(
    ("deterministic", "one_size", "measures"),
    [(False, True, True), (False, False, False), (True, True, False)],
)
def test_kernels_are_measured_for_images_of_one_size_and_never_to_score(monkeypatch, deterministic, one_size, measures):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    monkeypatch.setattr(os, "environ", {})
    choose_kernels(deterministic, one_size)
    assert torch.backends.cudnn.benchmark is measures
    with unmeasured_kernels():
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark is measures


def test_kernels_that_give_the_same_bits_are_asked_for_and_their_workspace_unless_it_was_set(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    for before, wanted in (({}, ":4096:8"), ({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, ":16:8")):
        monkeypatch.setattr(os, "environ", before)
        choose_kernels(deterministic=True)
        assert os.environ == {"CUBLAS_WORKSPACE_CONFIG": wanted}
    assert asked == [True, True]
    monkeypatch.setattr(os, "environ", {})
    choose_kernels(deterministic=False)
    assert not os.environ and len(asked) == 2


@pytest.mark.parametrize(
    ("name", "dtype", "scales"),
    [("fp32", torch.float32, False), ("bf16", torch.bfloat16, False), ("fp16", torch.float16, True)],
)
def test_a_precision_computes_in_its_type_and_scales_only_fp16(name, dtype, scales):
    precision = Precision(name, "cpu")
    layer = nn.Linear(4, 2)
    with precision.autocast():
        assert layer(torch.zeros(1, 4)).dtype == dtype
    assert layer(torch.zeros(1, 4)).dtype == torch.float32
    assert precision.grad_scaler().is_enabled() is scales
