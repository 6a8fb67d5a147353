"""`receptive-field`: which pixels the middle unit of a stage's output answers to, on average over images."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from data.files import find_images, spread
from models.build import build_model
from models.groupmixformer import GroupMixFormer
from models.receptive_fields import middle_pixel, receptive_fields, square_around
from tools.visualizing.figures import bare, extent_of, outline, save_figure
from tools.visualizing.inputs import Inputs
from tools.visualizing.stages import check_stage
from utils.cli import Parser, at_least
from utils.console import markdown_table
from utils.errors import UserError
from utils.seeding import seed_everything
from utils.trained import Trained

SHARES = (0.2, 0.5, 0.95)  # of the gradient, that squares are drawn around
_STYLES = ("-", "--", ":")  # of their edges
_COLOURS = "magma"
_FLOOR = 1e-4  # of the largest gradient: what is darkest
_PANEL = 2.1  # inches


def add_receptive_field_arguments(parser: Parser) -> None:
    """Adds the flags that are `receptive-field`'s own."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="image files and folders of them")
    parser.add_argument("--stage", nargs="+", type=int, metavar="S", help="stages, from 0 (default: all)")
    parser.add_argument(
        "--images",
        dest="most",
        type=at_least(1),
        default=50,
        metavar="N",
        help="how many images to average over (default 50)",
    )
    parser.add_argument("--untrained", action="store_true", help="beside the same network with fresh weights")


def draw_receptive_field(trained: Trained, arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """Draws effective receptive fields.

    Returns:
        Lines to print.

    Raises:
        UserError: If there is no such stage or image, or images differ in size.
    """
    stages = list(dict.fromkeys(arguments.stage or range(len(trained.network.stages))))
    for stage in stages:
        check_stage(trained.network, stage)
    files = spread(find_images(arguments.images), arguments.most)
    networks = {"trained": trained.network}
    if arguments.untrained:
        seed_everything(trained.config.SEED)
        networks["fresh weights"] = build_model(trained.config, trained.network.num_classes).eval().to(device)
    fields = average_fields(list(networks.values()), stages, files, Inputs(trained.config, arguments.size, device))
    middles = [middle_pixel(fields.shape[2:], trained.network.feature_info[stage]["reduction"]) for stage in stages]
    save_figure(field_figure(fields, list(networks), stages, middles), arguments.output, arguments.dpi)
    return table(fields, list(networks), stages, middles, len(files))


def average_fields(
    networks: Sequence[GroupMixFormer], stages: Sequence[int], files: Sequence[Path], inputs: Inputs
) -> Tensor:
    """The fields of some stages of some networks, [networks, stages, H, W], on average over images.

    Raises:
        UserError: If images differ in size.
    """
    total, shape = torch.zeros(()), None
    for path in tqdm(files, "receptive fields", unit=" images", disable=None):
        pixels = inputs.read(path)
        shape = shape or pixels.shape
        if pixels.shape != shape:
            height, width = pixels.shape[1:]
            raise UserError(f"{path} is {height} x {width} pixels and the images before it are not: give a --size")
        image = inputs.batch(pixels)
        total = total + torch.stack([receptive_fields(network, image, stages) for network in networks]).cpu().double()
    return total / len(files)


def field_figure(
    fields: Tensor, names: Sequence[str], stages: Sequence[int], middles: Sequence[tuple[int, int]]
) -> Figure:
    """A row for each network and a column for each stage, on one logarithmic scale, each from its largest gradient.

    Args:
        fields: [networks, stages, H, W].
        names: Of the networks.
        stages: Their numbers.
        middles: The pixel that each stage's unit is centred at.
    """
    height, width = fields.shape[2:]
    rows, columns = len(names), len(stages)
    size = (_PANEL * columns + 1.0, (_PANEL * height / width + 0.45) * rows)
    figure = Figure(figsize=size, layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, name, of_network in zip(axes, names, fields, strict=True):
        row[0].set_ylabel(name, fontsize=9)
        for axis, stage, middle, field in zip(row, stages, middles, of_network, strict=True):
            shown = (field / field.max()).clamp(min=_FLOOR).numpy()
            place = {"extent": extent_of(field), "interpolation": "nearest"}
            image = axis.imshow(shown, cmap=_COLOURS, norm=LogNorm(_FLOOR, 1), **place)
            bare(axis)
            sides = []
            for share, style in zip(SHARES, _STYLES, strict=True):
                box = square_around(field, middle, share)
                outline(axis, box, edgecolor="white", linewidth=0.9, linestyle=style)
                sides.append(f"{share:.0%}: {side_of(box)}")
            axis.set_title(f"stage {stage}", fontsize=9)
            axis.set_xlabel(", ".join(sides) + " px", fontsize=8)
    scale = figure.colorbar(image, ax=axes, aspect=20 * rows, pad=0.01)
    scale.set_label("|gradient| / its largest", fontsize=8)
    scale.ax.tick_params(labelsize=7)
    return figure


def table(
    fields: Tensor, names: Sequence[str], stages: Sequence[int], middles: Sequence[tuple[int, int]], images: int
) -> list[str]:
    """The squares in figures: side in pixels, and part of the image's area."""
    height, width = fields.shape[2:]
    rows = [["network", "stage", *(f"{share:.0%}" for share in SHARES)]]
    for name, of_network in zip(names, fields, strict=True):
        for stage, middle, field in zip(stages, middles, of_network, strict=True):
            boxes = [square_around(field, middle, share) for share in SHARES]
            parts = [(box[2] - box[0]) * (box[3] - box[1]) / (height * width) for box in boxes]
            cells = [f"{side_of(box)} px, {part:.1%}" for box, part in zip(boxes, parts, strict=True)]
            rows.append([name, str(stage), *cells])
    return [
        f"squares around the middle unit that hold a share of its gradient, over {images} images "
        f"of {height} x {width} pixels (height x width)",
        markdown_table(rows),
    ]


def side_of(box: tuple[int, int, int, int]) -> int:
    """The longer side of a square that ends where the image does."""
    return max(box[2] - box[0], box[3] - box[1])
