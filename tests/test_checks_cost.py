"""tools/checks_cost.py: updates with and without checks in turn, and what it prints of them."""

import re

import pytest

from utils import engine


@pytest.fixture
def measure(call, tiny_config):
    """Runs the program on a tiny network."""

    def run(rounds):
        words = ("--cfg", tiny_config, "--batch-size", 2, "--device", "cpu", "--rounds", rounds)
        return call("tools/checks_cost.py", *words, "--accumulation-steps", 2)

    return run


def test_every_other_update_is_checked_and_the_cost_is_printed_with_its_spread(measure, monkeypatch):
    updates, checked, take, vote = [], [], engine._take_update, engine._vote

    def taken(run, *arguments):
        updates.append(run.progress.place)
        return take(run, *arguments)

    def seen(*arguments):
        checked.append(updates[-1])
        return vote(*arguments)

    monkeypatch.setattr(engine, "_take_update", taken)
    monkeypatch.setattr(engine, "_vote", seen)
    out = measure(3).stdout
    assert checked == updates[::2] == [0, 2, 4, 6]  # the first pair warms up
    assert out.startswith("tiny on 1 x cpu, fp32, 2 images a rank, medians of 3:\n")
    cost = re.search(r"the checks cost +(\S+) %, between (\S+) and (\S+) in half of the pairs", out)
    middle, low, high = map(float, cost.groups())
    assert low <= middle <= high
    assert len(re.findall(r" (\d+\.\d+) (?:ms|MiB)", out)) == 5


def test_one_pair_of_updates_is_refused_as_it_has_no_spread(measure):
    result = measure(1)
    assert (result.code, result.stdout, len(result.errors)) == (2, "", 1)
    assert "--rounds: 1: give a whole number, at least 2" in result.errors[0]
