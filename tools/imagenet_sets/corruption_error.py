"""The errors that ImageNet-C is scored by: of a corruption, and their mean (https://arxiv.org/abs/1903.12261).

Errors are shares of images, of each severity; what comes out are percentages of AlexNet's.
"""

import math
from collections.abc import Sequence

SEVERITIES = (1, 2, 3, 4, 5)

# AlexNet's top-1 error under each corruption, the mean over the severities, as all who print an mCE divide by.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
ALEXNET_CLEAN_ERROR = 0.4345  # on the images before they were corrupted


def corruption_error(corruption: str, errors: Sequence[float]) -> float:
    """CE: a network's errors over AlexNet's, in percent.

    Args:
        corruption: One of `ALEXNET_ERRORS`.
        errors: The network's top-1 error at each severity.
    """
    return 100 * (math.fsum(errors) / (len(SEVERITIES) * ALEXNET_ERRORS[corruption]))


def relative_corruption_error(corruption: str, errors: Sequence[float], clean_error: float) -> float:
    """Relative CE: how much a corruption adds to a network's error, over what it adds to AlexNet's, in percent.

    Args:
        corruption: One of `ALEXNET_ERRORS`.
        errors: The network's top-1 error at each severity.
        clean_error: Its top-1 error on the images before they were corrupted.
    """
    added = math.fsum(error - clean_error for error in errors)
    return 100 * (added / (len(SEVERITIES) * (ALEXNET_ERRORS[corruption] - ALEXNET_CLEAN_ERROR)))
