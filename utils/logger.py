"""Console, log_rank0.txt, TensorBoard and metrics.jsonl; silent off rank 0."""

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

_FORMAT = "%(asctime)s %(message)s"


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar; where a bar shows the progress, lines about it go to the file only."""

    def __init__(self, has_bar: bool) -> None:
        super().__init__()
        self._has_bar = has_bar

    def emit(self, record: logging.LogRecord) -> None:
        if not (self._has_bar and getattr(record, "progress", False)):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


def setup_logging(is_main: bool, folder: Path | None = None) -> None:
    """Sends log lines to the console and to log_rank0.txt in a folder; of other ranks only errors pass.

    Args:
        is_main: Whether this is rank 0.
        folder: Where the file goes, if anywhere.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_ConsoleHandler(has_bar=sys.stderr.isatty())]
    if is_main and folder:
        handlers.append(logging.FileHandler(folder / "log_rank0.txt"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%Y-%m-%d %H:%M:%S"))
        root.addHandler(handler)
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # it warns of the @ in the published tags
    root.setLevel(logging.INFO if is_main else logging.ERROR)


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run, cut back to the update that a resumed run goes on from.

    Args:
        folder: The run's folder, or None to write nothing.
        update: Updates that the run has completed; what was logged after them will be logged again.
    """

    def __init__(self, folder: Path | None, update: int = 0) -> None:
        self._path = folder / "metrics.jsonl" if folder else None
        self._writer = None
        if self._path:
            lines = [line for line in read_metrics(self._path) if line["update"] <= update]
            self._path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            self._writer = SummaryWriter(str(folder / "runs"), purge_step=update + 1)

    def write(self, values: Mapping[str, float | int], tags: Mapping[str, float]) -> None:
        """Writes one line, and TensorBoard scalars.

        Args:
            values: The line; has the key 'update'. What is not finite is written as null.
            tags: Scalars by their TensorBoard tags.
        """
        if self._path and self._writer:
            with open(self._path, "a") as file:
                line = {name: value if math.isfinite(value) else None for name, value in values.items()}
                file.write(json.dumps(line) + "\n")
            for tag, value in tags.items():
                self._writer.add_scalar(tag, value, values["update"])
            self._writer.flush()  # a killed run leaves what it told

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer:
            self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if it is not there. A last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
