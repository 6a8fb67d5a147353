"""Weights & Biases beside the logs in a run's folder, where it is asked for. It never brings a run down."""

import importlib
import importlib.util
import logging
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from utils.checkpoint import write_text
from utils.errors import UserError, reason

_log = logging.getLogger(__name__)

_ID = "wandb_id"
_SECONDS = 60  # that a server out of reach may hold up the beginning and the end of a run


def check_tracking(project: str) -> None:
    """Refuses a project where wandb is not installed.

    Raises:
        UserError: If it is not.
    """
    if project:
        found = importlib.util.find_spec("wandb")
        if found is None or found.origin is None:  # a mere folder of that name, such as wandb itself leaves about
            raise UserError(f"WANDB is {project!r} but wandb is not installed: pip install wandb, or leave WANDB empty")


class Tracker:
    """A Weights & Biases run that belongs to a run's folder: what goes on there goes on under the same id.

    What fails is told of once, and the run goes on without.

    Args:
        folder: The run's.
        config: Its configuration; WANDB names the project.

    Raises:
        UserError: If the id cannot be written.
    """

    def __init__(self, folder: Path, config: CfgNode) -> None:
        path = folder / _ID
        if not path.is_file():
            write_text(path, uuid.uuid4().hex[:8])
        self._run = None
        try:
            # Not at the top: it is no requirement, and takes a second.
            wandb = importlib.import_module("wandb")
            self._run = wandb.init(
                project=config.WANDB,
                name=f"{config.MODEL.NAME}/{config.TAG}",
                id=path.read_text().strip(),
                resume="allow",
                dir=str(folder),
                config=yaml.safe_load(config.dump()),
                # The console is left to our own handler, which keeps it in log_rank0.txt.
                settings={"console": "off", "init_timeout": _SECONDS, "finish_timeout": _SECONDS},
            )
            # Not its own steps, which must grow: a run that goes on from a checkpoint logs what came after it again.
            self._run.define_metric("*", step_metric="update")
        except Exception as error:  # of the network, of the account, or of wandb itself
            self._leave_out(error)

    def write(self, values: Mapping[str, float | int]) -> None:
        """Sends values; one of them is 'update'."""
        if self._run:
            try:
                self._run.log(dict(values))
            except Exception as error:
                self._leave_out(error)

    def close(self) -> None:
        """Ends the W&B run, as failed while an error is on its way."""
        run, self._run = self._run, None
        if run:
            try:
                run.finish(exit_code=int(sys.exc_info()[0] is not None))
            except Exception as error:
                self._leave_out(error)

    def _leave_out(self, error: Any) -> None:
        self._run = None
        _log.warning("nothing more goes to Weights & Biases (%s); all is in metrics.jsonl", reason(error))
