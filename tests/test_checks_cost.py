"""tools/checks_cost.py: updates with and without checks in turn, and what it prints of them."""

import re
import sys

import pytest

from tools import checks_cost
from utils import engine
from utils.errors import UserError

_CONFIG = """
DATA: {BATCH_SIZE: 2, IMG_SIZE: 32}
MODEL:
  NAME: tiny
  GMA: {EMBEDDING_DIMS: [40, 40, 40, 40], SERIAL_DEPTHS: [1, 1, 1, 1], MLP_RATIOS: [2, 2, 2, 2]}
DEVICE: cpu
"""


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys):
    """Runs the program on a tiny network and returns what it prints."""
    config = tmp_path / "tiny.yaml"
    config.write_text(_CONFIG)

    def run(rounds: int) -> str:
        monkeypatch.setattr(sys, "argv", ["checks_cost.py", "--cfg", str(config), "--rounds", str(rounds)])
        checks_cost.main()
        return capsys.readouterr().out

    return run


def test_every_other_update_is_checked_and_the_cost_is_printed_with_its_spread(measure, monkeypatch):
    places, vote = [], engine._vote

    def seen(run, *arguments):
        places.append(run.progress.place)
        return vote(run, *arguments)

    monkeypatch.setattr(engine, "_vote", seen)
    out = measure(3)
    assert places == [0, 2, 4, 6]  # of eight updates, the first two of which warm up
    assert out.startswith("tiny on 1 x cpu, fp32, 2 images a rank, medians of 3:\n")
    cost = re.search(r"the checks cost +(\S+) %, between (\S+) and (\S+) in half of the pairs", out)
    middle, low, high = map(float, cost.groups())
    assert low <= middle <= high
    assert len(re.findall(r" (\d+\.\d+) (?:ms|MiB)", out)) == 5


def test_one_pair_of_updates_is_refused_as_it_has_no_spread(measure):
    with pytest.raises(UserError, match="--rounds 1: give at least 2"):
        measure(1)
