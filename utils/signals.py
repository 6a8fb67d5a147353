"""Signals that end a program: training remembers them and acts between two updates, others clean up and go."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import NoReturn

# What terminals, queues and launchers send. SLURM's --signal is set to SIGUSR1 by custom.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # of programs that do not train
_MOST_ASKED = 50  # times, a tenth of a second each


def ignore_stop_signals(_worker: int = 0) -> None:
    """Keeps a loader's process alive when its whole group is signalled; it ends with the process that it serves."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_asks, daemon=True).start()


def _end_when_the_parent_asks() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(0)


def end_loaders() -> None:
    """Asks the loaders' processes to end, again and again as a signal that meets another is lost, and then kills."""
    for process in filter(lambda child: child.daemon, multiprocessing.active_children()):
        for _ in range(_MOST_ASKED):
            process.terminate()
            process.join(0.1)
            if not process.is_alive():
                break
        else:
            process.kill()  # it hangs where no signal is seen
            process.join()


class StopSignals(AbstractContextManager["StopSignals"]):
    """Remembers the first signal that asks this process to stop; later ones change nothing."""

    def __init__(self) -> None:
        self._number = 0
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._before = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._number else handler)  # a second one changes nothing

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._number = self._number or number

    def asked(self) -> int:
        """The signal that asked this process to stop, or 0. A launcher that has gone asks as SIGTERM does."""
        if self._launcher and os.getppid() != self._launcher:
            self._remember(signal.SIGTERM.value, None)
        return self._number


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Lets a signal that ends the program raise SystemExit, on which what is half written can be removed."""
    before = {number: signal.getsignal(number) for number in _ENDINGS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    ignore_endings()
    sys.exit(128 + number)  # libraries swallow other exceptions


def ignore_endings() -> None:
    """Lets the cleaning up come to its end."""
    for number in _ENDINGS:
        signal.signal(number, signal.SIG_IGN)
