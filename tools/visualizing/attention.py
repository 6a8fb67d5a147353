"""`attention`: how much of each token's value a chosen token takes, head by head."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from models.attention_maps import AttentionMap, attention_maps
from tools.visualizing.figures import bare, extent_of, outline, save_figure, show_image
from tools.visualizing.inputs import Inputs
from tools.visualizing.stages import choose_blocks
from utils.cli import Parser
from utils.errors import UserError
from utils.trained import Trained

_COLOURS = "RdBu_r"  # from negative over 0, which is white, to positive
_PANEL = 1.2  # inches


def add_attention_arguments(parser: Parser) -> None:
    """Adds the flags that are `attention`'s own."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    parser.add_argument(
        "--token",
        nargs=2,
        default=("0.5", "0.5"),
        metavar=("Y", "X"),
        help="the token at this place of the image as the network sees it: pixels from its top left corner, or with a "
        "point (0.25) shares of height and width (default: the middle)",
    )
    parser.add_argument("--stage", nargs="+", type=int, metavar="S", help="stages, from 0 (default: all)")
    parser.add_argument(
        "--block",
        nargs="+",
        default=["last"],
        metavar="B",
        help="their blocks, from 0, 'last' or 'all' (default: last)",
    )


def draw_attention(trained: Trained, arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """Draws the attention of a token.

    Returns:
        Lines to print.

    Raises:
        UserError: If there is no such stage, block, place or image.
    """
    blocks = choose_blocks(trained.network, arguments.stage, arguments.block)
    inputs = Inputs(trained.config, arguments.size, device)
    pixels = inputs.read(arguments.image)
    place = place_of(arguments.token, tuple(pixels.shape[1:]))
    maps = attention_maps(trained.network, inputs.batch(pixels), place, blocks)
    save_figure(attention_figure(pixels, maps), arguments.output, arguments.dpi)
    return [f"{name_of(each)}: token {each.token} of {shape_of(each)}" for each in maps]


def place_of(token: Sequence[str], shape: tuple[int, int]) -> tuple[float, float]:
    """The place that --token names, in shares of height and width.

    Args:
        token: Y and X, each a pixel's number, or with a point a share.
        shape: Height and width of the image.

    Raises:
        UserError: If it is no place in the image.
    """
    shares = []
    for text, pixels in zip(token, shape, strict=True):
        if re.fullmatch(r"\d+", text):
            shares.append((int(text) + 0.5) / pixels)
        elif re.fullmatch(r"\d*\.\d*\d|\d+\.", text):
            shares.append(float(text))
        else:
            raise UserError(f"--token {' '.join(token)}: {text} is neither a pixel's number nor a share such as 0.5")
    if max(shares) > 1:
        raise UserError(
            f"--token {' '.join(token)}: is not in the image of {shape[0]} x {shape[1]} pixels (height x width): "
            f"name pixels of it, or shares such as 0.5"
        )
    return shares[0], shares[1]


def attention_figure(pixels: Tensor, maps: Sequence[AttentionMap]) -> Figure:
    """A row for each map: the image with the token's cell, then every head with a colour scale of its own.

    Args:
        pixels: The image as the network sees it, 8-bit [C, H, W].
        maps: Of networks with one number of heads.
    """
    height, width = pixels.shape[1:]
    columns = 1 + len(maps[0].heads)
    row_height = _PANEL * height / width + 0.32
    figure = Figure(figsize=(_PANEL * columns + 0.9, row_height * len(maps) + 0.5), layout="compressed")
    axes = figure.subplots(len(maps), columns, squeeze=False)
    for row, each in zip(axes, maps, strict=True):
        box = _cell(each, height, width)
        show_image(row[0], pixels)
        outline(row[0], box, edgecolor="#00c853", linewidth=1.4)
        row[0].set_ylabel(f"{name_of(each)}\n{shape_of(each)}", fontsize=7)
        for axis, weights in zip(row[1:], each.weights.cpu(), strict=True):
            largest = float(weights.abs().max())
            limit = largest or 1.0
            place = {"extent": extent_of(pixels), "interpolation": "nearest"}
            axis.imshow(weights.numpy(), cmap=_COLOURS, vmin=-limit, vmax=limit, **place)
            bare(axis)
            outline(axis, box, edgecolor="black", linewidth=0.8)
            axis.set_xlabel(f"±{largest:.2g}   Σ {float(weights.sum()):.2g}", fontsize=7, labelpad=2)
    axes[0, 0].set_title("token", fontsize=8)
    for head, (axis, contents) in enumerate(zip(axes[0, 1:], maps[0].heads, strict=True)):
        axis.set_title(f"head {head}\n{contents}", fontsize=8)
    scale = figure.colorbar(ScalarMappable(Normalize(-1, 1), _COLOURS), ax=axes, aspect=40, pad=0.01, ticks=[-1, 0, 1])
    scale.ax.set_yticklabels(["-max", "0", "max"], fontsize=7)
    scale.set_label("weight; max: ± below each panel", fontsize=7)
    return figure


def _cell(each: AttentionMap, height: int, width: int) -> tuple[float, float, float, float]:
    (row, column), (rows, columns) = each.token, each.weights.shape[1:]
    cell_height, cell_width = height / rows, width / columns
    return row * cell_height, column * cell_width, (row + 1) * cell_height, (column + 1) * cell_width


def name_of(each: AttentionMap) -> str:
    """Which block it is, in words."""
    return f"stage {each.stage}, block {each.block}"


def shape_of(each: AttentionMap) -> str:
    """Rows and columns of the feature map."""
    return "{} x {} tokens".format(*each.weights.shape[1:])
