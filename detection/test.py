"""Score a detector's checkpoint on the validation images by COCO's average precision, of boxes and masks.

Usage:
    python detection/test.py --cfg configs/detection/mask_rcnn_small.yaml --data-path COCO --resume best.pth
    torchrun --nproc_per_node 8 detection/test.py --cfg configs/detection/mask_rcnn_small.yaml --data-path COCO \\
      --resume best.pth --json score.json --detections detections.json --save-pictures pictures
"""

import argparse
import csv
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yacs.config import CfgNode

from detection.config import check, default_config
from utils.cli import check_pictures, check_report, config_from, make_parser, run
from utils.errors import UserError

if TYPE_CHECKING:
    from detection.metrics import BoxScore
    from detection.scoring import ScoredDetections

_log = logging.getLogger(__name__)


def main() -> None:
    """Parses, then scores."""
    parser = make_parser(
        __doc__, data="folder of the images' folders and of annotations/", scores=True, measures_throughput=False
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the score there too")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="write each class's AP there, as CSV")
    parser.add_argument(
        "--detections", type=Path, metavar="FILE", help="write what was found there, in COCO's form of results"
    )
    parser.add_argument("--save-pictures", type=Path, metavar="DIR", help="draw what is there, and what was found")
    parser.add_argument("--pictures", type=int, default=24, metavar="N", help="of so many images (24)")
    parser.add_argument("--min-score", type=float, default=0.5, metavar="S", help="draw what is at least so sure (0.5)")
    arguments = parser.parse_args()
    config = config_from(arguments, default_config, check)
    for flag in ("json", "classes", "detections"):
        check_report(getattr(arguments, flag), f"--{flag}")
    check_pictures(arguments.save_pictures, arguments.pictures)
    if not 0 <= arguments.min_score <= 1:
        raise UserError(f"--min-score {arguments.min_score}: give a score from 0 to 1")
    score(arguments, config)


def score(arguments: argparse.Namespace, config: CfgNode) -> None:
    """Scores, and prints and writes the result on rank 0."""
    # Torch and timm take seconds to import: a wrong key or flag is told of before.
    from detection.data import has_masks
    from detection.pictures import save_pictures
    from detection.scoring import score_weights
    from utils.dist import join_world
    from utils.logger import setup_logging
    from utils.metrics import describe
    from utils.precision import choose_scoring_precision
    from utils.scoring import circumstances, read_weights

    with join_world(config.DEVICE, config.RANK_TIMEOUT) as world:
        setup_logging(world.is_main)
        precision = choose_scoring_precision(config, world.device)
        weights = read_weights(config, arguments.weights)
        scored = score_weights(config, world, precision, weights)
        if not world.is_main:
            return
        print(f" * {describe(scored.score)}")
        print_table(scored.score)
        _log.info(
            "%d images, %d detections, %.1f images/s, %s on %d x %s",
            scored.score.images, len(scored.results), scored.images_per_s, precision.name,
            world.size, world.device.type,
        )  # fmt: skip
        settings = circumstances(weights, world, precision, scored.images_per_s)
        write_reports(arguments, scored, settings)
        if folder := arguments.save_pictures:
            images = Path(config.DATA.DATA_PATH) / config.DATA.VAL_IMAGES
            save_pictures(
                folder, images, scored.coco, scored.results, arguments.pictures, arguments.min_score, has_masks(config)
            )


def print_table(score: "BoxScore") -> None:
    """Prints all of COCO's measures, of boxes and where there are some of masks."""
    from detection.metrics import STATS

    print("      " + "".join(f"{label:>8}" for _, label in STATS.values()))
    for kind in ("box", "mask"):
        if hasattr(score, f"{kind}_ap"):
            print(f"{kind:6}" + "".join(f"{getattr(score, f'{kind}_{name}'):8.3f}" for name in STATS))


def write_reports(arguments: argparse.Namespace, scored: "ScoredDetections", settings: dict[str, Any]) -> None:
    """Writes the files that the flags name."""
    from detection.coco import categories
    from utils.checkpoint import finite, write_json, write_output, write_text

    values = finite(asdict(scored.score))
    names = list(categories(scored.coco).values())
    of_classes = {name: values.pop(name) for name in list(values) if name.endswith("_of_classes")}
    by_class = [
        {"class": name} | {measure.removesuffix("_of_classes"): of[place] for measure, of in of_classes.items()}
        for place, name in enumerate(names)
    ]
    if arguments.json:
        write_json(arguments.json, values | {"classes": by_class} | settings)
    if arguments.classes:
        write_output(arguments.classes, lambda place: write_table(place, by_class))
    if arguments.detections:
        write_text(arguments.detections, json.dumps(scored.results))


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows of the same keys as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    run(main)
