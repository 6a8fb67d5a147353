"""Score a checkpoint on the validation folder.

Usage:
    python test.py --cfg configs/groupmixformer_small.yaml --data-path D --pretrained weights.pth
    torchrun --nproc_per_node 8 test.py --cfg configs/groupmixformer_small.yaml --data-path D --resume best.pth --ema
"""

import argparse
import json
import logging
from pathlib import Path

from yacs.config import CfgNode

from utils.cli import check_report, config_from, make_parser, run

_log = logging.getLogger(__name__)


def main() -> None:
    """Parses, then scores or measures."""
    parser = make_parser("Score a checkpoint on the validation data.")
    parser.add_argument("--ema", action="store_true", help="score the checkpoint's moving average")
    parser.add_argument("--random-weights", action="store_true", help="score a network that knows nothing")
    parser.add_argument("--fuse", action="store_true", help="rewrite the network for inference first (models/fuse.py)")
    parser.add_argument("--json", metavar="FILE", help="write the score there too")
    arguments = parser.parse_args()
    config = config_from(arguments)
    report = Path(arguments.json) if arguments.json else None
    check_report(report)
    score_or_measure(arguments, config, report)


def score_or_measure(arguments: argparse.Namespace, config: CfgNode, report: Path | None) -> None:
    """Scores, and prints and writes the result on rank 0; or measures the throughput."""
    # Torch and timm take seconds to import: a wrong key or flag is told of before.
    from models.build import build_model
    from models.fuse import fuse
    from utils.dist import world
    from utils.logger import setup_logging
    from utils.optim import choose_scoring_precision
    from utils.scoring import score_weights
    from utils.throughput import throughput_line

    with world(config.DEVICE, config.RANK_TIMEOUT) as here:
        setup_logging(here.is_main)
        precision = choose_scoring_precision(config, here.device, _log.info)
        if config.THROUGHPUT_MODE:
            network = build_model(config, config.MODEL.GMA.NUM_CLASSES)
            network = fuse(network) if arguments.fuse else network
            _log.info(throughput_line(network, config, here.device, precision))
            return
        result, images_per_s = score_weights(
            config, here, precision, arguments.ema, arguments.random_weights, arguments.fuse
        )
        if not here.is_main:
            return
        print(f" * Acc@1 {result.acc1:.3f} Acc@5 {result.acc5:.3f}")
        _log.info(
            "%d images (%d and %d correct), loss %.4f, %.1f images/s, %s on %d x %s",
            result.images, result.correct1, result.correct5, result.loss, images_per_s, precision.name, here.size,
            here.device.type,
        )  # fmt: skip
        if report:
            values = {
                "acc1": result.acc1,
                "acc5": result.acc5,
                "loss": result.loss,
                "images": result.images,
                "correct1": result.correct1,
                "correct5": result.correct5,
                "images_per_s": images_per_s,
                "ranks": here.size,
                "precision": precision.name,
                "weights": config.MODEL.RESUME or config.MODEL.PRETRAINED or "random",
                "ema": arguments.ema,
                "fused": arguments.fuse,
            }
            report.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
