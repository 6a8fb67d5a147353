"""Count a network's parameters, FLOPs and activations; without --cfg those of all published sizes.

Usage:
    python tools/flops.py
    python tools/flops.py --cfg configs/groupmixformer_small.yaml --img-size 384 --depth 2 --json counts.json

One multiply-add is one FLOP. "FLOPs" is what fvcore counts by itself and papers print; "all" has softmax, pooling,
activation functions, sums and products too. Counting needs no weights, no data and no GPU.
"""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.build import build_model
from utils.checkpoint import write_json
from utils.cli import Parser, check_report, run
from utils.config import check, load_config
from utils.console import markdown_table
from utils.errors import UserError
from utils.flops import Counts, count

# Parameters and FLOPs that the paper's table prints. The only public configuration of large counts more than the
# paper says of it (its own comment says that it needs adjusting).
_PUBLISHED = {
    "groupmixformer_miny": ("5.7M", "1.4G"),
    "groupmixformer_tiny": ("11.0M", "3.7G"),
    "groupmixformer_small": ("22.4M", "5.2G"),
    "groupmixformer_base": ("45.8M", "17.6G"),
    "groupmixformer_large": ("70.3M", "36.1G"),
}


def main() -> None:
    """Parses, counts, prints."""
    parser = Parser(__doc__)
    parser.add_argument("--cfg", type=Path, metavar="FILE", help="configuration; all published sizes if left out")
    parser.add_argument("--img-size", type=int, metavar="N", help="height and width, instead of the configuration's")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="levels of modules in the table (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there too")
    arguments = parser.parse_args()
    check_report(arguments.json)
    if arguments.cfg:
        name, size, result = count_config(arguments.cfg, arguments.img_size)
        print_modules(name, size, result, arguments.depth)
        written = asdict(result)
    else:
        configs = Path(__file__).resolve().parent.parent / "configs"
        counts = {name: count_config(configs / f"{name}.yaml", arguments.img_size)[2] for name in _PUBLISHED}
        print_sizes(counts)
        written = {name: asdict(result) for name, result in counts.items()}
    if arguments.json:
        write_json(arguments.json, written)


def count_config(path: Path, size: int | None) -> tuple[str, int, Counts]:
    """Counts a configuration's network.

    Returns:
        Its name, the images' size, the counts.

    Raises:
        UserError: If the configuration is wrong.
    """
    config = load_config(path)
    if size is not None:
        config.DATA.IMG_SIZE = size
    check(config)
    if not config.MODEL.GMA.NUM_CLASSES:
        raise UserError(f"{path}: MODEL.GMA.NUM_CLASSES is 0, to be taken from data: set it to count without any")
    network = build_model(config, config.MODEL.GMA.NUM_CLASSES)
    size = config.DATA.IMG_SIZE
    return config.MODEL.NAME, size, count(network, config.MODEL.GMA.IN_DIM, size, size)


def print_sizes(counts: dict[str, Counts]) -> None:
    """Prints one line for each size, beside what the paper prints."""
    rows = [["network", "parameters", "FLOPs", "all", "activations", "paper: parameters", "paper: FLOPs"]]
    for name, result in counts.items():
        numbers = (result.parameters, result.flops, result.all_flops, result.activations)
        rows.append([name, *(f"{number:,}" for number in numbers), *_PUBLISHED[name]])
    print(markdown_table(rows))


def print_modules(name: str, size: int, result: Counts, depth: int) -> None:
    """Prints a table of modules down to a depth, and the FLOPs by operator."""
    print(f"{name} at {size} x {size}\n")
    print(f"{'module':<32}{'parameters':>14}{'FLOPs':>18}{'all':>18}{'activations':>14}")
    for module, numbers in result.modules.items():
        level = len(module.split(".")) if module else 0
        if level <= depth:
            parameters, flops, everything, activations = numbers
            label = "  " * level + (module.split(".")[-1] if module else "network")
            print(f"{label:<32}{parameters:>14,}{flops:>18,}{everything:>18,}{activations:>14,}")
    print("\nby operator: " + ", ".join(f"{operator} {number:,}" for operator, number in result.by_operator.items()))
    print(f"FLOPs without softmax, pooling, activations, sums and products: {result.flops:,}")
    print(f"FLOPs with them: {result.all_flops:,}")
    if result.uncounted:
        print("not counted: " + ", ".join(f"{operator} ({times}x)" for operator, times in result.uncounted.items()))


if __name__ == "__main__":
    run(main)
