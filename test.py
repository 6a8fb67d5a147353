"""Score a checkpoint on the validation folder.

Usage:
    python test.py --cfg configs/groupmixformer_small.yaml --data-path D --pretrained weights.pth
    torchrun --nproc_per_node 8 test.py --cfg configs/groupmixformer_small.yaml --data-path D --resume best.pth
    python test.py --cfg configs/groupmixformer_small.yaml --data-path D --resume best.pth --report report
"""

import argparse
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from utils.cli import check_report, config_from, make_parser, run
from utils.config import check_to_score
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.dist import World
    from utils.precision import Precision
    from utils.reporting.outcomes import Outcomes
    from utils.scoring import Scored

_log = logging.getLogger(__name__)


def main() -> None:
    """Parses, scores or measures, and writes down what came out."""
    parser = make_parser("Score a checkpoint on the validation data.", scores=True)
    parser.add_argument("--fuse", action="store_true", help="rewrite the network for inference first (models/fuse.py)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the score, or the throughput, there too")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write the score of each class, confusion, calibration and mistakes there",
    )
    arguments = parser.parse_args()
    config = config_from(arguments, check=check_to_score)
    check_report(arguments.json)
    if arguments.report and config.THROUGHPUT_MODE:
        raise UserError("--report tells of a score, and --throughput makes none: leave one of them out")

    # Torch and timm take seconds to import: a wrong key or flag is told of before.
    from utils.dist import join_world
    from utils.logger import setup_logging
    from utils.precision import choose_scoring_precision

    with join_world(config.DEVICE, config.RANK_TIMEOUT) as world:
        setup_logging(world.is_main)
        precision = choose_scoring_precision(config, world.device)
        if config.THROUGHPUT_MODE:
            measure_speed(arguments, config, world, precision)
        else:
            score(arguments, config, world, precision)


def measure_speed(arguments: argparse.Namespace, config: CfgNode, world: "World", precision: "Precision") -> None:
    """Logs how fast the network is, and writes it down."""
    from models.build import build_model
    from models.fuse import fuse
    from utils.throughput import measure

    network = build_model(config, config.MODEL.GMA.NUM_CLASSES)
    measured = measure(fuse(network) if arguments.fuse else network, config, world.device, precision)
    _log.info(measured)
    write_facts(arguments.json, asdict(measured) | {"fused": arguments.fuse}, world)


def score(arguments: argparse.Namespace, config: CfgNode, world: "World", precision: "Precision") -> None:
    """Scores the weights, prints the score and writes down what is asked for, on rank 0."""
    from utils.dist import together
    from utils.metrics import describe
    from utils.reporting.folder import check_report_folder
    from utils.reporting.outcomes import OutcomeSums
    from utils.scoring import circumstances, read_weights, score_weights

    with together():
        if arguments.report and world.is_main:
            check_report_folder(arguments.report)
    sums = OutcomeSums(world) if arguments.report else None
    weights = read_weights(config, arguments.weights)
    scored = score_weights(config, world, precision, weights, arguments.fuse, sums)
    result = scored.score
    facts = {
        "acc1": result.acc1,
        "acc5": result.acc5,
        **asdict(result),
        **circumstances(weights, world, precision, scored.images_per_s),
        "fused": arguments.fuse,
    }
    if world.is_main:
        print(f" * {describe(result)}")
        _log.info(
            "%d images (%d and %d correct), loss %.4f, %.1f images/s, %s on %d x %s",
            result.images, result.correct1, result.correct5, result.loss, scored.images_per_s, precision.name,
            world.size, world.device.type,
        )  # fmt: skip
    outcomes = sums.outcomes() if sums else None
    write_facts(arguments.json, facts, world)
    with together():
        if outcomes and world.is_main:
            report_on(outcomes, scored, config, facts, arguments.report)


def write_facts(file: Path | None, facts: dict[str, Any], world: "World") -> None:
    """Writes what --json asks for."""
    from utils.checkpoint import write_json
    from utils.dist import together

    with together():
        if file and world.is_main:
            write_json(file, facts)


def report_on(outcomes: "Outcomes", scored: "Scored", config: CfgNode, facts: dict[str, Any], folder: Path) -> None:
    """Writes the report into its folder."""
    from data.names import class_labels
    from utils.reporting.scoring_report import write_report

    classes = scored.classes or [str(number) for number in range(scored.num_classes)]
    labels = class_labels(scored.classes, scored.num_classes)
    facts = facts | {"network": config.MODEL.NAME, "data": config.DATA.DATA_PATH, "image_size": config.DATA.IMG_SIZE}
    write_report(folder, outcomes, classes, labels, scored.data.source, facts)
    _log.info("report: %s", folder / "index.html")


if __name__ == "__main__":
    run(main)
