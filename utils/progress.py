"""How far a run is, and how long it is: all that has to be known to go on with it, beside weights and the like."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Steps:
    """Steps, updates and epochs of a run, converted once.

    Attributes:
        steps_per_epoch: Micro-batches of an epoch on each rank.
        accumulation: Micro-batches of an update; the last update of an epoch has what is left.
        epochs: Epochs of the run.
    """

    steps_per_epoch: int
    accumulation: int
    epochs: int

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.steps_per_epoch // self.accumulation)

    @property
    def updates(self) -> int:
        """Optimizer steps of the run."""
        return self.epochs * self.updates_per_epoch

    def batches_of_update(self, update_in_epoch: int) -> range:
        """Which of an epoch's micro-batches its update takes."""
        first = update_in_epoch * self.accumulation
        return range(first, min(first + self.accumulation, self.steps_per_epoch))


@dataclass
class Window:
    """Sums since the last report, over the updates that were taken.

    Attributes:
        updates: How many.
        loss: Of their losses, each the mean over ranks.
        grad_norm: Of their gradient norms before clipping.
    """

    updates: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0


@dataclass
class Progress:
    """How far a run is.

    An epoch has a fixed number of places for updates, each with its images. At each place an update is taken, or left
    out where its gradients are no numbers; schedule and moving average count the taken ones only.

    Attributes:
        epoch: Epochs completed.
        place: Updates of the epoch under way that are done, taken or left out.
        updates: Updates taken in the run.
        left_out: Updates left out in the run.
        left_out_in_row: Updates left out since the last one that was taken.
        broken: Complaints about broken images, each once, in the order in which they were met.
        window: Sums since the last report.
    """

    epoch: int = 0
    place: int = 0
    updates: int = 0
    left_out: int = 0
    left_out_in_row: int = 0
    broken: list[str] = field(default_factory=list)
    window: Window = field(default_factory=Window)

    def take(self, loss: float, grad_norm: float) -> None:
        """Counts an update that was taken."""
        self.place += 1
        self.updates += 1
        self.left_out_in_row = 0
        self.window.updates += 1
        self.window.loss += loss
        self.window.grad_norm += grad_norm

    def leave_out(self) -> None:
        """Counts an update that was left out."""
        self.place += 1
        self.left_out += 1
        self.left_out_in_row += 1

    def end_epoch(self) -> None:
        """Counts an epoch as completed."""
        self.epoch, self.place = self.epoch + 1, 0

    def position(self, updates_per_epoch: int) -> int:
        """Updates of the run that are done, taken or left out: those of all epochs before, and `place`."""
        return self.epoch * updates_per_epoch + self.place

    def state_dict(self) -> dict[str, Any]:
        """Plain types for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; keys of other names are none of its business."""
        for name in self.__dataclass_fields__:
            setattr(self, name, state[name])
        self.broken = list(state["broken"])
        self.window = Window(**state["window"])
