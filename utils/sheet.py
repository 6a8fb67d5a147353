"""A contact sheet: pictures in a grid of equal cells, each with caption lines below it; and the writing of PNGs."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from utils.checkpoint import write_beside

RIGHT, WRONG, PLAIN = "#1a7f37", "#c62828", "#202020"  # colours of captions
_MARGIN = 10  # pixels
_SMALLEST_FONT = 11  # pixels
_WHITE = "#ffffff"


def contact_sheet(
    pictures: Sequence[tuple[Image.Image, Sequence[tuple[str, str]]]], columns: int, size: int = 192
) -> Image.Image:
    """Draws pictures in rows, from left to right, each scaled to fit into a square, and its captions below it.

    Args:
        pictures: Images of any mode and size, each with its caption lines and their colours, as PIL takes them. Lines
            wider than a cell end in an ellipsis. Images of more than 8 bits a channel are drawn from their least value
            in black to their greatest in white.
        columns: Pictures of a row, at least 1; fewer where there are fewer pictures.
        size: Width of a cell and side of its square, in pixels.

    Returns:
        The sheet, in RGB.
    """
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns) if columns else 0
    font = _font(size)
    line_height = sum(font.getmetrics())
    heights = [
        size + line_height * max(len(lines) for _, lines in pictures[row * columns : (row + 1) * columns])
        for row in range(rows)
    ]
    sheet = Image.new("RGB", (columns * (size + _MARGIN) + _MARGIN, sum(heights) + (rows + 1) * _MARGIN), _WHITE)
    draw = ImageDraw.Draw(sheet)
    for number, (image, lines) in enumerate(pictures):
        row, column = divmod(number, columns)
        left, top = _MARGIN + column * (size + _MARGIN), sum(heights[:row]) + (row + 1) * _MARGIN
        fitted = _fit(image, size)
        sheet.paste(fitted, (left + (size - fitted.width) // 2, top + (size - fitted.height) // 2))
        for i, (line, colour) in enumerate(lines):
            draw.text((left, top + size + i * line_height), _shorten(line, font, size), colour, font)
    return sheet


def write_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all.

    Raises:
        UserError: If it cannot be written.
    """
    write_beside(path, lambda beside: image.save(beside, format="PNG", optimize=True))


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG, whole or not at all.

    Raises:
        UserError: If it cannot be written.
    """
    write_beside(path, lambda beside: FigureCanvasAgg(figure).print_png(str(beside)))


def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own font, which has Greek and Cyrillic letters, too; a letter that it lacks is drawn as a box."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), max(_SMALLEST_FONT, size // 15))


def _fit(image: Image.Image, size: int) -> Image.Image:
    """An image in RGB, on white where it is transparent, whose longer side is `size` pixels."""
    if image.mode.startswith(("I", "F")):
        image = _stretch(image)
    if image.mode == "La":  # which PIL converts to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    scale = size / max(image.size)
    wanted = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.convert("RGB").resize(wanted, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _stretch(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of a line as is no wider than so many pixels, with an ellipsis where that is not all."""
    line = " ".join(line.encode(errors="replace").decode().split())  # names of files may hold what is no text
    if font.getlength(line) <= width:
        return line
    longer = bisect_right(range(len(line)), width, lo=1, key=lambda end: font.getlength(line[:end].rstrip() + "…"))
    return line[: longer - 1].rstrip() + "…"
