"""Measures the loading of training images, stage by stage on one core and whole with worker processes.

The ways of loading take turns on the same images, and draw the same at random where stages are measured; in worker
processes only DATA.LOADING's ways draw what their seeds say. One core's numbers are processor seconds, which other
programs on the machine do not lengthen much; files come from the machine's cache.
"""

import itertools
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from yacs.config import CfgNode

from data.build import available_cores
from data.datasets import FolderSource
from tools.benchmarking.machine import machine_line
from tools.benchmarking.timing import in_turn
from tools.benchmarking.ways import STAGES, Way, loading_ways
from utils.cli import at_least
from utils.config import check, load_config
from utils.console import markdown_table
from utils.errors import UserError, reason
from utils.seeding import seed_host

_RECIPE = Path(__file__).resolve().parent.parent.parent / "configs" / "groupmixformer_small.yaml"
_BATCH_SIZE = 32
_LEAST = 512  # images of a round of worker processes, whose start takes as long as loading some batches


def add_loader_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments that `run_loader` reads beside `rounds`."""
    add = parser.add_argument
    add("--data-path", type=Path, required=True, metavar="D", help="folder of class folders, or of train/ with those")
    add("--cfg", type=Path, default=_RECIPE, metavar="FILE", help="whose augmentation (default: GroupMixFormer-S's)")
    add(
        "--images",
        type=at_least(1),
        default=96,
        metavar="N",
        help=f"images of a round, for each worker (default 96); a loader's has at least {_LEAST}",
    )
    add(
        "--workers",
        type=at_least(1),
        nargs="*",
        default=[available_cores()],
        metavar="N",
        help="measure the whole loader with so many processes too (default: one a core)",
    )
    add(
        "--gpu-speed",
        type=float,
        nargs="*",
        default=[1000.0, 2000.0],
        metavar="SPEED",
        help="images/s of a GPU, to tell how many of them this machine feeds (default 1000 2000)",
    )


def run_loader(arguments: Namespace) -> dict[str, Any]:
    """Measures.

    Args:
        arguments: As `add_loader_arguments` describes them, and `rounds`.

    Returns:
        Medians and spreads, ready for JSON.

    Raises:
        UserError: If there are no images, or one is broken.
    """
    config = load_config(arguments.cfg)
    check(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(arguments, config)
    finally:
        torch.set_num_threads(threads)


def _measured(arguments: Namespace, config: CfgNode) -> dict[str, Any]:
    ways = loading_ways(config)
    counts = [arguments.images * arguments.rounds, *(images_of_round(arguments, each) for each in arguments.workers)]
    paths = find_images(arguments.data_path, max(counts))
    endless = itertools.cycle(paths)
    seconds = time_stages(ways, [list(itertools.islice(endless, arguments.images)) for _ in range(arguments.rounds)])
    speeds = {name: [1 / sum(of_round.values()) for of_round in rounds] for name, rounds in seconds.items()}
    cores = available_cores()
    return {
        "images": f"{len(paths)} files, {config.DATA.IMG_SIZE} x {config.DATA.IMG_SIZE}, {config.AUG.AUTO_AUGMENT}",
        "rounds": arguments.rounds,
        "stages_ms": {
            name: {stage: _summary([1e3 * of_round.get(stage, 0.0) for of_round in rounds]) for stage in STAGES}
            for name, rounds in seconds.items()
        },
        "images_per_s_and_core": {name: _summary(of_way) for name, of_way in speeds.items()},
        "against_published": _against_published(speeds),
        "loaders": {
            str(workers): _loader_result(time_loaders(ways, paths, workers, arguments)) for workers in arguments.workers
        },
        "gpus_fed": {
            name: {f"{speed:g}": cores * statistics.median(of_way) / speed for speed in arguments.gpu_speed}
            for name, of_way in speeds.items()
        },
    }


def images_of_round(arguments: Namespace, workers: int) -> int:
    """How many images a loader of so many worker processes loads in a round."""
    return max(arguments.images * workers, _LEAST)


def find_images(root: Path, most: int) -> list[str]:
    """Some images of a folder of class folders, or of the train/ in it, each read once, in an order that mixes classes.

    Args:
        root: The folder.
        most: How many, where it has more.

    Raises:
        UserError: If there are none, or one is broken.
    """
    source = FolderSource(root / "train" if (root / "train").is_dir() else root)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    paths = [source.name(index) for index in order[:most].tolist()]
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # decoders raise errors of every kind at garbage
            raise UserError(f"{path} is broken ({reason(error)}): mend or remove it") from None
    return paths


def time_stages(ways: dict[str, Way], chunks: Iterable[Sequence[str]]) -> dict[str, list[dict[str, float]]]:
    """Loads in this process, the ways taking turns.

    Args:
        ways: By name.
        chunks: The images of each round.

    Returns:
        Processor seconds an image, by way, round and stage.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number, paths in enumerate(chunks):
        for name in in_turn(ways, number):
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
        arguments: Images of a round, for each worker, of which there are some hundreds at least, and rounds.

    Returns:
        Images a second of each way and round, by the clock on the wall.
    """
    count = images_of_round(arguments, workers)
    shared = list(itertools.islice(itertools.cycle(paths), count))
    loaders = {
        name: DataLoader(
            _Samples(way, shared), _BATCH_SIZE, num_workers=workers, collate_fn=way.collate, persistent_workers=True
        )
        for name, way in ways.items()
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds + 1):
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


def loader_tables(results: dict[str, Any], machine: dict[str, Any]) -> str:
    """The results as Markdown.

    Args:
        results: As `run_loader` gives them.
        machine: As `describe_machine` gives it, and Pillow's version.
    """
    names = list(results["stages_ms"])
    rows = [["", *names]]
    rows += [
        [f"{stage}, ms", *(f"{results['stages_ms'][name][stage]['median']:.2f}" for name in names)] for stage in STAGES
    ]
    rows.append(["images/s of one core", *(_with_spread(results["images_per_s_and_core"][name]) for name in names)])
    rows.append(["x published", *(f"{results['against_published'][name]:.2f}" for name in names)])
    for workers, loader in results["loaders"].items():
        title = f"images/s of {workers} worker{'s' * (workers != '1')}"
        rows.append([title, *(_with_spread(loader["images_per_s"][name]) for name in names)])
        rows.append(["x published", *(f"{loader['against_published'][name]:.2f}" for name in names)])
    for speed in results["gpus_fed"][names[0]]:
        title = f"GPUs fed, of {speed} images/s each"
        rows.append([title, *(f"{results['gpus_fed'][name][speed]:.2f}" for name in names)])
    line = f"{machine_line(machine)}, Pillow {machine['pillow']}; {results['images']}; {results['rounds']} rounds."
    return f"{line}\n\n{markdown_table(rows)}\n\n{_LEGEND}\n"


_LEGEND = """\
Medians of rounds in which the ways of loading take turns on the same images (in brackets least and most). published: as
the published code loads, normalising and erasing included, which the other two leave to the device; exact and fast: as
DATA.LOADING does, to 8-bit pixels. ms: processor time of an image on one core, files being in memory already; images/s
of one core follow from it. The decode of fast holds the cut and, of images that are decoded smaller, the whole resize.
Workers: processes of one loader, by the clock on the wall. GPUs fed: images/s of one core x cores / a GPU's images/s,
for published with normalising and erasing on these cores; loader processes of all GPUs share the cores, and cores that
share arithmetic units feed fewer, as the rows of workers tell."""


def _with_spread(summary: dict[str, float]) -> str:
    return f"{summary['median']:.0f} ({summary['least']:.0f} to {summary['most']:.0f})"
