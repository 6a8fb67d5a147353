"""Pictures of what is in images, and of what was found there."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps, font_manager
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid
from tqdm import tqdm

from data.decoding import as_mode
from detection.coco import categories, decode_mask
from utils.errors import UserError
from utils.sheet import write_png

_SHORT_SIDE = 288  # pixels, that smaller images are enlarged to
_CELL = (224, 458)  # height and width of a picture in the overview
_COLUMNS, _ROWS = 3, 5  # of the overview
_BETWEEN = 10  # pixels
_COLOURS = colormaps["tab10"].colors + colormaps["Dark2"].colors


def save_pictures(
    folder: Path,
    images: Path,
    coco: COCO,
    results: Sequence[dict[str, Any]],
    most: int,
    least_score: float,
    with_masks: bool,
) -> None:
    """Writes comparisons/<number>-<name>.png of each of the first images, what is in it on the left and what was found
    on the right, and overview.png of the first few.

    Args:
        folder: Where to.
        images: The folder of the images.
        coco: What is in them.
        results: What was found, in the form of COCO's results.
        most: Number of images.
        least_score: Score from which something found is drawn.
        with_masks: Whether masks are drawn, which everything must have then.

    Raises:
        UserError: If they cannot be written.
    """
    comparisons = folder / "comparisons"
    try:
        comparisons.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): name another folder") from None
    found = defaultdict(list)
    for result in results:
        if result["score"] >= least_score:
            found[result["image_id"]].append(result)
    names, pairs = categories(coco), []
    for number, entry in enumerate(tqdm(coco.dataset["images"][:most], "pictures", disable=None)):
        pixels = F.pil_to_tensor(as_mode(Image.open(images / entry["file_name"]), "RGB"))
        sides = [draw(pixels, marks, names, with_masks) for marks in (coco.imgToAnns[entry["id"]], found[entry["id"]])]
        white = torch.full((3, sides[0].shape[1], _BETWEEN), 255, dtype=torch.uint8)
        pairs.append(torch.cat([sides[0], white, sides[1]], dim=2))
        stem = Path(entry["file_name"]).stem  # of which several images may have one, below folders of any place
        write_png(F.to_pil_image(pairs[-1]), comparisons / f"{number:03d}-{stem}.png")
    cells = [_fit(pair) for pair in pairs[: _COLUMNS * _ROWS]]
    sheet = make_grid(cells, min(_COLUMNS, len(cells)), padding=_BETWEEN, pad_value=255)
    write_png(F.to_pil_image(sheet), folder / "overview.png")


def draw(pixels: Tensor, marks: Sequence[dict[str, Any]], names: dict[Any, str], with_masks: bool) -> Tensor:
    """Draws boxes, masks where they are asked for, names, and scores where there are some.

    Args:
        pixels: The image, 8 bits, [3, H, W].
        marks: Annotations or results of COCO's form.
        names: Of the categories, by id.
        with_masks: As `save_pictures` was given.

    Returns:
        The picture, enlarged where it is small.
    """
    _, height, width = pixels.shape
    scale = max(_SHORT_SIDE / min(height, width), 1.0)
    pixels = F.resize(pixels, [round(height * scale), round(width * scale)])
    if not marks:
        return pixels
    order = list(names)
    colours = [
        tuple(round(255 * part) for part in _COLOURS[order.index(mark["category_id"]) % len(_COLOURS)])
        for mark in marks
    ]
    if with_masks:
        masks = torch.stack([torch.from_numpy(decode_mask(mark["segmentation"], width, height)) for mark in marks])
        masks = F.resize(masks, list(pixels.shape[1:]), F.InterpolationMode.NEAREST).bool()
        pixels = draw_segmentation_masks(pixels, masks, alpha=0.45, colors=colours)
    boxes = torch.tensor([mark["bbox"] for mark in marks], dtype=torch.float32)
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:].clamp(min=0)  # an annotation may have a negative extent
    return draw_bounding_boxes(
        pixels,
        boxes * scale,
        [_label(mark, names) for mark in marks],
        colours,
        width=2,
        font=font_manager.findfont("DejaVu Sans"),
        font_size=13,
        label_colors="white",
        fill_labels=True,
    )


def _label(mark: dict[str, Any], names: dict[Any, str]) -> str:
    name = names[mark["category_id"]]
    crowd = " (crowd)" if mark.get("iscrowd") else ""
    return f"{name}{crowd}" if "score" not in mark else f"{name} {mark['score']:.2f}"


def _fit(picture: Tensor) -> Tensor:
    """A picture in the middle of a cell of the overview, scaled down to fit it."""
    height, width = picture.shape[1:]
    scale = min(_CELL[0] / height, _CELL[1] / width)
    small = F.resize(picture, [round(height * scale), round(width * scale)])
    down, right = _CELL[0] - small.shape[1], _CELL[1] - small.shape[2]
    return F.pad(small, [right // 2, down // 2, right - right // 2, down - down // 2], fill=255)
