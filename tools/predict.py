"""Tell what is in images, by a trained network.

Usage:
    python tools/predict.py --checkpoint output/digits/default/best.pth photo.jpg folder --topk 3
    python tools/predict.py --checkpoint best.pth folder --json predictions.json --sheet predictions.png
    python tools/predict.py --checkpoint published.pth --cfg configs/groupmixformer_small.yaml folder --csv p.csv

Prints a line for each image: its path, and its first classes with their probabilities. The checkpoint of a run tells
all that is needed; published weights need their --cfg. Images are prepared as test.py prepares them, so the first
class is the one that test.py scores. Folders are searched with all folders below them.

Exit code: 0 if all images could be read, 1 if some could not (they are named, and the others are done), 2 if the
command line is wrong.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from yacs.config import CfgNode

from data.build import available_cores, collate
from data.datasets import ImageSamples
from data.files import FileSource, find_images, spread
from data.finish import Normalize
from data.transforms import eval_transform
from models.fuse import fuse
from tools.runs.predictions import Prediction, as_json, draw_sheet, name_classes, write_csv
from utils.checkpoint import write_json
from utils.cli import Parser, at_least, check_report, run
from utils.console import say
from utils.dist import choose_device
from utils.errors import UserError
from utils.precision import Precision, memory_format
from utils.signals import ignore_stop_signals
from utils.trained import Trained, add_trained_arguments, trained_from

_TOPK = 5
_MOST_WORKERS = 8
_MOST_PICTURES = 60  # of the sheet


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: If it is wrong.
    """
    parser = Parser(__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="what to look at")
    add_trained_arguments(parser)
    parser.add_argument(
        "--topk", type=at_least(1), metavar="N", help=f"classes of an image (default {_TOPK}, or all if fewer)"
    )
    parser.add_argument("--fuse", action="store_true", help="rewrite the network for inference first, which is faster")
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--json", type=Path, metavar="FILE", help="write the predictions there too")
    table.add_argument("--csv", type=Path, metavar="FILE", help="or as a table, a row for each class of an image")
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE.png",
        help=f"draw the images with their classes, or {_MOST_PICTURES} of them, evenly spread",
    )
    parser.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="images at a time (default 32)")
    parser.add_argument(
        "--workers",
        type=at_least(0),
        default=min(available_cores(), _MOST_WORKERS),
        metavar="N",
        help=f"processes that read images (default: as many as cores, at most {_MOST_WORKERS})",
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where (default: a GPU, if any)"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="default fp32")
    arguments = parser.parse_args()
    for flag in ("json", "csv"):
        check_report(getattr(arguments, flag), f"--{flag}")
    check_report(arguments.sheet, "--sheet", ".png")
    return arguments


@torch.inference_mode()
def predict(
    network: nn.Module,
    loader: Iterable[Any],
    finish: Callable[[Tensor], Tensor],
    precision: Precision,
    device: torch.device,
    topk: int,
) -> Iterator[tuple[list[int], list[float], str]]:
    """The first classes of images, in their order.

    Args:
        network: In evaluation mode, on the device.
        loader: Gives (8-bit images [B, C, H, W], anything, complaints about broken images: mostly empty).
        finish: Makes floating-point input of 8-bit images on the device.
        precision: How to compute.
        device: Where to compute.
        topk: Classes of an image.

    Yields:
        For each image the numbers of its classes, the most probable first, their probabilities, and the complaint; if
        there is one, the classes mean nothing.

    Raises:
        UserError: If the network's answers are no numbers.
    """
    for images, _, complaints in loader:
        images = finish(images.to(device, non_blocking=True))
        with precision.autocast():
            logits = network(images)
        logits = logits.float()
        numbers = logits.topk(topk, dim=1).indices
        probabilities = logits.softmax(dim=1).gather(1, numbers)
        if not probabilities.isfinite().all():
            raise UserError(f"the network's answers in {precision.name} are no numbers: try --precision fp32")
        yield from zip(numbers.tolist(), probabilities.tolist(), complaints, strict=True)


def build_loader(paths: list[Path], config: CfgNode, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    """Batches of images, prepared as for scoring."""
    return DataLoader(
        ImageSamples(FileSource(paths), eval_transform(config)),
        batch_size,
        num_workers=min(workers, math.ceil(len(paths) / batch_size)),
        collate_fn=collate,
        worker_init_fn=ignore_stop_signals,
        pin_memory=device.type == "cuda",
    )


def main() -> None:
    """Parses, predicts, reports."""
    arguments = parse()
    device = choose_device(arguments.device)
    paths = find_images(arguments.images)
    trained = trained_from(arguments)
    classes = len(trained.labels)
    topk = min(_TOPK, classes) if arguments.topk is None else arguments.topk
    if topk > classes:
        raise UserError(f"--topk {topk}: the network has {classes} classes; give at most that")
    network = fuse(trained.network) if arguments.fuse else trained.network
    network.to(device, memory_format=memory_format(trained.config))
    precision = Precision(arguments.precision, device.type)
    loader = build_loader(paths, trained.config, arguments.batch_size, arguments.workers, device)
    finish = Normalize(trained.config, device)
    predictions = []
    rows = predict(network, loader, finish, precision, device, topk)
    for path, (numbers, probabilities, complaint) in zip(tqdm(paths, unit=" images", disable=None), rows, strict=True):
        top = [] if complaint else name_classes(trained, numbers, probabilities)
        predictions.append(Prediction(path, top, complaint))
        if not complaint:
            say(f"{path}: {', '.join(map(str, top))}")
    report(arguments, trained, predictions)


def report(arguments: argparse.Namespace, trained: Trained, predictions: list[Prediction]) -> None:
    """Writes the files that are asked for, names broken images, and exits with 1 if there are any."""
    about = {
        "checkpoint": str(trained.source),
        "weights": "ema" if trained.is_ema else "model",
        "fused": arguments.fuse,
        "precision": arguments.precision,
    }
    if arguments.json:
        write_json(arguments.json, about | as_json(predictions))
    if arguments.csv:
        write_csv(predictions, arguments.csv)
    whole = [prediction for prediction in predictions if not prediction.complaint]
    if arguments.sheet:
        drawn = spread(whole, _MOST_PICTURES)
        draw_sheet(drawn, trained.classes, arguments.sheet)
        print(f"{arguments.sheet} shows {len(drawn)} of {len(whole):,} images", file=sys.stderr)
    broken = [prediction.complaint for prediction in predictions if prediction.complaint]
    for complaint in broken:
        print(f"passed over: {complaint}", file=sys.stderr)
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
