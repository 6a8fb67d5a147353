"""Small configurations, networks, image folders and trainings that several unit tests share."""

import copy
import errno
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, get_worker_info
from yacs.config import CfgNode

from data.build import EvalData
from data.decoding import as_mode
from data.transforms import Transform
from utils.config import default_config, lookup
from utils.dist import World
from utils.engine import Training, Watch, train_one_epoch
from utils.meter import Report
from utils.optim import build_ema, build_loss, build_optimizer, build_scheduler
from utils.precision import Precision
from utils.progress import Progress, Steps

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def examples(most: int) -> settings:
    """Settings of a property test: the same examples on every run and machine, and no limit on their time."""
    return settings(
        max_examples=most, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


def configured(**values: Any) -> CfgNode:
    """The default configuration with some keys set; `__` stands for the dot of a dotted name."""
    config = default_config()
    for key, value in values.items():
        set_key(config, key.replace("__", "."), value)
    return config


def refuse_to_list(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Lets listing a folder fail: tests may run as a user whom no permission stops."""
    original = os.scandir

    def guarded(place: Any) -> Any:
        if str(place) == str(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return original(place)

    monkeypatch.setattr(os, "scandir", guarded)


def set_key(config: CfgNode, name: str, value: Any) -> None:
    """Sets a key of a configuration by its dotted name."""
    *parts, last = name.split(".")
    (lookup(config, ".".join(parts)) if parts else config)[last] = value


def small_data_config(root: Path | str, **values: Any) -> CfgNode:
    """A configuration for a small image folder: 32 x 32, batches of 4, plain augmentation, no workers."""
    fixed = {
        "DATA__DATA_PATH": str(root),
        "DATA__IMG_SIZE": 32,
        "DATA__BATCH_SIZE": 4,
        "DATA__NUM_WORKERS": 0,
        "MODEL__GMA__NUM_CLASSES": 0,
        "AUG__AUTO_AUGMENT": "none",
        "DEVICE": "cpu",
    }
    return configured(**{**fixed, **values})


def noise(number: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """An RGB image of noise, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def plain(number: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """An RGB image of one grey, which `number_of` reads back from its tensor."""
    return Image.new("RGB", size, (number, number, number))


def number_of(image: Tensor) -> int:
    """The grey of an evenly grey image."""
    (number,) = image.unique().tolist()
    return number


def only_decoded(augment: Callable[[Image.Image], Any], mode: str = "RGB") -> Transform:
    """A transform that decodes as training does, and then only calls a function."""
    return Transform(partial(as_mode, mode=mode), augment)


def write_folder(
    root: Path, classes: Mapping[str, int], image: Callable[[int], Image.Image] = noise, suffix: str = ".png"
) -> Path:
    """Writes root/<class>/<number><suffix>, so many images of each class, numbered through."""
    number = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            image(number).save(root / name / f"{number:03d}{suffix}")
            number += 1
    return root


def write_tar(path: Path, folder: Path) -> Path:
    """Packs a folder of class folders."""
    with tarfile.open(path, "w") as file:
        file.add(folder, arcname=".")
    return path


def batch_here_and_spawned(loader: DataLoader) -> list[Any]:
    """A loader's batch of a sample, as this process makes it and as one would that shares no memory with it."""
    here = (loader.dataset, loader.collate_fn, loader.worker_init_fn)
    return [collate([samples[0, 7]]) for samples, collate, _ in (here, pickle.loads(pickle.dumps(here)))]


class FakeReader:
    """Streams evenly grey images as timm's readers do: shards dealt out to ranks in training, to workers always."""

    def __init__(self, count, world=ALONE):
        self.num_samples, self.class_to_idx = count, {"a": 0, "b": 1, "c": 2}
        self.dist_rank, self.dist_num_replicas, self.seen_epoch = world.rank, world.size, None

    def set_epoch(self, epoch):
        self.seen_epoch = epoch

    def __len__(self):
        return -(-self.num_samples // self.dist_num_replicas)

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first = self.dist_rank * workers + worker
        for number in range(first, self.num_samples, self.dist_num_replicas * workers):
            yield plain(number), number % 3


Batch = tuple[Tensor, Tensor, list[str]]


def batches(count: int, size: int, classes: int = 3, shape: tuple[int, ...] = (3, 2, 2)) -> list[Batch]:
    """So many micro-batches of noise without complaints, in double precision, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count * size, *shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, (count * size,), generator=generator)
    return fine(zip(images.split(size), targets.split(size), strict=True))


def fine(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Batch]:
    """Micro-batches with nothing to complain about."""
    return [(images, targets, [""] * len(targets)) for images, targets in pairs]


def to_score(loader: Sequence[Batch], images: int = 0, rounds: int = 0) -> EvalData:
    """Batches as data to score on, which are what the network takes."""
    return EvalData(loader, untouched, None, images, rounds)


def untouched(images: Tensor) -> Tensor:
    """Stands for `Normalize` where batches are what the network takes."""
    return images


def small_network(classes: int = 3) -> nn.Sequential:
    """Two layers without norms for `batches`, in double precision, with the same weights on every call."""
    generator = torch.Generator().manual_seed(2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, classes)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    return network


def training_of(network: nn.Module, steps_per_epoch: int, config: CfgNode | None = None, **others: Any) -> Training:
    """All that the training loop needs, built from the configuration on the CPU; `others` replaces parts of it."""
    config = config or plain_training()
    steps = Steps(steps_per_epoch, max(config.TRAIN.ACCUMULATION_STEPS, 1), config.TRAIN.EPOCHS)
    optimizer = others.get("optimizer") or build_optimizer(config, network, 1)
    precision = others.get("precision", Precision("fp32", "cpu"))
    parts = {
        "network": network,
        "model": network,
        "criterion": build_loss(config),
        "optimizer": optimizer,
        "scheduler": build_scheduler(config, optimizer, steps, 1),
        "scaler": precision.grad_scaler(),
        "ema": build_ema(config, network),
        "finish": untouched,
        "batch_transform": None,
        "precision": precision,
        "world": ALONE,
        "steps": steps,
        "batch_size": config.DATA.BATCH_SIZE,
        "clip_grad": config.TRAIN.CLIP_GRAD,
        "most_left_out": config.TRAIN.MAX_LEFT_OUT,
        "seed": config.SEED,
        "progress": Progress(),
    }
    return Training(**{**parts, **others})


def plain_training(**values: Any) -> CfgNode:
    """A configuration to train `small_network` on `batches`: large steps, no mixing, no warm-up."""
    fixed = {
        "DATA__BATCH_SIZE": 4,
        "TRAIN__EPOCHS": 2,
        "TRAIN__WARMUP_EPOCHS": 0,
        "TRAIN__BASE_LR": 1.0,
        "MODEL__LABEL_SMOOTHING": 0.0,
        "AUG__MIXUP": 0.0,
        "AUG__CUTMIX": 0.0,
    }
    return configured(**{**fixed, **values})


class Reports(Watch):
    """Keeps the reports of a training, and passes each on to a function if there is one."""

    def __init__(self, follow: Callable[[Report], None] | None = None) -> None:
        self.reports: list[Report] = []
        self._follow = follow

    def on_report(self, report: Report) -> None:
        self.reports.append(report)
        if self._follow:
            self._follow(report)


def train(
    training: Training,
    loader: Iterable[Any],
    epoch: int = 0,
    every: int = 1,
    follow: Callable[[Report], None] | None = None,
) -> list[Report]:
    """Trains for an epoch and returns the reports."""
    watch, progress = Reports(follow), training.progress
    progress.epoch, progress.place, progress.updates = epoch, 0, epoch * training.steps.updates_per_epoch
    train_one_epoch(training, loader, every, watch)  # type: ignore[arg-type]
    return watch.reports


def equal(first: Any, second: Any) -> bool:
    """Whether nested plain types and tensors are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if is_dataclass(first):
        return equal(vars(first), vars(second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def all_of(training: Training) -> dict[str, Any]:
    """A copy of all that has to be saved."""
    ema = training.ema.module.state_dict() if training.ema else None
    parts = {"model": training.network.state_dict(), "optimizer": training.optimizer.state_dict(), "ema": ema}
    return copy.deepcopy({**parts, "scaler": training.scaler.state_dict(), "progress": training.progress.state_dict()})


_RANK_PROGRAM = """
import importlib, json, sys
module, function, *words = sys.argv[1:]
print(json.dumps(getattr(importlib.import_module(module), function)(*words)))
"""


def handle(request: pytest.FixtureRequest, handlers: dict[signal.Signals, Any]) -> None:
    """Sets signals' handlers until the test is over: a shell's background jobs ignore some."""
    for number, handler in handlers.items():
        request.addfinalizer(partial(signal.signal, number, signal.signal(number, handler)))


def start_ranks(module: str, function: str, *words: object) -> list[subprocess.Popen]:
    """Starts two processes of a group; each prints, as JSON, what a test module's function gives for some words."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fixed = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fixed |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _RANK_PROGRAM, module, function, *map(str, words)],
            env={**os.environ, **fixed, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def said_by(process: subprocess.Popen) -> Any:
    """What a process of `start_ranks` printed, once it has ended well."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])
