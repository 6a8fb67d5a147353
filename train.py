"""Train GroupMixFormer, or fine-tune it.

Usage:
    python train.py --cfg configs/groupmixformer_small.yaml --data-path D --batch-size 64 --output O --tag T
    torchrun --nproc_per_node 8 train.py --cfg configs/groupmixformer_small.yaml --data-path D --output O --tag T

What a run starts from, the first that applies:
    1. --resume FILE: that checkpoint, wherever it is from; or the newest of a run that this command itself started.
    2. The newest checkpoint in <output>/<MODEL.NAME>/<tag>/, unless TRAIN.AUTO_RESUME is False: the same command goes
       on where it was.
    3. --pretrained FILE: its weights, a fresh optimizer, epoch 0.
    4. Fresh weights.
A checkpoint of a run with other settings, or on another number of ranks, is refused unless --allow-changes or --elastic
says otherwise.
"""

import logging

from utils.cli import config_from, make_parser, run

_log = logging.getLogger(__name__)


def main() -> None:
    """Parses, then trains, scores or measures."""
    config = config_from(make_parser("Train GroupMixFormer, or fine-tune it.").parse_args())

    # Torch and timm take seconds to import: a wrong key or flag is told of before.
    from models.build import build_model
    from utils.classification import classification
    from utils.dist import join_world
    from utils.logger import setup_logging
    from utils.metrics import describe
    from utils.precision import choose_precision, choose_scoring_precision
    from utils.scoring import read_weights, score_weights
    from utils.throughput import measure
    from utils.trainer import train

    with join_world(config.DEVICE, config.RANK_TIMEOUT) as world:
        setup_logging(world.is_main)
        if config.EVAL_MODE:
            precision = choose_scoring_precision(config, world.device)
            score = score_weights(config, world, precision, read_weights(config)).score
            _log.info(f" * {describe(score)}")
            return
        precision = choose_precision(config, world.device)
        if config.THROUGHPUT_MODE:
            network = build_model(config, config.MODEL.GMA.NUM_CLASSES)
            _log.info(measure(network, config, world.device, precision))
        else:
            train(config, world, precision, classification())


if __name__ == "__main__":
    run(main)
