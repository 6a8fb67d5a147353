"""Pictures of what a network answers: label maps with a palette; image, truth, prediction and errors side by side."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from segmentation.data import PairSource
from segmentation.labels import IGNORE, to_label_map
from segmentation.metrics import SegmentationScore
from utils.checkpoint import write_beside
from utils.errors import OneRankError, UserError
from utils.metrics import Sums

_GOLDEN = 0.5 * (5**0.5 - 1)  # of the circle of hues, from one class to the next: no two are ever near
_FIRST_HUE = 0.6  # blue, as errors are red
_SATURATIONS, _VALUES = (0.85, 0.55, 1.0), (0.95, 0.7)  # in turn
_MOST_NAMES = 24  # in a legend, those of the largest classes
_LONGEST_NAME = 24  # letters in a legend
_SIDE, _LEAST_WIDTH = 2.6, 1.3  # inches of a panel's longer side, and of its width
_BETWEEN, _TITLE, _LINE = 0.1, 0.25, 0.17  # inches between panels, above them, and of a line of the legend
_ROWS = 4  # of the overview
_DIM = 0.35  # brightness of the image below its errors
_RED = (230, 40, 40)


def palette(count: int) -> np.ndarray:
    """Colours that tell classes apart: [count, 3], uint8."""
    numbers = np.arange(count)
    hues = (_FIRST_HUE + numbers * _GOLDEN) % 1
    saturations, values = np.take(_SATURATIONS, numbers % 3), np.take(_VALUES, numbers // 3 % 2)
    return np.rint(255 * hsv_to_rgb(np.stack([hues, saturations, values], axis=1))).astype(np.uint8)


def label_map_image(classes: np.ndarray, count: int, reduce_zero_label: bool) -> Image.Image:
    """Class numbers [H, W] as a picture with a palette, whose numbers are the data set's labels; no class is black."""
    image = Image.fromarray(to_label_map(classes, reduce_zero_label), mode="P")
    colours = np.zeros((256, 3), np.uint8)
    first = int(reduce_zero_label)
    colours[first : first + count] = palette(count)
    image.putpalette(colours.flatten().tolist())
    return image


def draw_comparison(image: Image.Image, truth: np.ndarray, prediction: np.ndarray, names: list[str]) -> Figure:
    """Image, truth, prediction and errors side by side, over the names of the largest classes.

    Args:
        image: RGB or grey.
        truth: Class numbers [H, W], IGNORE where there is none.
        prediction: Class numbers [H, W].
        names: By class number.
    """
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(names)] = palette(len(names))
    wrong, labelled = (truth != prediction) & (truth != IGNORE), truth != IGNORE
    errors = np.asarray(image.convert("L").convert("RGB")) * _DIM
    errors[wrong] = _RED
    share = 100 * wrong.sum() / max(labelled.sum(), 1)
    panels = {
        "image": np.asarray(image.convert("RGB")),
        "truth": colours[truth],
        "prediction": colours[prediction],
        f"errors: {share:.1f} %": errors.astype(np.uint8),
    }
    counts = np.bincount(truth.flatten(), minlength=256) + np.bincount(prediction.flatten(), minlength=256)
    shown = sorted(np.argsort(-counts[: len(names)], kind="stable")[:_MOST_NAMES])
    labels = [names[number][:_LONGEST_NAME] for number in shown if counts[number]]
    patches = [Patch(color=colours[number] / 255) for number in shown if counts[number]]

    scale = _SIDE / max(image.size)
    panel_width = max(scale * image.width, _LEAST_WIDTH)
    width = len(panels) * (panel_width + _BETWEEN)
    columns = max(int(width / (0.55 + 0.06 * max(map(len, labels), default=0))), 1)
    below = _LINE * -(-len(patches) // columns) + 2 * _BETWEEN
    height = _TITLE + scale * image.height + below
    edges = {
        "left": _BETWEEN / 2 / width,
        "right": 1 - _BETWEEN / 2 / width,
        "bottom": below / height,
        "top": 1 - _TITLE / height,
        "wspace": _BETWEEN / panel_width,
    }
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, len(panels), gridspec_kw=edges)
    for axis, (title, pixels) in zip(axes, panels.items(), strict=True):
        axis.imshow(pixels, interpolation="nearest")
        axis.set_title(title, fontsize=8, pad=3)
        axis.set_axis_off()
    legend = figure.legend(
        patches, labels, loc="lower center", ncol=columns, fontsize=7, frameon=False, borderaxespad=0.2
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # of what stands between two dollar signs
    return figure


class PictureSums:
    """Adds up a score, and writes pictures to a folder: labels/<name>.png of each answer, and comparisons/<name>.png.

    Args:
        sums: Add up the score.
        source: What is scored.
        indices: Of the images, in the order in which they are scored.
        folder: Where to.
        compared: So many of the source's first images have a comparison.
        names: By class number.
        reduce_zero_label: As in `to_classes`.
    """

    def __init__(
        self,
        sums: Sums,
        source: PairSource,
        indices: Iterator[int],
        folder: Path,
        compared: int,
        names: list[str],
        reduce_zero_label: bool,
    ) -> None:
        self._sums, self._source, self._indices, self._folder = sums, source, indices, folder
        self._compared, self._names, self._reduce_zero_label = compared, names, reduce_zero_label

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds a batch, and draws it.

        Raises:
            OneRankError: If a picture cannot be written.
        """
        self._sums.add(outputs, targets)
        try:
            self._draw(outputs, targets)
        except UserError as error:
            raise OneRankError(str(error)) from None

    def _draw(self, outputs: Tensor, targets: Tensor) -> None:
        predictions = outputs.argmax(dim=1).cpu().numpy().astype(np.uint8)
        for prediction, truth in zip(predictions, targets.cpu().numpy(), strict=True):
            index = next(self._indices)
            name = self._source.stem(index).with_suffix(".png")
            labels = label_map_image(prediction, len(self._names), self._reduce_zero_label)
            _write(self._folder / "labels" / name, labels.save)
            if index < self._compared:
                (image, _), _ = self._source.read(index)
                comparison = draw_comparison(image, truth, prediction, self._names)
                _write(self._folder / "comparisons" / name, _rendered(comparison).save)

    def total(self) -> SegmentationScore:
        """The score over all ranks; every rank must ask."""
        return self._sums.total()


def draw_overview(folder: Path, source: PairSource, compared: int) -> None:
    """Puts the comparisons of the first few images below one another, as overview.png beside them.

    Args:
        folder: Where `PictureSums` wrote its pictures.
        source: What was scored.
        compared: As `PictureSums` was given.

    Raises:
        UserError: If it cannot be written.
    """
    names = [source.stem(index).with_suffix(".png") for index in range(min(len(source), compared, _ROWS))]
    rows = [Image.open(folder / "comparisons" / name).convert("RGB") for name in names]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, ((sheet.width - row.width) // 2, top))
        top += row.height
    _write(folder / "overview.png", sheet.save)


def _rendered(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _write(path: Path, save: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made ({error.strerror}): choose another --save-pictures") from None
    write_beside(path, lambda beside: save(str(beside), format="PNG"))
