"""What a file tells about itself: how to make its input, and what its answers mean."""

import json
from typing import Any

from data.transforms import eval_settings
from utils.trained import Trained


def information(trained: Trained, fused: bool, precision: str) -> dict[str, str]:
    """Texts by name, those of lists as JSON.

    Args:
        trained: What is exported.
        fused: Whether it was rewritten for inference.
        precision: Of its weights and arithmetic.
    """
    data, settings = trained.config.DATA, eval_settings(trained.config)
    values: dict[str, Any] = {
        "name": trained.config.MODEL.NAME,
        "checkpoint": trained.source.name,
        "weights": "moving average" if trained.is_ema else "trained",
        "precision": precision,
        "fused": fused,
        "input": "float32 [batch, channels, height, width]: pixels / 255, minus mean, over std, channel by channel",
        "output": "float32 [batch, classes]: logits",
        "channels": {1: "grey", 3: "RGB"}.get(trained.network.in_chans, trained.network.in_chans),
        "mean": list(data.MEAN),
        "std": list(data.STD),
        "size": data.IMG_SIZE,
        "interpolation": data.INTERPOLATION,
        "crop_pct": settings["crop_pct"],
        "crop_mode": settings["crop_mode"],
        "classes": trained.classes or [],
        "labels": trained.labels,
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
