"""Draw the first scenes of a split as they are, with their masks and boxes, and with their label maps."""

import json
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from pycocotools import mask as coco_mask

from utils.sheet import write_figure

_SHOWN = 6
_INCHES = 1.28  # of a scene


def draw_scenes(root: Path, path: Path) -> None:
    """Draws validation scenes from the files that `write_scenes` wrote.

    Args:
        root: What holds ade/ and coco/.
        path: The PNG to write.

    Raises:
        UserError: If it cannot be written.
    """
    instances = json.loads((root / "coco/annotations/instances_val2017.json").read_text())
    figure = Figure(figsize=(_SHOWN * _INCHES, 3 * _INCHES), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(3, _SHOWN)
    for axis in axes.flat:
        axis.set_axis_off()
    palette = np.vstack(
        [[0, 0, 0, 1], [0.85, 0.85, 0.85, 1], colormaps["hsv"](np.arange(10) / 10) * (0.85, 0.85, 0.85, 1)]
    )
    for column, entry in zip(axes.T, instances["images"], strict=False):
        pixels = np.asarray(Image.open(root / "coco/val2017" / entry["file_name"]))
        labels = np.asarray(Image.open(root / "ade/annotations/validation" / entry["file_name"]))
        extent = (0, entry["width"], entry["height"], 0)  # boxes are measured from the image's corner
        column[0].imshow(pixels, extent=extent)
        column[1].imshow(pixels @ np.array([0.3, 0.6, 0.1]) / 2 + 100, "gray", vmin=0, vmax=255, extent=extent)
        column[2].imshow(palette[labels], interpolation="nearest", extent=extent)
        for annotation in (found for found in instances["annotations"] if found["image_id"] == entry["id"]):
            colour = palette[annotation["category_id"] + 1]
            mask = coco_mask.decode(annotation["segmentation"])[..., None]
            column[1].imshow(mask * colour * (1, 1, 1, 0.6), extent=extent)
            left, top, width, height = annotation["bbox"]
            column[1].add_patch(Rectangle((left, top), width, height, fill=False, color=colour, linewidth=1.2))
            column[1].text(
                *(left + 1, max(top, 13)),
                str(annotation["category_id"] - 1),
                fontsize=6,
                color="white",
                verticalalignment="bottom",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
            )
    write_figure(figure, path)
