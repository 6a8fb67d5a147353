"""The crop of a training image as DATA.LOADING fast takes it: nearly PIL's pixels, in less time.

The rectangles are those that timm's random crop draws. What differs: the rectangle is cut out before anything is
converted, torch's 8-bit kernel resizes it, and a JPEG whose rectangle is at least twice as large as what is left of it
is decoded at a half, a quarter or an eighth of its size, which libjpeg does within its inverse cosine transform.
"""

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch.nn.functional import interpolate

from data.decoding import as_mode


class FastCut:
    """Decodes all of an image and cuts out the rectangle that the random crop draws.

    Args:
        crop: timm's.
        mode: PIL's, of what comes out.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation, mode: str) -> None:
        self._crop, self._mode, self._filter = crop, mode, str_to_pil_interp(crop.interpolation.value)

    def __call__(self, image: Image.Image) -> Image.Image:
        """The rectangle, as large as it is in the image, or resized where that is decoded at less than its size."""
        width, height = image.size
        top, left, rows, columns = self._crop.get_params(image, self._crop.scale, self._crop.ratio)
        edges = (left, top, left + columns, top + rows)
        shrink = min(rows // self._crop.size[0], columns // self._crop.size[1])
        drafted = image.draft(None, (width // shrink, height // shrink)) if shrink > 1 else None
        if not drafted:
            return as_mode(image.crop(edges), self._mode)
        scale = drafted[1][2] / width
        box = tuple(edge * scale for edge in edges)  # between pixels, which PIL can resize from and torch cannot
        return as_mode(image, self._mode).resize(self._crop.size[::-1], self._filter, box)


class FastResize:
    """Resizes what was cut out, where that is needed.

    Args:
        crop: timm's.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self._size, self._filter = crop.size, crop.interpolation.value

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image at the crop's size."""
        if image.size == self._size[::-1]:
            return image
        if 0 in image.size:  # of an image of a few pixels timm may draw none, which PIL resizes to black
            return Image.new(image.mode, self._size[::-1])
        pixels = torch.from_numpy(np.array(image)).view(1, image.height, image.width, -1)
        resized = interpolate(pixels.permute(0, 3, 1, 2), self._size, mode=self._filter, antialias=True)
        return Image.fromarray(resized[0].permute(1, 2, 0).squeeze(-1).numpy())  # lies in memory as PIL's images do
