"""Runs that meet faults: started as a user does, watched and signalled from outside, and gone on with."""

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Result, Run, differing, environment, write_images

from utils import checkpoint

EPOCHS, UPDATES = 3, 6  # of the small run: 44 images, in updates of 8 of which the last of an epoch has 4
_SETTINGS = f"TRAIN.EPOCHS {EPOCHS} TRAIN.SAVE_UPDATES 2 KEEP 1"
_WAIT_S = 120  # for what a run does next, on a machine that is busy with other things
_PARTS = ("model", "ema", "optimizer", "scaler", "progress", "best", "classes")


class Started:
    """A command that was started, and all processes that came of it.

    Args:
        words: The command.
        folder: Where its output goes; must not exist.
        marks: What its faults leave when they have happened.
    """

    def __init__(self, words: list[str], folder: Path, marks: list[Path]) -> None:
        folder.mkdir(exist_ok=True)
        self._out, self._err, self._marks = folder / "out.txt", folder / "err.txt", marks
        self._sign = f"SURVIVAL={uuid.uuid4().hex}"
        settings = environment(**dict([self._sign.split("=")]))
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self._process = subprocess.Popen(
                words, cwd=REPOSITORY, env=settings, stdout=out, stderr=err, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """The process that was started: the only one, or the launcher."""
        return self._process.pid

    def alive(self) -> dict[int, dict[str, str]]:
        """The environments of all processes that came of the command and still run, by their ids."""
        self._process.poll()
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                lines = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:  # gone, or another user's
                continue
            if self._sign in lines:
                found[int(path.parent.name)] = dict(line.split("=", 1) for line in lines if "=" in line)
        return found

    def rank(self, number: int) -> int:
        """The process of a rank; its loader's processes are none."""
        ranks = {pid for pid, settings in self.alive().items() if settings.get("RANK") == str(number)}
        (found,) = [pid for pid in ranks if _parent(pid) not in ranks]
        return found

    def has_lost_launcher(self, rank: int) -> bool:
        """Whether the process of a rank can tell that its launcher has gone, as it can when all its threads have."""
        return _parent(rank) != self.pid

    def wait_for(self, happened: Callable[[], bool], what: str, limit_s: float = _WAIT_S) -> None:
        """Waits until something has happened."""
        end = time.monotonic() + limit_s
        while not happened():
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {limit_s} s\n{self._out.read_text()}{self._err.read_text()}")
            time.sleep(0.02)

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self._out.read_text()

    def wait_for_line(self, text: str) -> None:
        """Waits for words in the log."""
        self.wait_for(lambda: text in self.output, f"the log says {text!r}")

    def wait_for_fault(self, number: int = 0) -> None:
        """Waits until a fault has happened."""
        self.wait_for(self._marks[number].exists, f"fault {number} happens")

    def let_go(self, number: int = 0) -> None:
        """Ends a fault that holds the run."""
        self._marks[number].with_name(f"{self._marks[number].name}.go").touch()

    def send(self, *numbers: signal.Signals, to: int | None = None) -> None:
        """Sends signals to a process, one right after the other; the one that was started if none is named."""
        for number in numbers:
            os.kill(to or self.pid, number)

    def pester(self, number: signal.Signals) -> None:
        """Sends a signal to the process that was started, again and again until it is gone."""

        def gone() -> bool:
            self._process.send_signal(number)
            return self._process.poll() is not None

        self.wait_for(gone, "the pestered process leaves")

    def send_to_all(self, number: signal.Signals) -> None:
        """Sends a signal to all processes."""
        for pid in self.alive():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def end(self, within_s: float = 2 * _WAIT_S) -> Result:
        """Waits until all processes are gone, however they end."""
        end = time.monotonic() + within_s
        self.wait_for(lambda: self._process.poll() is not None, "the first process leaves", within_s)
        self.wait_for(lambda: not self.alive(), "all processes leave", max(end - time.monotonic(), 0))
        return Result(self._process.returncode, self._out.read_text(), self._err.read_text())


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@dataclass
class Life:
    """One run in its folder, which may be started many times.

    Attributes:
        words: What follows the program.
        output: What --output is.
        call: Runs a program inside this process.
        ranks: How many.
        starts: All so far.
        program: What trains.
    """

    words: list[str]
    output: Path
    call: Callable[..., Result]
    ranks: int = 1
    starts: list[Started] = field(default_factory=list)
    program: str = "train.py"

    @property
    def folder(self) -> Path:
        return self.output / "tiny" / "run"

    def start(
        self, *faults: tuple[str, str] | tuple[str, str, int], restarts: int = 0, under: str = "", add: str = ""
    ) -> Started:
        """Starts the command.

        Args:
            faults: (moment, action), of rank 0, or (moment, action, rank); see survival_faults.py.
            restarts: How often torchrun may start the ranks again.
            under: Shell commands before it.
            add: Words at the command's end.
        """
        logs = self.output / f"start{len(self.starts)}"
        logs.mkdir(parents=True)
        marks = [logs / f"fault{i}" for i in range(len(faults))]
        spec = [
            {"at": at, "do": action, "rank": rank[0] if rank else 0, "mark": str(mark)}
            for (at, action, *rank), mark in zip(faults, marks, strict=True)
        ]
        launcher = ["torchrun", "--standalone", "--nproc_per_node", str(self.ranks), "--max-restarts", str(restarts)]
        words = [*(launcher if self.ranks > 1 else ["python"])]
        words += ["tests/survival_faults.py", json.dumps(spec)] if faults else []
        words += [self.program, *self.words, *add.split()]
        shell = ["bash", "-c", f'{under}; exec "$@"', "bash"] if under else []
        self.starts.append(Started(shell + words, logs, marks))
        return self.starts[-1]

    def kill(self, moment: str, rank: int = 0, *also: tuple[str, str], add: str = "") -> Result:
        """Starts the command, and kills a rank at a moment."""
        started = self.start(*also, (moment, "kill", rank), add=add)
        result = started.end()
        assert result.code == (-signal.SIGKILL if self.ranks == 1 else 1), result
        started.wait_for_fault(len(also))
        return result

    def go_on(self, *words: object) -> Result:
        """Runs the command inside this process, which saves the seconds that starting it takes; for one rank."""
        return self.call(self.program, *self.words, *words)

    def run(self, result: Result) -> Run:
        """The run as it is after a start that ended so."""
        return Run(result, self.folder)

    def end(self) -> Run:
        """The run after its last start, once that has ended."""
        return self.run(self.starts[-1].end())

    def checkpoints(self) -> list[str]:
        """The names of the numbered checkpoints."""
        return sorted(path.name for path in self.folder.glob("ckpt_*.pth"))

    def reached(self) -> tuple[int, int]:
        """Epoch and place of last.pth."""
        progress = checkpoint.load(self.folder / checkpoint.LAST)["progress"]
        return progress["epoch"], progress["place"]


def _exact(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value.hex() if isinstance(value, float) else value for name, value in line.items()} for line in metrics
    ]


def same_end(run: Run, other: Run) -> None:
    """Checks that two runs ended alike, bit for bit, and told the same on their way."""
    assert run.result.code == 0, run.result.stderr
    one, two = run.checkpoint(), other.checkpoint()
    assert one["progress"]["epoch"] == EPOCHS
    for part in _PARTS:
        assert not differing(one[part], two[part], part)
    assert not differing(run.checkpoint("best.pth")["model"], other.checkpoint("best.pth")["model"])
    assert _exact(run.numbers()) == _exact(other.numbers())
    assert _names(run) == _names(other)


def _names(run: Run) -> list[str]:
    return sorted(path.name for path in run.folder.iterdir() if path.suffix in (".pth", ".tmp", ".txt"))


@pytest.fixture(scope="session")
def check_same_end() -> Callable[[Run, Run], None]:
    """`same_end`."""
    return same_end


@pytest.fixture(scope="session")
def survival_tree(shared: Callable[..., Path]) -> Path:
    """An ImageNet-style folder tree of 44 and 17 images."""

    def fill(folder: Path) -> None:
        write_images(folder / "train", 44, seed=0)
        write_images(folder / "val", 17, seed=1)

    return shared("survival_tree", fill)


@pytest.fixture(scope="session")
def survival_words(survival_tree: Path, tiny_config: Path, everything_random: str) -> Callable[..., list[str]]:
    """What follows train.py in a run with everything random turned on, of eighteen updates of two steps."""

    def make(output: Path, ranks: int = 1, workers: int = 0, opts: str = "", data: Path = survival_tree) -> list[str]:
        where = ["--cfg", tiny_config, "--data-path", data, "--output", output, "--tag", "run"]
        steps = ["--batch-size", 4 // ranks, "--accumulation-steps", 2]
        options = f"{everything_random} {_SETTINGS} DATA.NUM_WORKERS {workers} {opts}".split()
        return [str(word) for word in (*where, *steps, "--opts", *options)]

    return make


@pytest.fixture
def begin_life(call: Callable[..., Result]) -> Iterator[Callable[..., Life]]:
    """Begins a run of a program: `begin_life(words, output, ranks=1, program="train.py")`; starts nothing yet."""
    made = []

    def begin(words: list[str], output: Path, ranks: int = 1, program: str = "train.py") -> Life:
        made.append(Life(words, output, call, ranks, program=program))
        return made[-1]

    yield begin
    for started in (started for life in made for started in life.starts):
        started.send_to_all(signal.SIGKILL)


@pytest.fixture
def make_life(
    tmp_path: Path, survival_words: Callable[..., list[str]], begin_life: Callable[..., Life]
) -> Callable[..., Life]:
    """Begins a run: `make_life(ranks=1, workers=0, opts="", data=..., name="output")`; starts nothing yet."""

    def make(name: str = "output", **settings: Any) -> Life:
        output = tmp_path / name
        return begin_life(survival_words(output, **settings), output, settings.get("ranks", 1))

    return make


@pytest.fixture(scope="session")
def undisturbed(
    start: Callable[..., Result], shared_run: Callable[..., Run], survival_words: Callable[..., list[str]]
) -> Callable[[int], Run]:
    """The run that nothing disturbs, on so many ranks."""

    def make(ranks: int) -> Run:
        name = f"undisturbed_on_{ranks}"
        run = shared_run(name, lambda output: start("train.py", *survival_words(output, ranks), ranks=ranks))
        assert run.result.code == 0, run.result.stderr
        return run

    return make


@pytest.fixture(scope="session")
def halfway(
    start: Callable[..., Result], shared: Callable[..., Path], survival_words: Callable[..., list[str]]
) -> Path:
    """The output of a run that was killed, with three checkpoints: of 4, 6 and 8 updates."""

    def fill(folder: Path) -> None:
        fault = {"at": "removing ckpt_epoch_0_update_4.pth", "do": "kill", "rank": 0, "mark": str(folder / "killed")}
        result = start("tests/survival_faults.py", json.dumps([fault]), "train.py", *survival_words(folder))
        assert result.code == -signal.SIGKILL, result

    return shared("halfway", fill)


@pytest.fixture
def halfway_life(make_life: Callable[..., Life], halfway: Path) -> Life:
    """A life of its own for the run that was killed."""
    life = make_life()
    life.folder.parent.parent.mkdir()
    subprocess.run(["cp", "-a", halfway / "tiny", life.output], check=True)  # with its hard links
    names = ["ckpt_epoch_0_update_4.pth", "ckpt_epoch_1.pth", "ckpt_epoch_1_update_2.pth"]
    assert life.checkpoints() == names
    return life
