"""`cam`: where the evidence for a class lies (Grad-CAM, Selvaraju et al., 2017, https://arxiv.org/abs/1610.02391)."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from models.groupmixformer import GroupMixFormer
from tools.visualizing.figures import extent_of, save_figure, show_image
from tools.visualizing.inputs import Inputs
from tools.visualizing.stages import check_stage
from utils.cli import Parser
from utils.errors import UserError, listing
from utils.trained import Trained

_COLOURS = "turbo"
_OPACITY = 0.5
_LABEL = 20  # letters of a label
_MOST_COLUMNS = 8
_PANEL = 1.6  # inches


@dataclass(frozen=True)
class Activation:
    """The evidence for a class in an image.

    Attributes:
        label: What the class is called.
        probability: That the network gives it.
        evidence: Grad-CAM's map laid over the image, not negative, [H, W].
    """

    label: str
    probability: float
    evidence: Tensor


def add_cam_arguments(parser: Parser) -> None:
    """Adds the flags that are `cam`'s own."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        metavar="C",
        help="name, label or number of a class; may be given again (default: the one the network finds likeliest)",
    )
    parser.add_argument(
        "--stage", type=int, metavar="S", help="stage whose output is looked at, from 0 (default: the last)"
    )


def draw_cam(trained: Trained, arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """Draws class-activation maps.

    Returns:
        Lines to print.

    Raises:
        UserError: If there is no such stage, class or image.
    """
    stage = len(trained.network.stages) - 1 if arguments.stage is None else arguments.stage
    check_stage(trained.network, stage)
    numbers = [class_number(text, trained.classes, trained.labels) for text in arguments.classes or []]
    inputs = Inputs(trained.config, arguments.size, device)
    images = [inputs.read(path) for path in arguments.images]
    found = [
        activations(trained, inputs.batch(pixels), numbers, stage)
        for pixels in tqdm(images, "Grad-CAM", unit=" images", disable=None)
    ]
    save_figure(cam_figure(images, found, stage), arguments.output, arguments.dpi)
    return [
        f"{path}: " + ", ".join(f"{each.label} ({each.probability:.1%})" for each in of_image)
        for path, of_image in zip(arguments.images, found, strict=True)
    ]


def class_number(text: str, classes: list[str] | None, labels: list[str]) -> int:
    """The number of a class from its name, its label or one of the words that a label lists, or its number.

    Args:
        text: What the user calls it.
        classes: Names by number, or None where they are not known.
        labels: Labels by number.

    Raises:
        UserError: If there is none or more than one.
    """
    wanted = text.casefold()
    ways = (
        [i for i, name in enumerate(classes or []) if name == text],
        [i for i, label in enumerate(labels) if label.casefold() == wanted],
        [i for i, label in enumerate(labels) if wanted in [word.strip().casefold() for word in label.split(",")]],
        [int(text)] if text.isdecimal() and int(text) < len(labels) else [],
    )
    found = next(filter(None, ways), [])
    if not found:
        raise UserError(f"--class {text}: is no class; name one such as {listing(labels)}, or 0 to {len(labels) - 1}")
    if len(found) > 1:
        raise UserError(f"--class {text}: may be any of the classes {listing(list(map(str, found)))}: give the number")
    return found[0]


def activations(trained: Trained, image: Tensor, numbers: Sequence[int], stage: int) -> list[Activation]:
    """The evidence for some classes in an image.

    Args:
        trained: The classifier.
        image: The network's input, [1, in_chans, H, W].
        numbers: The classes; the likeliest if empty.
        stage: Whose output is looked at.
    """
    with torch.no_grad():
        probabilities = trained.network(image)[0].softmax(dim=0)
    return [
        Activation(
            trained.labels[number], float(probabilities[number]), grad_cam(trained.network, image, number, stage)
        )
        for number in numbers or [int(probabilities.argmax())]
    ]


def grad_cam(network: GroupMixFormer, image: Tensor, number: int, stage: int) -> Tensor:
    """Captum's Grad-CAM of a stage's output, with negative evidence cut off and interpolated to the image's size.

    Args:
        network: In evaluation mode.
        image: The network's input, [1, in_chans, H, W].
        number: The class.
        stage: Number of the stage, from 0.

    Returns:
        The map, [H, W].

    Raises:
        UserError: If captum is missing.
    """
    try:
        from captum.attr import LayerAttribution, LayerGradCam
    except ImportError:
        raise UserError("captum is missing: pip install -r requirements-downstream.txt") from None
    layer = LayerGradCam(network, network.stages[stage])
    attribution = layer.attribute(image, target=number, relu_attributions=True).detach()
    return LayerAttribution.interpolate(attribution, tuple(image.shape[2:]), interpolate_mode="bilinear")[0, 0]


def cam_figure(images: Sequence[Tensor], found: Sequence[Sequence[Activation]], stage: int) -> Figure:
    """Each image as the network sees it, and then with the evidence for each class laid over it.

    Args:
        images: 8-bit [C, H, W].
        found: For each image the same number of activations.
        stage: Whose output was looked at.
    """
    panels = 1 + len(found[0])  # of an image
    groups = min(max(_MOST_COLUMNS // panels, 1), len(images))
    rows, columns = -(-len(images) // groups), groups * panels
    tallest = max(pixels.shape[1] / pixels.shape[2] for pixels in images)
    size = (_PANEL * columns + 0.8, (_PANEL * tallest + 0.3) * rows)
    figure = Figure(figsize=size, layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flatten():
        axis.set_axis_off()
    for i, (pixels, of_image) in enumerate(zip(images, found, strict=True)):
        first = i % groups * panels
        row = axes[i // groups, first : first + panels]
        show_image(row[0], pixels)
        for axis, each in zip(row[1:], of_image, strict=True):
            _overlay(axis, pixels, each)
    colours = ScalarMappable(Normalize(0, 1), _COLOURS)
    scale = figure.colorbar(colours, ax=axes, aspect=20 * rows, pad=0.01, ticks=[0, 1])
    scale.ax.set_yticklabels(["0", "max"], fontsize=7)
    scale.set_label(f"Grad-CAM, stage {stage}", fontsize=7)
    return figure


def _overlay(axis: Axes, pixels: Tensor, each: Activation) -> None:
    show_image(axis, pixels)
    largest = float(each.evidence.max())
    heat = (each.evidence / (largest or 1.0)).cpu().numpy()
    axis.imshow(heat, cmap=_COLOURS, vmin=0, vmax=1, alpha=_OPACITY, extent=extent_of(pixels))
    nothing = "" if largest else "\nno evidence for it"
    label = each.label if len(each.label) <= _LABEL else each.label[: _LABEL - 1] + "…"
    axis.set_title(f"{label} ({each.probability:.1%}){nothing}", fontsize=8, parse_math=False)
