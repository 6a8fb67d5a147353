"""tools/soak.py: a killed run and one left alone, and that a single differing bit is told."""

import json
import os
import random

import pytest
import torch

from tools.soak import is_alive, kill_once, outcome, soak
from utils import checkpoint


def ended(folder, *, weight=1.0, loss=2.0, speed=3.0):
    """The hash of a run that ended with a weight and a loss."""
    folder.mkdir()
    parts = dict.fromkeys(("ema", "optimizer", "scaler", "progress", "best"))
    checkpoint.save({"model": {"weight": torch.tensor([weight, 0.5])}, **parts}, folder / checkpoint.LAST)
    line = {"epoch": 1, "loss": loss, "images_per_s": speed}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return outcome(folder)


def test_hash_tells_one_bit_of_a_weight_or_of_a_loss_and_leaves_the_speed_out(tmp_path):
    whole = ended(tmp_path / "whole")
    assert ended(tmp_path / "slower", speed=1.0) == whole
    assert ended(tmp_path / "loss", loss=2.0 + 2**-51) != whole
    next_to_one = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    assert ended(tmp_path / "weight", weight=next_to_one) != whole


def test_run_that_ends_before_its_kill_is_told_from_a_killed_one(tmp_path):
    assert kill_once(["true"], tmp_path / "log", random.Random(0)) is None
    endless = ["sh", "-c", "while :; do echo line; sleep 0.01; done"]
    assert kill_once(endless, tmp_path / "log", random.Random(0)) == "all"


def test_all_that_a_run_started_is_killed_with_it(tmp_path):
    command = ["sh", "-c", "sleep 600 & while :; do echo $!; sleep 0.01; done"]
    assert kill_once(command, tmp_path / "log", random.Random(0)) == "all"
    sleeper = int((tmp_path / "log").read_text().split()[0])
    assert is_alive(os.getpid())
    assert not is_alive(sleeper)


def test_more_ranks_than_there_are_pairs_of_images_are_refused(call):
    result = call("tools/soak.py", "--ranks", 8)
    assert (result.code, result.stdout) == (2, "")
    assert "--ranks: 8: give a whole number, from 1 to 4" in result.errors[0]


@pytest.mark.slow
def test_soak_kills_a_run_and_finds_it_equal_to_the_one_left_alone(tmp_path, capsys):
    assert soak(tmp_path, 2, 1, random.Random(0)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["kill 1 of 2: all", "kill 2 of 2: all"]
    assert lines[2] == "2 kills (all 2) in 8 updates on 1 rank(s)"
    assert lines[3].split()[1] == lines[4].split()[1]
    assert lines[5] == "equal, bit for bit"
