"""Folders of images and label maps -> batches to train on, and single images to validate on.

As ADE20K comes: D/images/{training,validation}/**/<name>.jpg and D/annotations/{training,validation}/**/<name>.png.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.v2 as T
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask
from yacs.config import CfgNode

from data.build import EvalData, TrainData, check_steps, loader_settings, share_out
from data.datasets import ImageSamples, blank_image, count_classes, data_root, repeated
from data.decoding import as_mode
from data.files import files_below
from data.finish import Normalize
from data.samplers import EndlessBatchSampler, TrainBatchSampler
from data.transforms import Transform, image_mode
from segmentation.labels import IGNORE, MOST_CLASSES, to_classes
from segmentation.sizes import scaled_size
from utils.config import accumulation_steps
from utils.dist import World
from utils.errors import UserError, listing, reason

_CROP_TRIES = 10
_NAME_FILES = ("classes.txt", "objectInfo150.txt")  # a name a line; or ADE20K's table, whose last column they are

Files = tuple[Image.Image, Image.Image]  # an image and its label map, perhaps not decoded yet
Pair = tuple[ImageTensor, Mask]  # uint8 [C, H, W] and class numbers, uint8 [H, W]


class PairSource:
    """The images of a split with their label maps, in the order of their names.

    Args:
        root: Holds images/ and annotations/.
        split: A folder in both.

    Attributes:
        classes: Names by class number, or None where the data set does not name them.

    Raises:
        UserError: If a folder is missing or empty, or an image has no label map or shares one with another.
    """

    classes: list[str] | None

    def __init__(self, root: Path, split: str) -> None:
        images, maps = root / "images" / split, root / "annotations" / split
        for folder in (images, maps):
            if not folder.is_dir():
                raise UserError(
                    f"{folder} is no folder: --data-path must hold images/{split}/ and annotations/{split}/"
                )
        found = sorted(path for path in files_below(images) if path.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise UserError(f"{images} has no images: put some there, or name another --data-path")
        self._images = images
        self._files = [(path, (maps / path.relative_to(images)).with_suffix(".png")) for path in found]
        if missing := [str(image) for image, label_map in self._files if not label_map.is_file()]:
            raise UserError(f"{maps} has no label map (.png) for {listing(missing)}: add them or remove the images")
        owners: dict[Path, Path] = {}
        for image, label_map in self._files:
            if (owner := owners.setdefault(label_map, image)) != image:
                raise UserError(f"{owner} and {image} share the label map {label_map}: rename or remove one of them")
        self.classes = class_names(root)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> tuple[Files, int]:
        """Opens an image and its label map; the number beside them is nothing."""
        image, label_map = self._files[index]
        return (Image.open(image), Image.open(label_map)), 0

    def name(self, index: int) -> str:
        """The image's path."""
        return str(self._files[index][0])

    def stem(self, index: int) -> Path:
        """The image's path below its split's folder, without suffix."""
        return self._files[index][0].relative_to(self._images).with_suffix("")

    def class_of(self, index: int) -> None:
        """A label map has no one class."""


def class_names(root: Path) -> list[str] | None:
    """The names in a data set's classes.txt or objectInfo150.txt; None where it has neither.

    Raises:
        UserError: If they are no text.
    """
    for name in _NAME_FILES:
        if (root / name).is_file():
            try:
                text = (root / name).read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{root / name} is no UTF-8 text ({reason(error)}): save it as such") from None
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            rows = [line.split("\t") for line in lines]
            return lines if name == "classes.txt" else [row[-1].strip() for row in rows if row[0].strip().isdigit()]
    return None


class RandomScale(T.Transform):
    """Scales image and label map alike, to the size that evaluation looks at times a random factor.

    Args:
        factors: The least and the largest.
        short_side: As in `scaled_size`.
        long_side: As in `scaled_size`.
    """

    def __init__(self, factors: tuple[float, float], short_side: int, long_side: int) -> None:
        super().__init__()
        self._factors, self._short_side, self._long_side = factors, short_side, long_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size to scale to."""
        factor = torch.empty(()).uniform_(*self._factors).item()
        return {"size": scaled_size(flat_inputs[0].shape[-2:], self._short_side, self._long_side, factor)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Scales one of them."""
        if not isinstance(inpt, Mask):
            return F.resize(inpt, params["size"], antialias=True)
        # torchvision resizes a Mask by its other nearest neighbours, which lie half a pixel off the image's.
        labels = F.resize(inpt.as_subclass(Tensor)[None], params["size"], F.InterpolationMode.NEAREST_EXACT)
        return Mask(labels[0])


class VariedCrop(T.RandomCrop):
    """A random crop of image and label map that tries not to be nearly all of one class.

    Args:
        size: Its side; smaller images are padded.
        most: Share of the labelled pixels that one class may have, as far as ten tries find such a crop.
        fill: For images, by channel; label maps are filled with IGNORE.
    """

    def __init__(self, size: int, most: float, fill: list[int]) -> None:
        super().__init__(size, pad_if_needed=True, fill={ImageTensor: fill, Mask: IGNORE})
        self._most = most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """torchvision's, drawn again while one class has too large a share, or no pixel has a class."""
        mask = next(value for value in flat_inputs if isinstance(value, Mask))
        for _ in range(_CROP_TRIES):
            params = super().make_params(flat_inputs)
            counts = torch.bincount(self.transform(mask, params).flatten())[:IGNORE]
            if 0 < counts.max() <= self._most * counts.sum():
                break
        return params


class PhotometricDistortion(T.RandomPhotometricDistort):
    """torchvision's changes of brightness, contrast, saturation and hue, without its shuffling of the channels."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """torchvision's."""
        return {**super().make_params(flat_inputs), "channel_permutation": None}


def decode(files: Files, mode: str, num_classes: int, reduce_zero_label: bool) -> Pair:
    """Reads an image and its label map.

    Args:
        files: As a source opens them.
        mode: PIL's name for what the network takes.
        num_classes: How many classes there are.
        reduce_zero_label: As in `to_classes`.

    Raises:
        Exception: Of any kind, if one of them is broken or they do not fit.
    """
    image, label_map = files
    pixels = F.pil_to_tensor(as_mode(image, mode))
    classes = torch.from_numpy(to_classes(label_map, num_classes, reduce_zero_label))
    if classes.shape != pixels.shape[1:]:
        sizes = " and ".join(" x ".join(map(str, reversed(shape))) for shape in (pixels.shape[1:], classes.shape))
        raise UserError(f"it and its label map differ in size: {sizes}")
    return ImageTensor(pixels), Mask(classes)


def blank() -> Files:
    """What stands for a broken pair."""
    return blank_image(), blank_image().convert("L")


def train_transform(config: CfgNode, num_classes: int) -> Transform:
    """Random scale, crop, flip and photometric distortion of image and label map together."""
    data, aug = config.DATA, config.AUG
    augment = T.Compose(
        [
            RandomScale(tuple(aug.SCALE), data.SHORT_SIDE, data.LONG_SIDE),
            VariedCrop(data.IMG_SIZE, aug.CAT_MAX_RATIO, [round(255 * mean) for mean in data.MEAN]),
            T.RandomHorizontalFlip(aug.HFLIP),
            PhotometricDistortion(p=aug.PHOTOMETRIC),
            T.ToPureTensor(),
        ]
    )
    return Transform(_decoder(config, num_classes), augment)


def eval_transform(config: CfgNode, num_classes: int) -> Transform:
    """Image and label map as they are."""
    return Transform(_decoder(config, num_classes), T.ToPureTensor())


def _decoder(config: CfgNode, num_classes: int) -> Callable[[Files], Pair]:
    reduce = config.DATA.REDUCE_ZERO_LABEL
    return partial(decode, mode=image_mode(config), num_classes=num_classes, reduce_zero_label=reduce)


def collate(samples: list[tuple[tuple[Tensor, Tensor], int, str]]) -> tuple[Tensor, Tensor, list[str]]:
    """A batch: images [B, C, H, W], class numbers [B, H, W], complaints."""
    pairs, _, complaints = zip(*samples, strict=True)
    images, classes = default_collate(list(pairs))
    return images, classes, list(complaints)


def build_train_data(config: CfgNode, world: World) -> TrainData:
    """Training data: images [B, C, H, W] and class numbers [B, H, W], 8 bits both.

    Raises:
        UserError: If the data is missing, or an epoch has no update.
    """
    data, updates = config.DATA, config.TRAIN.EPOCH_UPDATES
    source = PairSource(data_root(config), data.TRAIN_SPLIT)
    classes = named_classes(config, source)
    samples = ImageSamples(source, train_transform(config, len(classes)), replace=data.ON_ERROR == "skip", blank=blank)
    where = {"batch_size": data.BATCH_SIZE, "rank": world.rank, "ranks": world.size, "seed": config.SEED}
    if updates:
        sampler = EndlessBatchSampler(len(source), updates * accumulation_steps(config), **where)
    else:
        sampler = TrainBatchSampler(len(source), **where)
    check_steps(config, world, len(source), len(sampler), "lower --batch-size, or set TRAIN.EPOCH_UPDATES")
    loader = DataLoader(samples, batch_sampler=sampler, **loader_settings(config, world, collate))
    return TrainData(loader, classes, len(source), len(sampler))


def build_eval_data(config: CfgNode, world: World) -> EvalData:
    """Validation data: one image [1, C, H, W] after the other, with its class numbers [1, H, W].

    Raises:
        UserError: If the data is missing.
    """
    source = PairSource(data_root(config), config.DATA.VAL_SPLIT)
    classes = named_classes(config, source)
    samples = ImageSamples(source, eval_transform(config, len(classes)), blank=blank)
    loader, rounds = share_out(samples, 1, world, loader_settings(config, world, collate))
    return EvalData(loader, Normalize(config, world.device), classes, len(source), rounds)


def named_classes(config: CfgNode, source: PairSource) -> list[str]:
    """Names by class number; made up of the labels where the data set has none.

    Raises:
        UserError: If the data and the configuration disagree about the number of classes, or neither tells, or there
            are more than label maps can tell apart.
    """
    if not (source.classes or config.MODEL.GMA.NUM_CLASSES):
        raise UserError(
            f"{config.DATA.DATA_PATH} has no {_NAME_FILES[0]} with a name a line: add one, or set MODEL.GMA.NUM_CLASSES"
        )
    if twice := repeated(source.classes or []):
        raise UserError(f"{config.DATA.DATA_PATH} names several classes {listing(twice)}: give each its own name")
    count = count_classes(config, source.classes)
    if count > MOST_CLASSES:
        raise UserError(f"{count} classes are more than the {MOST_CLASSES} that 8-bit label maps can tell apart")
    first = int(config.DATA.REDUCE_ZERO_LABEL)
    return source.classes or [f"class {label}" for label in range(first, first + count)]
