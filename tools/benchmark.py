"""Measure how fast networks run beside each other, and how near that is to what the machine can do; or the loader.

Usage:
    python tools/benchmark.py --vs swin_tiny_patch4_window7_224 convnext_tiny --batch-size 8
    python tools/benchmark.py --model groupmixformer_small --vs swin_tiny_patch4_window7_224 convnext_tiny \\
        --mode infer train --precision fp32 bf16 --compile --fused --batch-size 1 8 64 --json speed.json --png speed.png
    python tools/benchmark.py --loader --data-path D
    python tools/benchmark.py --loader --data-path D --workers 1 8 --gpu-speed 1500 --json loader.json

A GroupMixFormer is measured beside its literal form too, which computes the same as published code does, step by step.
All networks of a mode and batch size take turns with a large matrix product and a large copy, so that a machine that
drifts changes ratios little. Weights and images are random.

--compile measures each network with torch.compile too: ours block by block, others whole; inference on a CPU whole and
with inductor's freezing. Networks have no drop path here, by which less of a block is compiled. The first step's time
is as inductor's cache on disk allows.

--loader measures the loading of training images instead, stage by stage on one core and whole with worker processes, as
published code does it and as DATA.LOADING exact and fast do, and tells how many GPUs the machine's cores feed. It has
flags of its own: --loader --help tells them.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import PIL
import torch

from tools.benchmarking.chart import draw_chart
from tools.benchmarking.loading import add_loader_arguments, loader_tables, run_loader
from tools.benchmarking.machine import describe_machine
from tools.benchmarking.measure import Result, Settings, measure
from tools.benchmarking.networks import build_network
from tools.benchmarking.report import as_json, markdown
from tools.benchmarking.subjects import plan
from utils.checkpoint import write_json, write_text
from utils.cli import Parser, at_least, check_report, run
from utils.dist import choose_device
from utils.errors import UserError
from utils.precision import choose_kernels


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: If it is wrong.
    """
    parser = Parser(__doc__)
    parser.add_argument("--loader", action="store_true", help="measure loading; --loader --help tells its flags")
    parser.add_argument("--rounds", type=at_least(1), default=7, metavar="N", help="measurements of each (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the printed tables there too")
    # Two command lines, so that a flag that means nothing beside --loader, or without it, is unknown.
    if "--loader" in sys.argv:
        add_loader_arguments(parser)
    else:
        add_network_arguments(parser)
    arguments = parser.parse_args()
    for speed in getattr(arguments, "gpu_speed", ()):
        if not 1 <= speed < math.inf:
            raise UserError(f"--gpu-speed {speed}: give a finite number, at least 1")
    if not arguments.loader and not 0 < arguments.seconds < math.inf:
        raise UserError(f"--seconds {arguments.seconds}: give a finite number above 0")
    profile = getattr(arguments, "profile", None)
    if profile and profile.exists() and not profile.is_dir():
        raise UserError(f"--profile {profile}: is a file; name a folder")
    for flag, ending in (("json", ""), ("markdown", ""), ("png", ".png")):
        check_report(getattr(arguments, flag, None), f"--{flag}", ending)
    return arguments


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `benchmark_networks` reads beside those of every benchmark."""
    parser.add_argument("--model", default="groupmixformer_small", metavar="M", help="ours, or any network of timm")
    parser.add_argument("--vs", nargs="+", default=[], metavar="M", help="networks to compare with")
    parser.add_argument("--mode", nargs="+", default=["infer"], choices=["infer", "train"], help="kinds of step")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--compile", action="store_true", help="with torch.compile too")
    parser.add_argument("--fused", action="store_true", help="ours in the form of models/fuse.py too, for inference")
    parser.add_argument("--recompute", action="store_true", help="ours with TRAIN.RECOMPUTE cheap too, in training")
    parser.add_argument("--batch-size", nargs="+", type=at_least(1), default=[8], metavar="N", help="images of a step")
    parser.add_argument(
        "--img-size", type=at_least(1), default=224, metavar="N", help="their height and width (default 224)"
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where (default: a GPU, if any)"
    )
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of each measurement (default 1)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a bar chart there")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write each one's top operators and a trace there")


def main() -> None:
    """Parses, measures, reports."""
    arguments = parse()
    if arguments.loader:
        benchmark_loader(arguments)
    else:
        benchmark_networks(arguments)


def benchmark_loader(arguments: argparse.Namespace) -> None:
    """Measures the loading of images and reports."""
    results = run_loader(arguments)
    machine = describe_machine(torch.device("cpu")) | {"pillow": PIL.__version__}
    tables = loader_tables(results, machine)
    write(arguments, tables, {"machine": machine, "settings": settings_of(arguments), "results": results})


def benchmark_networks(arguments: argparse.Namespace) -> None:
    """Measures networks, saying on standard error what is done, and reports."""
    device = choose_device(arguments.device)
    if device.type == "cpu" and "fp16" in arguments.precision:
        raise UserError("--precision fp16: is for GPUs, and the device is a CPU; use bf16")
    choose_kernels(deterministic=False)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.profile:
        arguments.profile.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys([arguments.model, *arguments.vs])
    networks = {name: build_network(name, arguments.img_size) for name in names}
    subjects = plan(
        networks,
        arguments.mode,
        arguments.precision,
        arguments.batch_size,
        compiled=arguments.compile,
        fused=arguments.fused,
        recomputed=arguments.recompute,
    )
    settings = Settings(device, arguments.img_size, arguments.rounds, arguments.seconds, arguments.profile)
    results = measure(networks, subjects, settings, say=lambda line: print(line, file=sys.stderr))
    report(arguments, results, describe_machine(device))


def report(arguments: argparse.Namespace, results: list[Result], machine: dict[str, Any]) -> None:
    """Prints the tables and writes the files that are asked for."""
    tables = markdown(results, arguments.vs[0] if arguments.vs else None, machine, arguments.img_size)
    write(arguments, tables, as_json(results, machine, settings_of(arguments)))
    if arguments.png:  # last, so that no chart that fails takes an hour's numbers with it
        draw_chart(results, arguments.png, machine)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as the report's JSON holds it: all but the names of files."""
    return {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}


def write(arguments: argparse.Namespace, tables: str, numbers: dict[str, Any]) -> None:
    """Prints the tables, and writes them and the numbers where that is asked for."""
    print(tables, end="")
    if arguments.markdown:
        write_text(arguments.markdown, tables)
    if arguments.json:
        write_json(arguments.json, numbers)


if __name__ == "__main__":
    run(main)
