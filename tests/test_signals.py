"""Signals that ask a run to stop, shown with real signals and processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers_unit import ROOT

from utils.signals import STOP_SIGNALS, StopSignals


@pytest.fixture(autouse=True)
def handlers_back():
    """Puts the handlers back as they were, and makes an unhandled signal an error of the test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def unhandled(number, frame):
        raise AssertionError(f"signal {number} was not caught")

    for number in STOP_SIGNALS:
        signal.signal(number, unhandled)
    yield unhandled
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # a signal is handled between two instructions


def test_without_a_signal_nothing_is_asked():
    with StopSignals() as signals:
        assert signals.asked() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_every_stop_signal_is_remembered(number):
    with StopSignals() as signals:
        send(number)
        assert signals.asked() == number
        assert signals.asked() == number


def test_the_first_of_several_signals_counts():
    with StopSignals() as signals:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            send(number)
        assert signals.asked() == signal.SIGUSR1


def test_handlers_are_put_back_where_no_signal_came(handlers_back):
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) is not handlers_back
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == [handlers_back] * 3


def test_a_second_signal_after_the_first_was_acted_on_changes_nothing():
    with StopSignals() as signals:
        send(signal.SIGTERM)
    for number in STOP_SIGNALS:
        send(number)
    assert signals.asked() == signal.SIGTERM


def test_handlers_are_put_back_after_an_error_too(handlers_back):
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is handlers_back


OWNER = """
import atexit, multiprocessing, subprocess
from utils.signals import STOP_SIGNALS, end_loaders, ignore_stop_signals

def work(pipe):
    ignore_stop_signals()
    while True:
        pipe.send("alive")
        pipe.recv()

here, there = multiprocessing.Pipe()
process = multiprocessing.Process(target=work, args=(there,), daemon=True)
process.start()
atexit.register(end_loaders)
for number in STOP_SIGNALS:
    print(here.recv(), flush=True)
    subprocess.run(["kill", f"-{int(number)}", str(process.pid)], check=True)
    here.send("are you there?")
print(here.recv(), flush=True)
subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
"""


def test_loaders_processes_end_with_their_parent_and_ignore_signals_of_others():
    owner = subprocess.run([sys.executable, "-c", OWNER], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (owner.stdout, owner.stderr, owner.returncode) == ("alive\n" * 4, "", 0)


DEAF = """
import multiprocessing, signal, time
from utils import signals

def work(pipe):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe.send("deaf")
    time.sleep(600)

signals._MOST_ASKED = 2
here, there = multiprocessing.Pipe()
process = multiprocessing.Process(target=work, args=(there,), daemon=True)
process.start()
print(here.recv(), flush=True)
signals.end_loaders()
print(process.exitcode)
"""


def test_a_loaders_process_that_hears_nothing_is_killed():
    owner = subprocess.run([sys.executable, "-c", DEAF], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (owner.stdout, owner.stderr, owner.returncode) == ("deaf\n-9\n", "", 0)


def test_other_signals_are_left_alone():
    others = [signal.SIGCHLD, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2]
    before = [signal.getsignal(number) for number in others]
    with StopSignals() as signals:
        assert [signal.getsignal(number) for number in others] == before
        send(signal.SIGTERM)
    assert [signal.getsignal(number) for number in others] == before
    assert signals.asked() == signal.SIGTERM


RANK = """
import os, time
from utils.signals import StopSignals

with StopSignals() as signals:
    print("asked", signals.asked(), flush=True)
    until = time.monotonic() + float(os.environ["WAIT"])
    while not signals.asked() and time.monotonic() < until:
        time.sleep(0.01)
    print("asked", signals.asked(), flush=True)
"""
LAUNCHER = f"""
import subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", {RANK!r}])
time.sleep(60)
"""


@pytest.mark.parametrize(("launched", "asked"), [(True, "asked 15"), (False, "asked 0")])
def test_a_launcher_that_went_away_asks_to_stop(launched, asked):
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    environment |= {"TORCHELASTIC_RUN_ID": "none", "WAIT": "20"} if launched else {"WAIT": "0.5"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    with launcher.stdout as lines:
        assert lines.readline() == "asked 0\n"
        launcher.kill()
        launcher.wait()
        assert lines.readline().strip() == asked
