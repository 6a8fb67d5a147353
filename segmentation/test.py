"""Score a segmenter's checkpoint on the validation images, at their own sizes.

Usage:
    python segmentation/test.py --cfg configs/segmentation/upernet_small.yaml --data-path D --resume best.pth
    torchrun --nproc_per_node 8 segmentation/test.py --cfg configs/segmentation/upernet_base.yaml --data-path D \\
      --resume best.pth --multi-scale --save-pictures pictures --json score.json

D holds images/validation and annotations/validation.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yacs.config import CfgNode

from segmentation.config import check, default_config
from utils.cli import check_pictures, check_report, config_from, make_parser, run

_log = logging.getLogger(__name__)


def main() -> None:
    """Parses, then scores."""
    parser = make_parser(
        __doc__, data="folder that holds images/ and annotations/", scores=True, measures_throughput=False
    )
    parser.add_argument("--multi-scale", action="store_true", help="look at several sizes, and mirrored (TEST.SCALES)")
    parser.add_argument(
        "--sliding-window", action="store_true", help="look through a window (TEST.WINDOW, TEST.STRIDE)"
    )
    parser.add_argument("--save-pictures", type=Path, metavar="DIR", help="write label maps and comparisons there")
    parser.add_argument("--pictures", type=int, default=24, metavar="N", help="compare the first so many images (24)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the score there too")
    arguments = parser.parse_args()
    for flag, key in (("multi_scale", "TEST.MULTI_SCALE"), ("sliding_window", "TEST.SLIDING_WINDOW")):
        if getattr(arguments, flag):
            arguments.opts = [*(arguments.opts or []), key, "True"]
    config = config_from(arguments, default_config, check)
    check_report(arguments.json)
    check_pictures(arguments.save_pictures, arguments.pictures)
    score(arguments, config)


def score(arguments: argparse.Namespace, config: CfgNode) -> None:
    """Scores, and prints and writes the result on rank 0."""
    # Torch and timm take seconds to import: a wrong key or flag is told of before.
    from segmentation.pictures import draw_overview
    from segmentation.scoring import score_weights
    from utils.checkpoint import write_json
    from utils.dist import join_world
    from utils.logger import setup_logging
    from utils.metrics import describe
    from utils.precision import choose_scoring_precision
    from utils.scoring import circumstances, read_weights

    with join_world(config.DEVICE, config.RANK_TIMEOUT) as world:
        setup_logging(world.is_main)
        precision = choose_scoring_precision(config, world.device)
        weights = read_weights(config, arguments.weights)
        folder, compared = arguments.save_pictures, arguments.pictures
        scored = score_weights(config, world, precision, weights, folder, compared)
        result, images_per_s = scored.score, scored.images_per_s
        if not world.is_main:
            return
        if folder:
            draw_overview(folder, scored.data.source, compared)
        by_class = list(zip(scored.data.classes or [], result.iou_of_classes, result.acc_of_classes, strict=True))
        for name, iou, acc in by_class:
            print(f"{name:24} IoU {iou:7.3f} Acc {acc:7.3f}")
        print(f" * {describe(result)}")
        _log.info(
            "%d images, loss %.4f, %.1f images/s, %s on %d x %s",
            result.images, result.loss, images_per_s, precision.name, world.size, world.device.type,
        )  # fmt: skip
        if arguments.json:
            values: dict[str, Any] = {name: getattr(result, name) for name in (*result.measures, "loss", "images")}
            values |= {
                "classes": {name: {"iou": iou, "acc": acc} for name, iou, acc in by_class},
                **circumstances(weights, world, precision, images_per_s),
                "multi_scale": config.TEST.MULTI_SCALE,
                "sliding_window": config.TEST.SLIDING_WINDOW,
            }
            write_json(arguments.json, values)


if __name__ == "__main__":
    run(main)
