"""The configuration of segmentation: the shared keys, and its own."""

import math

from yacs.config import CfgNode

from utils import config as shared
from utils.errors import UserError

_CHOICES = {"MODEL.DECODER.NAME": ("upernet", "fpn")}
_RANGES: dict[str, tuple[float, float, str]] = {
    "DATA.SHORT_SIDE": (0, math.inf, "pixels, 0 to leave images as they are"),
    "DATA.LONG_SIDE": (1, math.inf, "pixels"),
    "MODEL.DECODER.CHANNELS": (1, math.inf, "channels"),
    "MODEL.DECODER.DROPOUT": (0, 0.999, "a probability"),
    "MODEL.DECODER.AUX_CHANNELS": (1, math.inf, "channels"),
    "MODEL.DECODER.AUX_WEIGHT": (0, math.inf, "a weight, 0 for no auxiliary head"),
    "AUG.CAT_MAX_RATIO": (0, 1, "a share"),
    "AUG.PHOTOMETRIC": (0, 1, "a probability"),
    "TRAIN.EPOCH_UPDATES": (0, math.inf, "updates, 0 for a pass over the data"),
    "TEST.WINDOW": (32, math.inf, "pixels"),
    "TEST.STRIDE": (1, math.inf, "pixels"),
}
_FPN_CHANNELS = 128  # halved, two for each of the 32 groups of Semantic FPN's norms, which can then do with one pixel


def default_config() -> CfgNode:
    """All keys, at the values of the field's recipe for UperNet on ADE20K wherever it states one."""
    config = shared.default_config()
    for name in ("DATASET", "INTERPOLATION", "LOADING"):
        del config.DATA[name]
    del config.MODEL["LABEL_SMOOTHING"], config["DISTILL"]
    config.DATA.update(
        {
            "TRAIN_SPLIT": "training",  # folder of images/ and of annotations/
            "VAL_SPLIT": "validation",
            "BATCH_SIZE": 2,  # on each rank, for one micro-batch
            "IMG_SIZE": 512,  # side of the training crops
            "SHORT_SIDE": 512,  # that images are scaled to, in training times AUG.SCALE; 0: as they are
            "LONG_SIDE": 2048,  # at most, where SHORT_SIDE is not 0
            "REDUCE_ZERO_LABEL": True,  # label 0 is no class, label 1 the first one; False: label 0 is the first one
        }
    )
    config.MODEL.GMA.NUM_CLASSES = 150  # 0: as many as the data's classes.txt names
    config.MODEL.DECODER = CfgNode(
        {
            "NAME": "upernet",  # or fpn: Semantic FPN
            "CHANNELS": 512,  # of the pyramid
            "DROPOUT": 0.1,  # before the classifier
            "AUX_CHANNELS": 256,  # of a head on the third stage, in training
            "AUX_WEIGHT": 0.4,  # of its loss; 0: no such head
        }
    )
    config.AUG = CfgNode(
        {
            "SCALE": [0.5, 2.0],  # of the size that evaluation looks at, at random
            "CAT_MAX_RATIO": 0.75,  # share of a crop that one class may have, as far as ten tries find such a crop
            "HFLIP": 0.5,
            "PHOTOMETRIC": 0.5,  # probability of each change: of brightness, contrast, saturation, hue
        }
    )
    config.TEST = CfgNode(
        {
            "MULTI_SCALE": False,
            "SCALES": [0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
            "FLIP": True,  # with MULTI_SCALE: mirrored images, too
            "SLIDING_WINDOW": False,
            "WINDOW": 512,
            "STRIDE": 341,
        }
    )
    config.TRAIN.EPOCH_UPDATES = 16000  # of an epoch, after which it is scored; 0: a pass over the data
    config.TRAIN.update({"EPOCHS": 10, "WARMUP_EPOCHS": 0, "WARMUP_UPDATES": 1500})
    config.TRAIN.update({"BASE_LR": 6e-5, "WARMUP_LR": 0.0, "MIN_LR": 0.0, "LR_BATCH": 16})
    config.TRAIN.update({"WEIGHT_DECAY": 0.01, "CLIP_GRAD": 0.0})
    config.TRAIN.LR_SCHEDULER.NAME = "linear"
    return config


def check(config: CfgNode) -> None:
    """Refuses values that cannot work, alone or together.

    Raises:
        UserError: Naming the key and what to do.
    """
    shared.check_shared(config, _CHOICES, _RANGES)
    decoder, scale, test = config.MODEL.DECODER, config.AUG.SCALE, config.TEST
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise UserError(f"AUG.SCALE is {scale}: give a lower and an upper bound above 0")
    if not test.SCALES or min(test.SCALES) <= 0:
        raise UserError(f"TEST.SCALES is {test.SCALES}: give numbers above 0")
    if test.STRIDE > test.WINDOW:
        raise UserError(f"TEST.STRIDE {test.STRIDE} is more than TEST.WINDOW {test.WINDOW}: pixels would be left out")
    if config.MODEL.GMA.NUM_STAGES != 4:
        raise UserError(f"MODEL.GMA.NUM_STAGES is {config.MODEL.GMA.NUM_STAGES}: the decoders take 4 stages")
    if decoder.NAME == "fpn" and decoder.CHANNELS % _FPN_CHANNELS:
        raise UserError(
            f"MODEL.DECODER.CHANNELS {decoder.CHANNELS} does not fit fpn's group norms: use a multiple of "
            f"{_FPN_CHANNELS}"
        )
