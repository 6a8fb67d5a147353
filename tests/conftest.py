"""Fixtures for whole-program tests: a small tree of images, a small configuration, and ways to start the programs."""

import contextlib
import io
import json
import locale
import logging
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent

CLASSES = ["amber_columns", "amber_rows", "green_columns", "green_rows", "violet_columns", "violet_rows"]
_COLOURS = {"amber": (220, 160, 40), "blue": (40, 90, 210), "green": (40, 180, 90), "violet": (140, 60, 200)}
_TRAIN_IMAGES = 48  # 8 a class
_VAL_IMAGES = 17  # 3 a class, and 2 of the last: a prime number, which no number of ranks divides

_TINY = """\
DATA:
  BATCH_SIZE: 6
  IMG_SIZE: 64
  NUM_WORKERS: 0
MODEL:
  NAME: tiny
  GMA:
    NUM_CLASSES: 6
    EMBEDDING_DIMS: [40, 40, 40, 40]
    SERIAL_DEPTHS: [1, 1, 1, 1]
    MLP_RATIOS: [2, 2, 2, 2]
    DROP_PATH_RATE: 0.0
TRAIN:
  EPOCHS: 4
  WARMUP_EPOCHS: 0
  BASE_LR: 0.6
  EMA_DECAY: 0.8
AUG:
  SCALE: [0.5, 1.0]
  AUTO_AUGMENT: none
  COLOR_JITTER: 0.0
  REPROB: 0.0
  MIXUP: 0.0
  CUTMIX: 0.0
DEVICE: cpu
KEEP: 9
PRINT_FREQ: 1
"""

# Everything random that training has, for --opts.
_RANDOM = (
    "AUG.AUTO_AUGMENT rand-m9-mstd0.5-inc1 AUG.REPROB 0.5 AUG.MIXUP 0.8 AUG.CUTMIX 1.0 MODEL.GMA.DROP_PATH_RATE 0.2 "
    "MODEL.GMA.DROP_RATE 0.1 DATA.IMG_SIZE 32"
)


@dataclass(frozen=True)
class Result:
    """How a program ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """What the program told its user on standard error, without the 'error: ' before it."""
        return [line.removeprefix("error: ") for line in self.stderr.splitlines() if line.startswith("error: ")]


@dataclass(frozen=True)
class Run:
    """A training run: how it ended, and its folder."""

    result: Result
    folder: Path

    @property
    def output(self) -> Path:
        """What --output was."""
        return self.folder.parent.parent

    def checkpoint(self, name: str = "last.pth") -> dict[str, Any]:
        return torch.load(self.folder / name, weights_only=True)

    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def updates(self) -> list[dict[str, float]]:
        return [line for line in self.metrics() if "lr" in line]

    def evaluations(self) -> list[dict[str, float]]:
        return [line for line in self.metrics() if "acc1" in line]

    def numbers(self) -> list[dict[str, float]]:
        """The metrics without the speeds, which no two runs share."""
        return [{key: value for key, value in line.items() if key != "images_per_s"} for line in self.metrics()]

    def stopped_after(self, epochs: int, output: Path) -> Path:
        """Copies the run's folder to another output as it was when so many epochs were done."""
        folder = output / self.folder.parent.name / self.folder.name
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("best.pth", "last.pth", "runs", "*.png"))
        for path in folder.glob("ckpt_epoch_*.pth"):
            epoch, _, place = path.stem.removeprefix("ckpt_epoch_").partition("_update_")
            if (int(epoch), int(place or 0)) > (epochs, 0):
                path.unlink()
        states = [self.checkpoint(f"ckpt_epoch_{epoch}.pth") for epoch in range(1, epochs + 1)]
        best = next(i for i, state in enumerate(states, 1) if state["best"] == states[-1]["best"])
        for name, epoch in (("last.pth", epochs), ("best.pth", best)):
            shutil.copyfile(folder / f"ckpt_epoch_{epoch}.pth", folder / name)
        return folder


def write_images(folder: Path, images: int, seed: int, classes: list[str] | None = None) -> None:
    """Writes an ImageNet-style split: coloured gratings under noise, dealt out to the classes in turn."""
    generator, classes = np.random.default_rng(seed), classes or CLASSES
    rows, columns = np.mgrid[:64, :64] / 64
    for number in range(images):
        name = classes[number % len(classes)]
        colour, direction = name.split("_")
        phase, frequency = generator.uniform(0, 2 * np.pi), generator.uniform(5, 7)
        wave = np.sin(2 * np.pi * frequency * (columns if direction == "columns" else rows) + phase)
        pixels = np.array(_COLOURS[colour]) * (0.65 + 0.35 * wave[..., None]) + generator.normal(0, 12, (64, 64, 3))
        path = folder / name / f"{number:03d}.{'png' if number // len(classes) % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def differing(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two checkpoints, or parts of them, are not equal bit for bit."""
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: keys {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [place for key in one for place in differing(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)}"]
        return [
            place for i, pair in enumerate(zip(one, other, strict=True)) for place in differing(*pair, f"{where}.{i}")
        ]
    return [] if one == other else [f"{where}: {one} and {other}"]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a user's shell: one thread, no GPU, the programs of this interpreter first."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(
            ("PYTEST_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "PYTHONWARNINGS")
        )
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | extra


@pytest.fixture(scope="session")
def user_environment() -> Callable[..., dict[str, str]]:
    """What `start` gives to programs, for tests that start them in another way."""
    return environment


@pytest.fixture(scope="session")
def start() -> Callable[..., Result]:
    """Starts a program as a user does and waits for it: `start("train.py", "--cfg", ..., ranks=2)`."""

    def start_program(*words: object, ranks: int = 1, cwd: Path = REPOSITORY, **extra: str) -> Result:
        launcher = ["torchrun", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else ["python"]
        done = subprocess.run(
            launcher + [str(word) for word in words],
            cwd=cwd,
            env=environment(**extra),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return start_program


@pytest.fixture
def ascii_locale() -> Iterator[None]:
    """A machine whose files are of ASCII unless a program says otherwise."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    yield
    locale.setlocale(locale.LC_CTYPE, before)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Computes with one thread as started programs do, draws nothing, and gives the test process its logging back.

    Drawing the curves takes half the time of a small run; the started programs do draw them.
    """
    root, threads = logging.getLogger(), torch.get_num_threads()
    handlers, level = list(root.handlers), root.level
    torch.set_num_threads(1)
    try:
        with mock.patch.object(FigureCanvasAgg, "print_png", lambda _canvas, place: Path(place).touch()):
            yield
    finally:
        torch.set_num_threads(threads)
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)


@pytest.fixture(scope="session")
def call() -> Callable[..., Result]:
    """Runs a program inside this process, which saves the seconds that starting one takes."""

    def call_program(program: str, *words: object) -> Result:
        out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
        sys.argv = [program, *map(str, words)]
        try:
            with _undisturbed(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(REPOSITORY / program), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.argv = argv
        return Result(code, out.getvalue(), err.getvalue())

    return call_program


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A folder that the first test process to ask for it fills, and that the others only read."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def tree(shared: Callable[..., Path]) -> Path:
    """An ImageNet-style folder tree of 48 and 17 images, 64 x 64, of six classes that a network can learn."""

    def fill(folder: Path) -> None:
        write_images(folder / "train", _TRAIN_IMAGES, seed=0)
        write_images(folder / "val", _VAL_IMAGES, seed=1)

    return shared("tree", fill)


@pytest.fixture(scope="session")
def make_images() -> Callable[..., None]:
    """Writes an ImageNet-style split: `make_images(folder, images, seed, classes)`."""
    return write_images


@pytest.fixture(scope="session")
def tiny_config(shared: Callable[..., Path]) -> Path:
    """A configuration of a network that trains in seconds, with nothing random in it but the order and the crops."""
    return shared("configs", lambda folder: (folder / "tiny.yaml").write_text(_TINY)) / "tiny.yaml"


@pytest.fixture(scope="session")
def everything_random() -> str:
    """Words for --opts that turn on augmentation, erasing, mixup, cutmix, drop path and dropout, on smaller images."""
    return _RANDOM


@pytest.fixture(scope="session")
def differences() -> Callable[..., list[str]]:
    """Tells where two checkpoints, or parts of them, are not equal bit for bit."""
    return differing


@pytest.fixture(scope="session")
def train(call: Callable[..., Result], tree: Path, tiny_config: Path) -> Callable[..., Run]:
    """Runs train.py on the small tree inside this process: `train(output, *flags, opts="KEY value", code=0)`."""

    def train_here(output: Path, *flags: object, opts: str = "", tag: str = "run", code: int = 0) -> Run:
        where = ("--cfg", tiny_config, "--data-path", tree, "--output", output, "--tag", tag)
        result = call("train.py", *where, *flags, *(["--opts", *opts.split()] if opts else []))
        assert result.code == code, result.stderr
        return Run(result, output / "tiny" / tag)

    return train_here


@pytest.fixture(scope="session")
def shared_run(shared: Callable[..., Path]) -> Callable[..., Run]:
    """A training run that all tests share, from its name and from what starts it: output folder -> Result."""

    def make(name: str, begin: Callable[[Path], Result]) -> Run:
        def fill(folder: Path) -> None:
            (folder / "result.json").write_text(json.dumps(asdict(begin(folder))))

        folder = shared(name, fill)
        return Run(Result(**json.loads((folder / "result.json").read_text())), folder / "tiny" / "run")

    return make


@pytest.fixture(scope="session")
def trained(start: Callable[..., Result], shared_run: Callable[..., Run], tree: Path, tiny_config: Path) -> Run:
    """A run of train.py, started as a user does: four epochs of eight updates, with a moving average."""
    words = ["train.py", "--cfg", tiny_config, "--data-path", tree, "--device", "auto", "--tag", "run"]
    return shared_run("trained", lambda output: start(*words, "--output", output))
