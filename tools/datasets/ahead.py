"""Work on many files at once, ahead of what is asked for, as a slow file system wants it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_READERS = 16  # threads: a slow file system answers many questions in little more time than one
_AHEAD = 256  # files in memory at most

Item, Result = TypeVar("Item"), TypeVar("Result")


def ahead(do: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What a function gives for each item, in order, from threads that work some items ahead."""
    pool = ThreadPoolExecutor(_READERS)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(do, item))
            if len(waiting) == _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error nobody takes what is queued
