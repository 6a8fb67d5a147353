"""One run in a folder at a time, shown with real processes."""

import errno
import io
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from helpers_unit import ROOT

from utils import lock
from utils.errors import UserError
from utils.lock import RunLock

HOLDER = """
import os, sys, time
from pathlib import Path
from utils.lock import RunLock

with RunLock(Path(sys.argv[1])):
    child = os.fork() if "child" in sys.argv else None
    if child != 0:
        print(child or 0, flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder, *words):
    """A process that holds a folder, and the number of its child or 0."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        if child:
            os.kill(child, signal.SIGKILL)


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path):
    with holder(tmp_path) as (process, _), pytest.raises(UserError) as caught:
        RunLock(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path} is in use by process {process.pid} on {socket.gethostname()}: ")
    assert "--tag" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_that_was_refused_leaves_the_first_ones_lock_and_name(tmp_path):
    with holder(tmp_path) as (process, _):
        for _ in range(3):
            with pytest.raises(UserError, match=f"process {process.pid} on"):
                RunLock(tmp_path)


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path):
    with holder(tmp_path) as (process, _):
        process.kill()
        process.wait()
        with RunLock(tmp_path):
            assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_child_that_outlives_a_killed_run_does_not_hold_its_folder(tmp_path):
    with holder(tmp_path, "child") as (process, child):
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives, and has the file open
        with RunLock(tmp_path):
            pass


def test_a_run_that_ends_frees_the_folder(tmp_path):
    with RunLock(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == ""
    with holder(tmp_path) as (process, _):
        assert str(process.pid) in (tmp_path / "lock").read_text()


def test_an_error_frees_the_folder_and_comes_through(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        raise ZeroDivisionError
    with holder(tmp_path):
        pass


def test_the_text_of_a_run_before_is_replaced(tmp_path):
    (tmp_path / "lock").write_text("process 1234567890123 on a-host-with-a-long-name\n" * 3)
    with RunLock(tmp_path):
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def fail_with(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_a_disk_that_cannot_lock_is_warned_of(tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr(lock.fcntl, "lockf", fail_with(number))
    with RunLock(tmp_path):
        pass
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"{tmp_path} cannot be locked (")
    assert os.strerror(number) in record.message


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_both_ways_to_say_that_a_lock_is_taken_are_understood(tmp_path, monkeypatch, number):
    (tmp_path / "lock").touch()
    monkeypatch.setattr(lock.fcntl, "lockf", fail_with(number))
    with pytest.raises(UserError, match="in use by another process"):
        RunLock(tmp_path)


class FullFile(io.FileIO):
    """A file on a full disk."""

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "open", FullFile, raising=False)
    with RunLock(tmp_path):
        held = subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        assert "is in use by another process" in held.stderr
    monkeypatch.undo()
    with RunLock(tmp_path):
        pass


def test_a_process_that_waits_gets_the_folder_as_soon_as_the_holder_is_gone(tmp_path):
    with holder(tmp_path) as (process, _):
        process.send_signal(signal.SIGKILL)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                RunLock(tmp_path).__exit__(None, None, None)
                return
            except UserError:
                time.sleep(0.001)
    pytest.fail("the lock was not freed")
