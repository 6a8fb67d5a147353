"""The configuration of detection: the shared keys, and its own."""

import math

from yacs.config import CfgNode

from utils import config as shared
from utils.errors import UserError

GROUPS = 32  # of group norms
_CHOICES = {"MODEL.DETECTOR.NAME": ("mask_rcnn", "faster_rcnn", "retinanet")}
_RANGES: dict[str, tuple[float, float, str]] = {
    "DATA.LONG_SIDE": (32, math.inf, "pixels"),
    "MODEL.DETECTOR.FPN_CHANNELS": (1, math.inf, "channels"),
    "MODEL.DETECTOR.HEAD_WIDTH": (1, math.inf, "channels"),
    "MODEL.DETECTOR.PROPOSALS": (1, math.inf, "boxes"),
    "MODEL.DETECTOR.RPN_SAMPLES": (1, math.inf, "anchors"),
    "MODEL.DETECTOR.BOX_SAMPLES": (1, math.inf, "boxes"),
    "MODEL.DETECTOR.SCORE_THRESHOLD": (0, 1, "a share"),
    "MODEL.DETECTOR.NMS_THRESHOLD": (0, 1, "an overlap"),
    "MODEL.DETECTOR.MAX_DETECTIONS": (1, math.inf, "boxes"),
}


def default_config() -> CfgNode:
    """All keys, at the values of the customary 1x schedule on COCO."""
    config = shared.default_config()
    for name in ("DATASET", "TRAIN_SPLIT", "VAL_SPLIT", "IMG_SIZE", "INTERPOLATION", "LOADING"):
        del config.DATA[name]
    for name in set(config.AUG) - {"HFLIP", "COLOR_JITTER"}:
        del config.AUG[name]
    del config["TEST"], config["DISTILL"], config["THROUGHPUT_MODE"]
    del config.TRAIN["COMPILE"], config.MODEL["LABEL_SMOOTHING"], config.MODEL.GMA["NUM_CLASSES"]
    config.DATA.update(
        {
            "TRAIN_IMAGES": "train2017",  # a folder and a file in DATA_PATH
            "TRAIN_ANNOTATIONS": "annotations/instances_train2017.json",
            "VAL_IMAGES": "val2017",
            "VAL_ANNOTATIONS": "annotations/instances_val2017.json",
            "BATCH_SIZE": 2,  # on each rank, for one micro-batch
            "SHORT_SIDES": [800],  # pixels; training draws one of them for each image, evaluation takes the last
            "LONG_SIDE": 1333,  # pixels at most, where the short side has to give way
        }
    )
    config.MODEL.NAME = "detection"
    config.MODEL.FREEZE_STATISTICS = True  # of the backbone's batch norms; False: they follow the images
    config.MODEL.DETECTOR = CfgNode(
        {
            "NAME": "mask_rcnn",  # or faster_rcnn, which needs no masks, or retinanet
            "FPN_CHANNELS": 256,
            "ANCHOR_SIZES": [32, 64, 128, 256, 512],  # pixels, of the pyramid's levels from the finest on
            "ANCHOR_RATIOS": [0.5, 1.0, 2.0],  # height over width
            "HEAD_NORM": False,  # group norms in retinanet's heads, of which small ones learn faster
            "HEAD_WIDTH": 1024,  # of the others' box head; the next three are theirs too
            "PROPOSALS": 1000,  # that the second stage looks at; each level suggests as many, in training twice as many
            "RPN_SAMPLES": 256,  # anchors of an image that the first stage learns from at once
            "BOX_SAMPLES": 512,  # proposals of an image that the second stage learns from at once
            "SCORE_THRESHOLD": 0.05,  # least score of what is given out
            "NMS_THRESHOLD": 0.5,  # boxes of a class that overlap more than this are one
            "MAX_DETECTIONS": 100,  # of an image
        }
    )
    config.TRAIN.update(
        {
            "EPOCHS": 12,
            "WARMUP_EPOCHS": 0,
            "WARMUP_UPDATES": 500,
            "BASE_LR": 1e-4,
            "WARMUP_LR": 1e-7,
            "MIN_LR": 0.0,
            "LR_BATCH": 16,
            "CLIP_GRAD": 0.0,
        }
    )
    config.TRAIN.LR_SCHEDULER.NAME = "multistep"
    config.TRAIN.LR_SCHEDULER.MILESTONES = [8, 11]
    config.AUG.COLOR_JITTER = 0.0
    return config


def check(config: CfgNode) -> None:
    """Refuses values that cannot work, alone or together.

    Raises:
        UserError: Naming the key and what to do.
    """
    shared.check_shared(config, _CHOICES, _RANGES)
    sides, settings = config.DATA.SHORT_SIDES, config.MODEL.DETECTOR
    if not sides or min(sides) < 32:
        raise UserError(f"DATA.SHORT_SIDES is {sides}: give numbers of pixels, from 32 on")
    if max(sides) > config.DATA.LONG_SIDE:
        raise UserError(
            f"DATA.SHORT_SIDES is {sides}, above DATA.LONG_SIDE {config.DATA.LONG_SIDE}: raise that, or lower them"
        )
    if settings.HEAD_NORM and (settings.NAME != "retinanet" or settings.FPN_CHANNELS % GROUPS):
        raise UserError(
            f"MODEL.DETECTOR.HEAD_NORM is for retinanet with a multiple of {GROUPS} FPN_CHANNELS, and this is "
            f"{settings.NAME} with {settings.FPN_CHANNELS}: set it to False or change these"
        )
    for name in ("ANCHOR_SIZES", "ANCHOR_RATIOS"):
        if not settings[name] or min(settings[name]) <= 0:
            raise UserError(f"MODEL.DETECTOR.{name} is {settings[name]}: give numbers above 0")
