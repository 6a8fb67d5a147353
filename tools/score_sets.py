"""Score an ImageNet-1K network on the sets that papers print: ImageNet, ReaL, ImageNet-V2, -A, -R, -Sketch and -C.

Usage:
    python tools/score_sets.py --checkpoint best.pth --val D/val --real D/val --imagenet-v2 V2 --imagenet-c C
    python tools/score_sets.py --checkpoint w.pth --cfg configs/groupmixformer_small.yaml --sketch S
    torchrun --nproc_per_node 8 tools/score_sets.py --checkpoint best.pth --val D/val --imagenet-c C

Prints tables in Markdown. On any number of ranks every image counts once. docs/score_sets.md says how the folders are
laid out and how each set is scored.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import nn
from tqdm import tqdm
from yacs.config import CfgNode

from data.build import eval_data
from data.datasets import FolderSource, ImageSamples
from data.transforms import eval_transform
from models.fuse import fuse
from tools.imagenet_sets.label_sums import AnyLabelSums, SubsetSums
from tools.imagenet_sets.report import (
    corruption_row,
    corruptions_json,
    corruptions_table,
    sets_json,
    sets_table,
)
from tools.imagenet_sets.sets import (
    PUBLISHED_IMAGES,
    ClassFolders,
    PlannedSet,
    RealSource,
    find_corruptions,
    folder_synsets,
    imagenet_synsets,
    missing_corruptions,
    network_numbers,
    set_synsets,
    v2_variant,
)
from utils.checkpoint import write_json
from utils.cli import Parser, at_least, check_report, run
from utils.dist import World, join_world, together
from utils.engine import evaluate
from utils.errors import UserError, listing
from utils.logger import setup_logging
from utils.metrics import Score, Sums, describe
from utils.precision import Precision, memory_format
from utils.trained import add_trained_arguments, trained_from

_log = logging.getLogger(__name__)


class Scorer:
    """Scores a network, every image once on any number of ranks.

    Args:
        network: On the world's device.
        numbers: The network's number of each synset.
        config: Makes its input of images.
        world: This process among all.
        precision: How to compute.
        crop_corrupted: Whether ImageNet-C's images are resized and cropped as other images are, and not taken whole.
    """

    def __init__(
        self,
        network: nn.Module,
        numbers: Mapping[str, int],
        config: CfgNode,
        world: World,
        precision: Precision,
        crop_corrupted: bool = False,
    ) -> None:
        self._network, self._numbers, self._config = network, numbers, config
        self._world, self._precision = world, precision
        whole = config.clone()
        whole.TEST.CROP = False  # squashes an image into the input's square: one of 224 x 224 stays as it is at 224
        self._transform = eval_transform(config)
        self._corrupted_transform = self._transform if crop_corrupted else eval_transform(whole)

    def classes(self, folders: ClassFolders, is_corrupted: bool = False) -> Score:
        """Accuracies among the classes of a set, whatever logits the network's other classes get.

        Raises:
            UserError: If an image is broken, or a class has none.
        """
        among = sorted(self._numbers[synset] for synset in folders.synsets)
        place = {number: place for place, number in enumerate(among)}
        to_class = [place[self._numbers[synset]] for synset in folders.synsets]
        transform = self._corrupted_transform if is_corrupted else self._transform
        with together():
            samples = ImageSamples(FolderSource(folders.root), transform, to_class)
        return self._score(samples, SubsetSums(among, self._world.device))

    def labels(self, source: RealSource) -> Score:
        """Accuracies where any of an image's labels is right.

        Raises:
            UserError: If an image is broken.
        """
        numbers = [self._numbers[synset] for synset in imagenet_synsets()]
        labels = [[numbers[label] for label in of_image] for of_image in source.labels]
        return self._score(ImageSamples(source, self._transform), AnyLabelSums(labels, self._world.device))

    def _score(self, samples: ImageSamples, sums: Sums) -> Score:
        data = eval_data(samples, self._config, self._world)
        return evaluate(self._network, data, self._world, self._precision, sums)


def plan_sets(arguments: argparse.Namespace) -> list[PlannedSet]:
    """The sets that the flags name, ImageNet-C apart.

    Raises:
        UserError: If a folder does not hold what it should.
    """
    named = [("ImageNet", arguments.val), ("ImageNet-ReaL", arguments.real)]
    named += [("ImageNet-V2", root) for root in arguments.v2]
    named += [("ImageNet-A", arguments.a), ("ImageNet-R", arguments.r), ("ImageNet-Sketch", arguments.sketch)]
    return [_plan_set(name, root) for name, root in named if root]


def _plan_set(name: str, root: Path) -> PlannedSet:
    title = f"{name} {v2_variant(root)}" if name == "ImageNet-V2" else name
    is_real = name == "ImageNet-ReaL"
    images = RealSource(root) if is_real else ClassFolders(root, folder_synsets(root, set_synsets(name)))
    return PlannedSet(title, root, PUBLISHED_IMAGES[name], images)


def plan_corrupted(root: Path) -> dict[str, dict[int, ClassFolders]]:
    """ImageNet-C's folders by corruption and severity.

    Raises:
        UserError: If one does not hold ImageNet's classes.
    """
    every = imagenet_synsets()
    return {
        corruption: {severity: ClassFolders(path, folder_synsets(path, every)) for severity, path in folders.items()}
        for corruption, folders in find_corruptions(root).items()
    }


def score_sets(scorer: Scorer, sets: Sequence[PlannedSet]) -> list[tuple[PlannedSet, Score]]:
    """Scores sets one after the other, and says what was reached; gives each with its score.

    Raises:
        UserError: If an image is broken, or a class has none.
    """
    scores = []
    for each in sets:
        score = scorer.labels(each.images) if isinstance(each.images, RealSource) else scorer.classes(each.images)
        scores.append((each, score))
        _log.info("%s: %d images, %s", each.title, score.images, describe(score))
        if score.images != each.published_images:
            _log.warning("%s has %d images here, and %d as published", each.title, score.images, each.published_images)
    return scores


def score_corrupted(
    scorer: Scorer, corrupted: Mapping[str, Mapping[int, ClassFolders]], is_main: bool
) -> dict[str, dict[int, Score]]:
    """Scores ImageNet-C's folders one after the other; gives the scores by corruption and severity.

    Raises:
        UserError: If an image is broken, or a class has none.
    """
    scores: dict[str, dict[int, Score]] = {corruption: {} for corruption in corrupted}
    published, unlike = PUBLISHED_IMAGES["ImageNet-C"], []
    places = [(corruption, severity) for corruption, folders in corrupted.items() for severity in folders]
    for corruption, severity in tqdm(places, "ImageNet-C", unit=" folders", disable=None if is_main else True):
        score = scorer.classes(corrupted[corruption][severity], is_corrupted=True)
        scores[corruption][severity] = score
        name = f"{corruption}/{severity}"
        _log.info("%s: %d images, %s", name, score.images, describe(score), extra={"progress": True})
        if score.images != published:
            unlike.append(f"{name} {score.images}")
    if unlike:
        _log.warning("folders of ImageNet-C have %d images as published, but here %s", published, listing(unlike, 3))
    return scores


def main() -> None:
    """Parses, looks for all that is named, scores it, reports."""
    arguments = parse()
    sets = plan_sets(arguments)
    corrupted = plan_corrupted(arguments.c) if arguments.c else {}
    missing = missing_corruptions(corrupted) if arguments.c else []
    trained = trained_from(arguments)
    numbers = network_numbers(trained.classes, trained.network.num_classes)
    config = trained.config.clone()
    config.DATA.BATCH_SIZE = arguments.batch_size or config.DATA.BATCH_SIZE
    config.DATA.NUM_WORKERS = config.DATA.NUM_WORKERS if arguments.workers is None else arguments.workers
    with join_world(arguments.device, config.RANK_TIMEOUT) as world:
        setup_logging(world.is_main)
        if missing:
            _log.warning("%s lacks %s: no mCE will be told", arguments.c, listing(missing))
        network = fuse(trained.network) if arguments.fuse else trained.network
        network.to(world.device, memory_format=memory_format(config))
        precision = Precision(arguments.precision, world.device.type)
        conditions = {
            "weights": str(arguments.checkpoint),
            "ema": trained.is_ema,
            "img_size": config.DATA.IMG_SIZE,
            "precision": precision.name,
            "fused": arguments.fuse,
            "ranks": world.size,
            "device": world.device.type,
        }
        _log.info("scoring: %s", ", ".join(f"{name} {value}" for name, value in conditions.items()))
        scorer = Scorer(network, numbers, config, world, precision, arguments.c_crop)
        scores = score_sets(scorer, sets)
        by_corruption = score_corrupted(scorer, corrupted, world.is_main)
        if world.is_main:
            report(arguments, conditions, scores, by_corruption, missing)


def report(
    arguments: argparse.Namespace,
    conditions: dict[str, Any],
    scores: Sequence[tuple[PlannedSet, Score]],
    by_corruption: Mapping[str, Mapping[int, Score]],
    missing: Sequence[str],
) -> None:
    """Prints the tables, and writes the report that the flags ask for.

    Args:
        arguments: The flags.
        conditions: Under which the network was scored.
        scores: The sets, each with its score.
        by_corruption: Scores of ImageNet-C by corruption and severity.
        missing: What the folder lacks of ImageNet-C.

    Raises:
        UserError: If the report cannot be written.
    """
    clean = next((score for each, score in scores if each.title == "ImageNet"), None)
    rows = {corruption: corruption_row(corruption, of, clean) for corruption, of in by_corruption.items()}
    tables = ([sets_table(scores)] if scores else []) + ([corruptions_table(rows, missing)] if rows else [])
    print("\n" + "\n\n".join(tables))
    if arguments.json:
        values = conditions | {"sets": sets_json(scores)}
        if rows:
            where = {"path": str(arguments.c), "cropped": arguments.c_crop}
            values["imagenet_c"] = where | corruptions_json(rows, missing)
        write_json(arguments.json, values)


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: If it is wrong.
    """
    parser = Parser(__doc__)
    add_trained_arguments(parser)
    parser.add_argument("--val", type=Path, metavar="DIR", help="ImageNet's validation images, in class folders")
    parser.add_argument("--real", type=Path, metavar="DIR", help="the same under their original names, for ReaL labels")
    parser.add_argument(
        "--imagenet-v2",
        "--v2",
        dest="v2",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="ImageNet-V2: a variant or more",
    )
    parser.add_argument("--imagenet-a", "--a", dest="a", type=Path, metavar="DIR", help="ImageNet-A")
    parser.add_argument("--imagenet-r", "--r", dest="r", type=Path, metavar="DIR", help="ImageNet-R")
    parser.add_argument("--sketch", type=Path, metavar="DIR", help="ImageNet-Sketch")
    parser.add_argument(
        "--imagenet-c", "--c", dest="c", type=Path, metavar="DIR", help="ImageNet-C; with --val also the relative mCE"
    )
    parser.add_argument(
        "--c-crop", action="store_true", help="resize and crop ImageNet-C's images as others; without, they stay whole"
    )
    parser.add_argument("--fuse", action="store_true", help="rewrite the network for inference first (models/fuse.py)")
    parser.add_argument(
        "--batch-size", type=at_least(1), metavar="N", help="images at a time on each rank (default: training's)"
    )
    parser.add_argument(
        "--workers", type=at_least(0), metavar="N", help="loader processes of each rank (default: training's)"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="default: fp32")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores there too, with their counts")
    arguments = parser.parse_args()
    named = (arguments.val, arguments.real, arguments.v2, arguments.a, arguments.r, arguments.sketch, arguments.c)
    if not any(named):
        raise UserError("no set to score: name one by --val, --real, --sketch or --imagenet-v2, -a, -r or -c")
    check_report(arguments.json)
    return arguments


if __name__ == "__main__":
    run(main)
