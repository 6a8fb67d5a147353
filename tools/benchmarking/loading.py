"""Measures the loading of training images, stage by stage on one core and whole with worker processes.

Three ways of loading take turns on the same images with the same random draws: as the published code loads (PIL, timm's
transforms down to normalised and erased floats, torch's collating), and as DATA.LOADING exact and fast do. One core's
numbers are processor seconds, which other programs on the machine do not lengthen much; files come from the machine's
cache.
"""

import io
import itertools
import os
import platform
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import Compose
from yacs.config import CfgNode

from data.build import available_cores, collate
from data.datasets import FolderSource
from data.transforms import Transform, train_transform
from utils.config import check, load_config
from utils.errors import UserError, reason
from utils.seeding import seed_host

_ROOT = Path(__file__).resolve().parent.parent.parent
_BATCH_SIZE = 32
STAGES = ("seed", "read", "decode", "crop and resize", "augment", "to tensor", "collate")


@dataclass(frozen=True)
class Way:
    """A way of loading: what each stage makes of what the one before it gave, and how samples become a batch."""

    stages: dict[str, Callable[[Any], Any]]
    collate: Callable[[list[Any]], Any]
    is_seeded: bool


def add_loader_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments that `run_loader` reads."""
    add = parser.add_argument_group("loading").add_argument
    add("--loader-data", metavar="FOLDER", help="folder of class folders of images, or of train/ with those")
    add(
        "--loader-cfg",
        default=str(_ROOT / "configs" / "groupmixformer_small.yaml"),
        metavar="FILE",
        help="configuration whose augmentation is measured (default: that of GroupMixFormer-S)",
    )
    add("--loader-images", type=int, default=96, metavar="N", help="images of a round (default 96)")
    add("--loader-rounds", type=int, default=7, metavar="N", help="rounds (default 7)")
    add(
        "--loader-workers",
        type=int,
        nargs="*",
        default=[available_cores()],
        metavar="N",
        help="numbers of worker processes to measure the whole loader with (default: one a core)",
    )
    add(
        "--loader-gpus",
        type=float,
        nargs="*",
        default=[1000.0, 2000.0],
        metavar="SPEED",
        help="images/s of a GPU, to tell how many of them this machine feeds (default 1000 2000)",
    )


def run_loader(arguments: Namespace) -> dict[str, Any]:
    """Measures.

    Args:
        arguments: As `add_loader_arguments` describes them.

    Returns:
        Medians and spreads, ready for JSON.

    Raises:
        UserError: If there are no images, or one is broken.
    """
    config = load_config(arguments.loader_cfg)
    check(config)
    if not arguments.loader_data:
        raise UserError("no images to load: name a folder of class folders with --loader-data")
    if min(arguments.loader_images, arguments.loader_rounds, *arguments.loader_workers) < 1:
        raise UserError("--loader-images, --loader-rounds and --loader-workers must be at least 1: give larger numbers")
    torch.set_num_threads(1)
    ways = loading_ways(config)
    paths = find_images(Path(arguments.loader_data))
    chunks = itertools.cycle(_chunks(paths, arguments.loader_images))
    seconds = time_stages(ways, list(itertools.islice(chunks, arguments.loader_rounds)))
    speeds = {name: [1 / sum(of_round.values()) for of_round in rounds] for name, rounds in seconds.items()}
    cores = available_cores()
    return {
        "machine": f"{_processor()}, {cores} cores, torch {torch.__version__}, Pillow {PIL.__version__}",
        "images": f"{len(paths)} files, {config.DATA.IMG_SIZE} x {config.DATA.IMG_SIZE}, {config.AUG.AUTO_AUGMENT}",
        "rounds": arguments.loader_rounds,
        "stages_ms": {
            name: {stage: _summary([1e3 * of_round.get(stage, 0.0) for of_round in rounds]) for stage in STAGES}
            for name, rounds in seconds.items()
        },
        "images_per_s_and_core": {name: _summary(of_way) for name, of_way in speeds.items()},
        "against_published": _against_published(speeds),
        "loaders": {
            str(workers): _loader_result(time_loaders(ways, paths, workers, arguments))
            for workers in arguments.loader_workers
        },
        "gpus_fed": {
            name: {f"{speed:g}": cores * statistics.median(of_way) / speed for speed in arguments.loader_gpus}
            for name, of_way in speeds.items()
        },
    }


def loading_ways(config: CfgNode) -> dict[str, Way]:
    """The ways of loading by name, with the augmentation of a configuration."""
    aug, data = config.AUG, config.DATA
    published = create_transform(
        data.IMG_SIZE,
        is_training=True,
        scale=tuple(aug.SCALE),
        ratio=tuple(aug.RATIO),
        hflip=aug.HFLIP,
        color_jitter=aug.COLOR_JITTER,
        auto_augment=None if aug.AUTO_AUGMENT == "none" else aug.AUTO_AUGMENT,
        interpolation=data.INTERPOLATION,
        mean=tuple(data.MEAN),
        std=tuple(data.STD),
        re_prob=aug.REPROB,
        re_mode=aug.REMODE,
        re_count=aug.RECOUNT,
    ).transforms
    ends_at = next(place for place, step in enumerate(published) if type(step).__name__ == "MaybeToTensor")
    ways = {
        "published": Way(
            {
                "read": _read,
                "decode": _convert,
                "crop and resize": published[0],
                "augment": Compose(published[1:ends_at]),
                "to tensor": Compose(published[ends_at:]),
            },
            default_collate,
            is_seeded=False,
        )
    }
    for name in ("exact", "fast"):
        config = config.clone()
        config.DATA.LOADING = name
        transform = train_transform(config)
        first, *others, last = transform.augment.transforms
        stages = {
            "read": _read,
            "decode": partial(_decode, transform),
            "crop and resize": first,
            "augment": Compose(others),
            "to tensor": last,
        }
        ways[name] = Way(stages, collate, is_seeded=True)
    return ways


def _read(path: str) -> io.BytesIO:
    return io.BytesIO(Path(path).read_bytes())


def _convert(file: io.BytesIO) -> Image.Image:
    return Image.open(file).convert("RGB")


def _decode(transform: Transform, file: io.BytesIO) -> Image.Image:
    return transform.decode(Image.open(file))


def find_images(root: Path) -> list[str]:
    """The images of a folder of class folders, or of the train/ in it, each read once, in an order that mixes classes.

    Raises:
        UserError: If there are none, or one is broken.
    """
    source = FolderSource(root / "train" if (root / "train").is_dir() else root)
    paths = [source.name(index) for index in range(len(source))]
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # decoders raise errors of every kind at garbage
            raise UserError(f"{path} is broken ({reason(error)}): mend or remove it") from None
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
    return [paths[place] for place in order]


def _chunks(paths: Sequence[str], size: int) -> list[list[str]]:
    """Parts of the paths, which begin again where they end before a part is full."""
    endless = itertools.cycle(paths)
    return [list(itertools.islice(endless, size)) for _ in range(-(-len(paths) // size))]


def time_stages(ways: dict[str, Way], chunks: Iterable[Sequence[str]]) -> dict[str, list[dict[str, float]]]:
    """Loads in this process, the ways taking turns.

    Args:
        ways: By name.
        chunks: The images of each round.

    Returns:
        Processor seconds an image, by way, round and stage.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    names = list(ways)
    for number, paths in enumerate(chunks):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(_time_round(ways[name], number, paths))
    return found


def _time_round(way: Way, number: int, paths: Sequence[str]) -> dict[str, float]:
    clock, samples, seconds = time.process_time, [], dict.fromkeys(("seed", *way.stages, "collate"), 0.0)
    for place, path in enumerate(paths):
        value, since = path, clock()
        seed_host(number * len(paths) + place)  # so that all ways draw the same
        if way.is_seeded:
            seconds["seed"] += clock() - since
        for stage, step in way.stages.items():
            since = clock()
            value = step(value)
            seconds[stage] += clock() - since
        samples.append((value, 0, "") if way.is_seeded else (value, 0))
    since = clock()
    for first in range(0, len(samples), _BATCH_SIZE):
        way.collate(samples[first : first + _BATCH_SIZE])
    seconds["collate"] += clock() - since
    return {stage: total / len(paths) for stage, total in seconds.items()}


class _Samples(Dataset):
    """Images as a way loads them, for a loader's workers."""

    def __init__(self, way: Way, paths: Sequence[str]) -> None:
        self._way, self._paths = way, paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if self._way.is_seeded:
            seed_host(index)
        value: Any = self._paths[index]
        for step in self._way.stages.values():
            value = step(value)
        return (value, 0, "") if self._way.is_seeded else (value, 0)


def time_loaders(
    ways: dict[str, Way], paths: Sequence[str], workers: int, arguments: Namespace
) -> dict[str, list[float]]:
    """Loads with worker processes, the ways taking turns.

    Args:
        ways: By name.
        paths: The images.
        workers: Processes.
        arguments: Images of a round, for each worker, and rounds.

    Returns:
        Images a second of each way and round, by the clock on the wall.
    """
    count = arguments.loader_images * workers
    shared = list(itertools.islice(itertools.cycle(paths), count))
    loaders = {
        name: DataLoader(
            _Samples(way, shared), _BATCH_SIZE, num_workers=workers, collate_fn=way.collate, persistent_workers=True
        )
        for name, way in ways.items()
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.loader_rounds + 1):
        for name, loader in loaders.items():
            since = time.perf_counter()
            for _ in loader:
                pass
            if number:  # the first round starts the workers
                found[name].append(count / (time.perf_counter() - since))
    return found


def _loader_result(speeds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "images_per_s": {name: _summary(of_way) for name, of_way in speeds.items()},
        "against_published": _against_published(speeds),
    }


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _against_published(speeds: dict[str, list[float]]) -> dict[str, float]:
    """Medians of the ratios of neighbours in time, which a drifting machine leaves alone."""
    return {
        name: statistics.median(ours / theirs for ours, theirs in zip(of_way, speeds["published"], strict=True))
        for name, of_way in speeds.items()
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if os.access(info, os.R_OK) else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def loader_table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    names = list(result["stages_ms"])
    lines = [
        f"Loading on {result['machine']}; {result['images']}; medians of {result['rounds']} rounds.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    lines += [
        _row(f"{stage}, ms", [f"{result['stages_ms'][name][stage]['median']:.2f}" for name in names])
        for stage in STAGES
    ]
    speeds = result["images_per_s_and_core"]
    lines.append(_row("images/s and core", [_with_spread(speeds[name]) for name in names]))
    lines.append(_row("against published", [f"{result['against_published'][name]:.2f}x" for name in names]))
    for workers, loader in result["loaders"].items():
        title = f"images/s, {workers} worker{'s' if workers != '1' else ''}"
        lines.append(_row(title, [_with_spread(loader["images_per_s"][name]) for name in names]))
        lines.append(_row("against published", [f"{loader['against_published'][name]:.2f}x" for name in names]))
    for speed in result["gpus_fed"][names[0]]:
        fed = [f"{result['gpus_fed'][name][speed]:.2f}" for name in names]
        lines.append(_row(f"GPUs of {speed} images/s that the cores feed", fed))
    return "\n".join(lines)


def _with_spread(summary: dict[str, float]) -> str:
    return f"{summary['median']:.0f} ({summary['least']:.0f} to {summary['most']:.0f})"


def _row(title: str, cells: Sequence[str]) -> str:
    return f"| {title} | " + " | ".join(cells) + " |"
