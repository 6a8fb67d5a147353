"""Console, log_rank0.txt, TensorBoard, Weights & Biases and metrics.jsonl; silent off rank 0."""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from utils.checkpoint import write_text
from utils.console import say
from utils.errors import UserError
from utils.tracking import Tracker

_FORMAT = "%(asctime)s %(message)s"


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar; where a bar shows the progress, lines about it go to the file only."""

    def __init__(self, has_bar: bool) -> None:
        super().__init__()
        self._has_bar = has_bar

    def emit(self, record: logging.LogRecord) -> None:
        if not (self._has_bar and getattr(record, "progress", False)):
            with suppress(OSError):  # a terminal that was closed
                say(self.format(record))
                sys.stdout.flush()


def setup_logging(is_main: bool, folder: Path | None = None) -> None:
    """Sends log lines to the console and to log_rank0.txt in a folder; of other ranks only errors pass.

    Lines of a program that knows its folder later are kept until then.

    Args:
        is_main: Whether this is rank 0.
        folder: Where the file goes, if anywhere.
    """
    root, formatter = logging.getLogger(), logging.Formatter(_FORMAT, datefmt="%Y-%m-%d %H:%M:%S")
    kept: logging.Handler = MemoryHandler(0, flushLevel=logging.CRITICAL + 1)  # without a target it keeps all
    if is_main and folder:
        kept = _FileHandler(folder / "log_rank0.txt")
        kept.setFormatter(formatter)
    for handler in list(root.handlers):
        if isinstance(handler, MemoryHandler) and isinstance(kept, _FileHandler):
            handler.setTarget(kept)
        root.removeHandler(handler)
        handler.close()
    console = _ConsoleHandler(has_bar=sys.stderr.isatty())
    console.setFormatter(formatter)
    for handler in (console, kept):
        root.addHandler(handler)
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # it warns of the @ in the published tags
    root.setLevel(logging.INFO if is_main else logging.ERROR)


class _FileHandler(logging.FileHandler):
    """Writes a log file; a full disk is told of by what is written beside it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:
        """Says nothing."""


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run, cut back to the update that a resumed run goes on from.

    Args:
        folder: The run's folder.
        update: Updates that the run has completed; what was logged after them will be logged again.
        is_scored: Whether the epoch that ends with that update, if one does, has been scored too.
        tracker: What the scalars go to as well; closed with the log.

    Raises:
        UserError: If they cannot be written.
    """

    def __init__(self, folder: Path, update: int = 0, is_scored: bool = True, tracker: Tracker | None = None) -> None:
        self._path, self._tracker = folder / "metrics.jsonl", tracker
        lines = [line for line in read_metrics(self._path) if line["update"] <= update]
        if not is_scored:
            lines = [line for line in lines if line["update"] < update or "lr" in line]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        with self._writing():
            (folder / "runs").mkdir(exist_ok=True)
            # Not through SummaryWriter, whose thread still holds what it was told when a run is killed.
            self._writer = EventsWriter(str(folder / "runs" / "events"), f".{time.time_ns()}")
            session = SessionLog(status=SessionLog.START)  # TensorBoard forgets what came after
            self._writer.write_event(Event(step=update + 1, session_log=session, wall_time=time.time()))

    def write(self, values: Mapping[str, float | int], tags: Mapping[str, float]) -> None:
        """Writes one line, and scalars for TensorBoard and, if there is one, the tracker.

        Args:
            values: The line; has the keys 'update' and 'epoch'. What is not finite is written as null.
            tags: Scalars by their TensorBoard tags.

        Raises:
            UserError: If they cannot be written.
        """
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._writing(), open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            for tag, value in tags.items():
                event = Event(step=values["update"], summary=scalar(tag, value), wall_time=time.time())
                self._writer.write_event(event)
            self._writer.flush()  # a killed run leaves what it told
        if self._tracker:
            self._tracker.write({name: values[name] for name in ("update", "epoch")} | dict(tags))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._path} cannot be written ({error.strerror}): free some space") from None

    def close(self) -> None:
        """Closes the files, and the tracker."""
        with suppress(OSError):  # a full disk, which was told of
            self._writer.close()
        if self._tracker:
            self._tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if it is not there. Lines cut short by a kill are left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
