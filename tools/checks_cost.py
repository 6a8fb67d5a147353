"""Measure what a run's safety costs: an update with and without its checks, and the pause that a checkpoint makes.

Usage:
    python tools/checks_cost.py --cfg configs/groupmixformer_small.yaml --batch-size 4
    torchrun --nproc_per_node 2 tools/checks_cost.py --cfg configs/groupmixformer_miny.yaml --batch-size 4

The checks are what all ranks tell one another before an update (losses, stop signals, broken images, failed writes),
and the wait for its numbers. Updates with and without them take turns, and neighbours are compared.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from yacs.config import CfgNode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.build import build_model
from utils import checkpoint, engine
from utils.classification import classification
from utils.cli import at_least, config_from, make_parser, run
from utils.config import accumulation_steps
from utils.dist import join_world
from utils.engine import Training, Watch, train_one_epoch
from utils.precision import choose_precision
from utils.resume import state_of
from utils.throughput import wait
from utils.trainer import build_training
from utils.writer import BackgroundWriter

_CLASSES = 1000


def main() -> None:
    """Parses, measures, prints."""
    parser = make_parser(__doc__.splitlines()[0], measures_throughput=False)
    parser.add_argument("--rounds", type=at_least(2), default=20, metavar="N", help="pairs of updates (default 20)")
    arguments = parser.parse_args()
    config = config_from(arguments)
    with join_world(config.DEVICE, config.RANK_TIMEOUT) as world:
        precision = choose_precision(config, world.device)
        network = build_model(config, _CLASSES)
        steps = (2 * arguments.rounds + 2) * accumulation_steps(config)
        training = build_training(config, world, precision, classification(), network, steps)
        shape = (config.DATA.BATCH_SIZE, config.MODEL.GMA.IN_DIM, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)
        with_checks, without = time_updates(training, shape)
        cost = [100 * (checked / bare - 1) for checked, bare in zip(with_checks, without, strict=True)]
        low, middle, high = statistics.quantiles(cost, n=4, method="inclusive")
        if world.is_main:
            where = f"{world.size} x {world.device.type}, {precision.name}, {config.DATA.BATCH_SIZE} images a rank"
            print(f"{config.MODEL.NAME} on {where}, medians of {arguments.rounds}:")
            print(f"  update with checks     {1e3 * statistics.median(with_checks):9.2f} ms")
            print(f"  update without         {1e3 * statistics.median(without):9.2f} ms")
            print(f"  the checks cost        {middle:9.2f} %, between {low:.2f} and {high:.2f} in half of the pairs")
            print_pauses(training, config)


def time_updates(training: Training, shape: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """Trains on noise, with and without checks in turn.

    Args:
        training: All that an update needs.
        shape: Of a micro-batch of images.

    Returns:
        Seconds of each update with checks, and of the one without that follows it.
    """
    images, targets = torch.randint(256, shape, dtype=torch.uint8), torch.randint(_CLASSES, shape[:1])
    times: dict[bool, list[float]] = {True: [], False: []}
    vote = engine._vote

    class Clock(Watch):
        def __init__(self) -> None:
            self.since = time.perf_counter()

        def on_update(self, signal: int, failed: bool) -> None:
            wait(training.world.device)
            now = time.perf_counter()
            times[training.progress.place % 2 == 1].append(now - self.since)
            self.since = now

    def vote_in_turn(*given: object) -> object:
        if training.progress.place % 2 == 0:
            return vote(*given)
        return engine._Votes([0.0] * training.world.size, 0.0, 0, 0, False)

    def batches() -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        while True:
            yield images, targets, [""] * len(targets)

    with mock.patch.object(engine, "_vote", vote_in_turn):
        train_one_epoch(training, batches(), 10**9, Clock())
    return times[True][1:], times[False][1:]  # the first pair warms up


def print_pauses(training: Training, config: CfgNode) -> None:
    """Times a checkpoint: the copy for which training stops, and the writing, beside which it goes on."""
    state = state_of(training, None, config, None, 0)
    before = checkpoint.on_host(state)
    writer = BackgroundWriter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pth"
        since = time.perf_counter()
        copied = checkpoint.on_host(state, before)
        writer.submit(partial(checkpoint.save, copied, path))
        pause = time.perf_counter() - since
        writer.wait()
        written = time.perf_counter() - since
        size = path.stat().st_size
    print(f"  a checkpoint has       {size / 2**20:9.1f} MiB")
    print(f"  training stops for     {1e3 * pause:9.2f} ms, the copy to host memory")
    print(f"  it is on disk after    {1e3 * written:9.2f} ms")


if __name__ == "__main__":
    run(main)
