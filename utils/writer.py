"""Writes checkpoints while training goes on."""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_SWITCH_S = 2e-4  # training gets Python back this soon, 25 times as soon as by default


class BackgroundWriter:
    """Runs one job at a time in a thread; the next job waits for it, and so does the end of the program."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Starts a job, once the last one is done.

        Raises:
            Exception: What the last job raised.
        """
        self.wait()
        self._job = self._pool.submit(_run_aside, job)

    def failed(self) -> bool:
        """Whether the last job has ended with an error, which `wait` raises."""
        return self._job is not None and self._job.done() and self._job.exception() is not None

    def wait(self) -> None:
        """Waits for the last job.

        Raises:
            Exception: What it raised.
        """
        job, self._job = self._job, None
        if job:
            job.result()

    def close(self) -> None:
        """Waits for the last job, whatever becomes of it, and takes no more."""
        self._pool.shutdown()


def _run_aside(job: Callable[[], None]) -> None:
    """Runs a job that holds the others of its process up as little as it can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        job()
    finally:
        sys.setswitchinterval(usual)
