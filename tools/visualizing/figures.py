"""What the figures share: images in them, their panels, and how they are saved."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from utils.checkpoint import write_beside
from utils.cli import Parser, at_least, check_report
from utils.errors import UserError

_FORMATS = (".png", ".pdf", ".svg")
_EDGE = 0.04  # inches around a figure
_MOST_DPI = 1200  # beyond which large figures do not fit into memory


def add_figure_arguments(parser: Parser) -> None:
    """Adds --output, which `check_figure` checks, and --dpi."""
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help=f"{', '.join(_FORMATS)}: the figure")
    parser.add_argument(
        "--dpi", type=at_least(1, _MOST_DPI), default=160, metavar="N", help="pixels of a PNG on an inch (default 160)"
    )


def check_figure(path: Path) -> None:
    """Refuses a figure that cannot be written, before it is drawn.

    Raises:
        UserError: If it is in no folder, or of no known format.
    """
    check_report(path, "--output")
    if path.suffix.lower() not in _FORMATS:
        raise UserError(f"--output {path}: name a file that ends in {', '.join(_FORMATS)}")


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a figure in the format of the file's ending, whole or not at all."""
    style = {"format": path.suffix.lower().removeprefix("."), "bbox_inches": "tight", "pad_inches": _EDGE}
    write_beside(path, lambda beside: figure.savefig(beside, dpi=dpi, **style))


def show_image(axis: Axes, pixels: Tensor) -> None:
    """Draws an 8-bit image [C, H, W] of one or three channels."""
    image = pixels.cpu().permute(1, 2, 0)
    grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if image.shape[2] == 1 else {}
    axis.imshow(image.squeeze(2).numpy(), interpolation="nearest", extent=extent_of(pixels), **grey)
    bare(axis)


def extent_of(image: Tensor) -> tuple[float, float, float, float]:
    """matplotlib's `extent` that lays a map of any size over an image [..., H, W], pixels being of side 1."""
    height, width = image.shape[-2:]
    return 0, width, height, 0


def bare(axis: Axes) -> None:
    """Takes away the ticks."""
    axis.set_xticks([])
    axis.set_yticks([])


def outline(axis: Axes, box: tuple[float, float, float, float], **style: object) -> None:
    """Draws the edge of a box given by its top, left, bottom and right."""
    top, left, bottom, right = box
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, clip_on=False, **style))
