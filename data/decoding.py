"""Image files of every kind -> 8-bit pixels of the mode that the network takes."""

import numpy as np
from PIL import Image


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Decodes an image, all of it, into 8 bits a channel.

    Args:
        image: As PIL opens it: grey, RGB, CMYK, palette, 16-bit, with or without alpha, which is left out.
        mode: PIL's name, 'RGB' or 'L'.

    Raises:
        ValueError: If its pixels are floating-point numbers, which PIL would cut off outside of 0 to 255.
        Exception: Of any kind, from PIL's many decoders, if the file is broken.
    """
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, of no known range: write it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off above 255
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # as PIL asks for
    image.load()
    return image if image.mode == mode else image.convert(mode)
