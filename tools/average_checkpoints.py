"""Average the weights of several checkpoints of one network, which often is better than each of them.

Usage:
    python tools/average_checkpoints.py a.pth b.pth c.pth --output soup.pth
    python tools/average_checkpoints.py output/groupmixformer_small/*/best.pth --output soup.pth --greedy --data-path D

The uniform average takes all checkpoints. --greedy scores each on the validation data, and takes them in the order of
their accuracy, the best first, each only if the average with it is no less accurate than without it; so what it makes
scores no lower there than the best of them. Both are recipes of Wortsman et al., 2022, arXiv:2203.05482. They are for
checkpoints that began at the same weights: epochs of a run, or fine-tuned with other seeds and settings.

The checkpoint that is written holds the configuration and the classes of those that it is made of, and what it is
made of. tools/predict.py, test.py and train.py --pretrained take it as it is.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import Tensor

from data.build import build_eval_data
from models.build import load_weights
from tools.runs.averaging import greedy, look, uniform
from utils import checkpoint
from utils.cli import Parser, add_weights_choice, at_least, check_new, run
from utils.dist import World, choose_device
from utils.engine import evaluate
from utils.errors import UserError, listing
from utils.metrics import Score, describe
from utils.precision import Precision, memory_format
from utils.trained import Trained, load_trained


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: If it is wrong.
    """
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="FILE", help="two or more, of one network")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.pth", help="the checkpoint to write, a new one"
    )
    add_weights_choice(parser)
    parser.add_argument(
        "--cfg", type=Path, metavar="FILE", help="configuration of the average, instead of the checkpoints' own"
    )
    parser.add_argument("--greedy", action="store_true", help="take only checkpoints that do not lower the accuracy")
    scoring = parser.add_argument_group("with --greedy")
    scoring.add_argument("--data-path", metavar="DIR", help="folder that holds val/, to score on")
    scoring.add_argument(
        "--batch-size", type=at_least(1), metavar="N", help="images at a time (default: the configuration's)"
    )
    scoring.add_argument(
        "--workers", type=at_least(0), metavar="N", help="loader processes (default: the configuration's)"
    )
    scoring.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where to score (default: a GPU, if any)")
    scoring.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="how to score (default fp32)")
    arguments = parser.parse_args()
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    paths = arguments.checkpoints
    for flag in ("data_path", "batch_size", "workers", "device", "precision"):
        if getattr(arguments, flag) is not None and not arguments.greedy:
            raise UserError(f"--{flag.replace('_', '-')} is for scoring: add --greedy, or leave it out")
    if arguments.greedy and not arguments.data_path:
        raise UserError("--greedy scores on validation data: name it with --data-path")
    if len(paths) < 2:
        raise UserError(f"{paths[0]} is one checkpoint: name two or more to average")
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{listing(missing)}: no such file; name checkpoints")
    check_new(arguments.output, "--output", ".pth")


def build_scorer(arguments: argparse.Namespace, trained: Trained) -> Callable[[Mapping[str, Tensor]], Score]:
    """What scores weights of a network on the validation data, as test.py does.

    Args:
        arguments: The command line.
        trained: The network.

    Raises:
        UserError: If the data is missing or has classes that the network does not know.
    """
    device = choose_device(arguments.device or "auto")
    config = trained.config.clone()
    config.DATA.DATA_PATH = arguments.data_path
    if arguments.batch_size is not None:
        config.DATA.BATCH_SIZE = arguments.batch_size
    if arguments.workers is not None:
        config.DATA.NUM_WORKERS = arguments.workers
    world = World(0, 1, device)
    data = build_eval_data(config, world, trained.classes, len(trained.labels))
    network, source = trained.network.to(device, memory_format=memory_format(config)), str(trained.source)
    precision = Precision(arguments.precision or "fp32", device.type)

    def score(weights: Mapping[str, Tensor]) -> Score:
        load_weights(network, weights, source)
        return evaluate(network, data, world, precision)

    return score


def main() -> None:
    """Parses, looks at the checkpoints, averages, writes."""
    arguments = parse()
    paths, cfg, weights = arguments.checkpoints, arguments.cfg, arguments.weights
    trained = load_trained(paths[0], cfg, weights) if arguments.greedy or cfg else None
    score = build_scorer(arguments, trained) if arguments.greedy else None
    found = look(paths, weights, with_configs=cfg is None)
    record: dict[str, Any] = {"recipe": "greedy" if score else "uniform"}
    if score:
        mean, taken, reached = greedy(found, score)
        record |= {"acc1": reached.acc1, "images": reached.images, "data_path": arguments.data_path}
    else:
        mean, taken = uniform(found), found
    record["of"] = [{"path": str(one.path), "weights": one.name} for one in taken]
    config = trained.config if cfg else next((one.config for one in found if one.config), None)
    state = {
        "model": mean.weights(),
        "config": config.dump() if config else None,
        "classes": next((one.classes for one in found if one.classes), None),
        "averaged": record,
    }
    checkpoint.save(state, arguments.output)
    scored = f", {describe(reached)}" if score else ""
    print(f"{arguments.output}: the mean of {mean.count} of {len(found)} checkpoints{scored}")


if __name__ == "__main__":
    run(main)
