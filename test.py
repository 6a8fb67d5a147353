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
    from utils.reporting.outcomes import Outcomes
    from utils.scoring import Scored

_log = logging.getLogger(__name__)


def main() -> None:
    """Parses, then scores or measures."""
    parser = make_parser("Score a checkpoint on the validation data.", scores=True)
    parser.add_argument("--fuse", action="store_true", help="rewrite the network for inference first (models/fuse.py)")
    parser.add_argument("--json", metavar="FILE", help="write the score, or the throughput, there too")
    parser.add_argument(
        "--report", metavar="DIR", help="write the score of each class, confusion, calibration and mistakes there"
    )
    arguments = parser.parse_args()
    config = config_from(arguments, check=check_to_score, scores=True)
    check_report(Path(arguments.json) if arguments.json else None)
    if arguments.report and config.THROUGHPUT_MODE:
        raise UserError("--report tells of a score, and --throughput makes none: leave one of them out")
    score_or_measure(arguments, config)


def score_or_measure(arguments: argparse.Namespace, config: CfgNode) -> None:
    """Scores, and prints and writes the result on rank 0; or measures the throughput."""
    # Torch and timm take seconds to import: a wrong key or flag is told of before.
    from models.build import build_model
    from models.fuse import fuse
    from utils.checkpoint import write_json
    from utils.dist import join_world, together
    from utils.logger import setup_logging
    from utils.precision import choose_scoring_precision
    from utils.reporting.folder import check_report_folder
    from utils.reporting.outcomes import OutcomeSums
    from utils.scoring import circumstances, read_weights, score_weights
    from utils.throughput import measure

    folder = Path(arguments.report) if arguments.report else None
    with join_world(config.DEVICE, config.RANK_TIMEOUT) as world:
        setup_logging(world.is_main)
        precision = choose_scoring_precision(config, world.device)
        if config.THROUGHPUT_MODE:
            network = build_model(config, config.MODEL.GMA.NUM_CLASSES)
            network = fuse(network) if arguments.fuse else network
            measured = measure(network, config, world.device, precision)
            _log.info(measured)
            facts = asdict(measured) | {"fused": arguments.fuse}
            with together():
                if arguments.json and world.is_main:
                    write_json(Path(arguments.json), facts)
            return
        with together():
            if folder and world.is_main:
                check_report_folder(folder)
        sums = OutcomeSums(world) if folder else None
        weights = read_weights(config, arguments.weights)
        scored = score_weights(config, world, precision, weights, arguments.fuse, sums)
        result = scored.score
        facts = {
            "acc1": result.acc1,
            "acc5": result.acc5,
            "loss": result.loss,
            "images": result.images,
            "correct1": result.correct1,
            "correct5": result.correct5,
            **circumstances(weights, world, precision, scored.images_per_s),
            "fused": arguments.fuse,
        }
        if world.is_main:
            print(f" * Acc@1 {result.acc1:.3f} Acc@5 {result.acc5:.3f}")
            _log.info(
                "%d images (%d and %d correct), loss %.4f, %.1f images/s, %s on %d x %s",
                result.images, result.correct1, result.correct5, result.loss, scored.images_per_s, precision.name,
                world.size, world.device.type,
            )  # fmt: skip
        outcomes = sums.outcomes() if sums else None
        with together():
            if arguments.json and world.is_main:
                write_json(Path(arguments.json), facts)
            if outcomes and world.is_main:
                report_on(outcomes, scored, config, facts, folder)


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
