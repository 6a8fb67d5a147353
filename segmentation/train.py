"""Train a network to segment images, or fine-tune it.

Usage:
    python segmentation/train.py --cfg configs/segmentation/upernet_small.yaml --data-path D --output O --tag T \\
      --pretrained groupmixformer_small.pth
    torchrun --nproc_per_node 8 segmentation/train.py --cfg configs/segmentation/upernet_base.yaml --data-path D \\
      --output O --pretrained groupmixformer_base.pth

D holds images/{training,validation} and annotations/{training,validation}. --pretrained is a classifier's weights, for
the backbone, or a segmenter's, for all of it. What a run starts from, and how it is gone on with, are as for train.py.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from segmentation.config import check, default_config
from utils.cli import config_from, make_parser, run

_log = logging.getLogger(__name__)


def main() -> None:
    """Parses, then trains, scores or measures."""
    parser = make_parser(__doc__, data="folder that holds images/ and annotations/")
    config = config_from(parser.parse_args(), default_config, check)

    # Torch and timm take seconds to import: a wrong key or flag is told of before.
    from segmentation.model import build_segmenter
    from segmentation.scoring import score_weights
    from segmentation.task import segmentation
    from utils.dist import join_world
    from utils.logger import setup_logging
    from utils.metrics import describe
    from utils.precision import choose_precision, choose_scoring_precision
    from utils.scoring import read_weights
    from utils.throughput import measure
    from utils.trainer import train

    with join_world(config.DEVICE, config.RANK_TIMEOUT) as world:
        setup_logging(world.is_main)
        if config.EVAL_MODE:
            precision = choose_scoring_precision(config, world.device)
            scored = score_weights(config, world, precision, read_weights(config))
            _log.info(f" * {describe(scored.score)}")
            return
        precision = choose_precision(config, world.device)
        if config.THROUGHPUT_MODE:
            network = build_segmenter(config, config.MODEL.GMA.NUM_CLASSES or 1)
            _log.info(measure(network, config, world.device, precision))
        else:
            train(config, world, precision, segmentation())


if __name__ == "__main__":
    run(main)
