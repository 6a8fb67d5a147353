"""Train a detector, or score one with --eval.

Usage:
    python detection/train.py --cfg configs/detection/mask_rcnn_small.yaml --data-path COCO --pretrained weights.pth
    torchrun --nproc_per_node 8 detection/train.py --cfg configs/detection/mask_rcnn_small.yaml --data-path COCO \\
      --pretrained weights.pth --output O --tag T

--pretrained takes the weights of a classifier, for the backbone, or those of a detector. What else a run starts from,
and how it goes on, is as in train.py.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detection.config import check, default_config
from utils.cli import config_from, make_parser, run

_log = logging.getLogger(__name__)


def main() -> None:
    """Parses, then trains or scores."""
    parser = make_parser(__doc__, data="folder of the images' folders and of annotations/", measures_throughput=False)
    config = config_from(parser.parse_args(), default_config, check)

    # Torch and timm take seconds to import: a wrong key or flag is told of before.
    from detection.scoring import score_weights
    from detection.task import detection
    from utils.dist import join_world
    from utils.logger import setup_logging
    from utils.metrics import describe
    from utils.precision import choose_precision, choose_scoring_precision
    from utils.scoring import read_weights
    from utils.trainer import train

    with join_world(config.DEVICE, config.RANK_TIMEOUT) as world:
        setup_logging(world.is_main)
        if config.EVAL_MODE:
            precision = choose_scoring_precision(config, world.device)
            scored = score_weights(config, world, precision, read_weights(config))
            _log.info(f" * {describe(scored.score)}")
        else:
            train(config, world, choose_precision(config, world.device), detection(config))


if __name__ == "__main__":
    run(main)
