"""Jobs that run beside training, one at a time."""

import sys
import threading
import time

import pytest

from utils.errors import UserError
from utils.writer import BackgroundWriter


def failing():
    raise UserError("disk full")


def test_jobs_run_one_at_a_time_and_in_order():
    writer, seen, running = BackgroundWriter(), [], threading.Lock()

    def job(number):
        assert running.acquire(blocking=False)
        time.sleep(0.01)
        seen.append(number)
        running.release()

    for number in range(5):
        writer.submit(lambda number=number: job(number))
    writer.wait()
    assert seen == [0, 1, 2, 3, 4]


def test_training_goes_on_beside_a_job():
    writer, go_on, done = BackgroundWriter(), threading.Event(), []
    writer.submit(lambda: (go_on.wait(10), done.append(threading.current_thread())))
    assert done == []
    assert not writer.failed()
    go_on.set()
    writer.wait()
    assert len(done) == 1
    assert done[0] is not threading.current_thread()


def test_the_next_job_waits_for_the_last_one():
    writer, seen = BackgroundWriter(), []
    writer.submit(lambda: (time.sleep(0.05), seen.append("first")))
    writer.submit(lambda: None)
    assert seen == ["first"]
    writer.wait()


def test_waiting_raises_a_jobs_error_once():
    writer = BackgroundWriter()
    writer.submit(failing)
    with pytest.raises(UserError, match="disk full"):
        writer.wait()
    writer.wait()
    assert not writer.failed()


def test_a_next_job_raises_the_last_ones_error_and_is_not_started():
    writer, seen = BackgroundWriter(), []
    writer.submit(failing)
    with pytest.raises(UserError, match="disk full"):
        writer.submit(lambda: seen.append(1))
    writer.wait()
    assert seen == []
    writer.submit(lambda: seen.append(2))
    writer.wait()
    assert seen == [2]


def test_a_failure_is_seen_without_waiting():
    writer, go_on = BackgroundWriter(), threading.Event()
    assert not writer.failed()
    writer.submit(lambda: (go_on.wait(10), failing()))
    assert not writer.failed()  # not yet
    go_on.set()
    until = time.monotonic() + 10
    while not writer.failed() and time.monotonic() < until:
        time.sleep(0.001)
    assert writer.failed()
    assert writer.failed()  # and it stays
    with pytest.raises(UserError):
        writer.wait()


def test_a_job_that_succeeds_is_no_failure():
    writer = BackgroundWriter()
    writer.submit(lambda: None)
    time.sleep(0.05)
    assert not writer.failed()
    writer.wait()


def test_waiting_without_a_job_returns():
    BackgroundWriter().wait()


@pytest.mark.parametrize("fails", [False, True])
def test_python_switches_threads_sooner_during_a_job_only(fails):
    usual, seen = sys.getswitchinterval(), []

    def job():
        seen.append(sys.getswitchinterval())
        if fails:
            failing()

    writer = BackgroundWriter()
    writer.submit(job)
    if fails:
        with pytest.raises(UserError):
            writer.wait()
    else:
        writer.wait()
    assert seen[0] < usual / 10
    assert sys.getswitchinterval() == usual
