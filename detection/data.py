"""COCO-format data -> batches of images with what is in them."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Mask
from yacs.config import CfgNode

from data.build import EvalData, TrainData, check_steps, loader_settings, share_out
from data.datasets import ImageSamples, blank_image, data_root
from data.decoding import as_mode
from data.samplers import AlikeBatchSampler
from data.transforms import Transform, image_mode
from detection.batch import Batch, Objects, finish
from detection.coco import categories, check_masks, decode_mask, read_coco
from utils.config import accumulation_steps
from utils.dist import World
from utils.errors import UserError

_LEAST_SIDE = 0.01  # pixels; a narrower box has no shape to learn


class Packed(Sequence[Any]):
    """A list whose items lie pickled in one piece of memory, which loader processes share.

    Of the many small objects of a large file each process would come to have a copy: looking at one writes to it.
    """

    def __init__(self, items: Sequence[Any]) -> None:
        pickled = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        self._ends = np.cumsum([0, *map(len, pickled)])
        self._bytes = np.frombuffer(b"".join(pickled), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        return pickle.loads(self._bytes[self._ends[index] : self._ends[index + 1]].data)


class Picture(NamedTuple):
    """An image, as PIL has it or as a tensor, and what is known of it.

    Attributes:
        image: The image.
        number: Its number in the data set.
        objects: What is in it.
    """

    image: Image.Image | Tensor
    number: int
    objects: Objects


class CocoSource:
    """Images of COCO-format data in the order of their file, with what is in them; crowds are left out.

    Args:
        folder: Where the images are.
        coco: Their annotations.
        with_masks: Whether objects come with masks.

    Attributes:
        classes: Names by class number.
        upright: Whether each image is higher than wide.

    Raises:
        UserError: If the folder is missing.
    """

    def __init__(self, folder: Path, coco: COCO, with_masks: bool) -> None:
        if not folder.is_dir():
            raise UserError(
                f"{folder} is no folder: name another --data-path, or set DATA.TRAIN_IMAGES and DATA.VAL_IMAGES"
            )
        names = categories(coco)
        numbers = {category: number for number, category in enumerate(names)}
        self.classes: list[str] | None = list(names.values())
        self._folder, self._with_masks = folder, with_masks
        self.upright = [image["height"] > image["width"] for image in coco.dataset["images"]]
        entries = []
        for image in coco.dataset["images"]:
            objects = [
                (entry["bbox"], numbers[entry["category_id"]], entry["segmentation"] if with_masks else None)
                for entry in coco.imgToAnns.get(image["id"], [])
                if not entry["iscrowd"]
            ]
            entries.append((image["file_name"], image["width"], image["height"], objects))
        self._entries = Packed(entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, index: int) -> tuple[Picture, int]:
        """An image, not decoded yet, with what is in it; as images have no class, 0.

        Raises:
            ValueError: If it is of another size than its annotations are for.
        """
        name, width, height, objects = self._entries[index]
        image = Image.open(self._folder / name)
        if image.size != (width, height):
            raise ValueError(f"it is {image.width} x {image.height}, its annotations are for {width} x {height}")
        return Picture(image, index, self._within(objects, width, height)), 0

    def _within(self, objects: list[tuple[list[float], int, Any]], width: int, height: int) -> Objects:
        """Objects cut to their image, without those of which nothing is left."""
        boxes = torch.tensor([box for box, _, _ in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height], dtype=torch.float32))
        kept = (boxes[:, 2:] - boxes[:, :2] >= _LEAST_SIDE).all(1)
        labels = torch.tensor([label for _, label, _ in objects], dtype=torch.int64)
        within = {"boxes": boxes[kept], "labels": labels[kept]}
        if self._with_masks:
            masks = [decode_mask(objects[place][2], width, height) for place in kept.nonzero().flatten().tolist()]
            within["masks"] = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, height, width), np.uint8))
        return within

    def blank(self) -> Picture:
        """What stands for a broken image."""
        image = blank_image()
        return Picture(image, 0, self._within([], *image.size))

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self._folder / self._entries[index][0])

    def class_of(self, index: int) -> str | None:
        """None, as images have no class."""


def transform(config: CfgNode, is_training: bool) -> Transform:
    """Decodes a picture, and makes 8-bit pixels [C, H, W] of it; in training flips it, and changes its colours."""
    aug, steps = config.AUG, []
    if is_training:
        steps.append(v2.RandomHorizontalFlip(aug.HFLIP))
        if aug.COLOR_JITTER > 0:
            steps.append(v2.ColorJitter(*(aug.COLOR_JITTER,) * 3))
    augment = v2.Compose([*steps, v2.PILToTensor(), v2.ToPureTensor()])
    decode = partial(_decode, mode=image_mode(config), long_side=config.DATA.LONG_SIDE)
    return Transform(decode, partial(_augment, augment=augment))


def _decode(picture: Picture, mode: str, long_side: int) -> Picture:
    width, height = picture.image.size
    if min(width, height) * long_side <= max(width, height):
        raise ValueError(f"it is {width} x {height}, of which DATA.LONG_SIDE {long_side} leaves not a pixel's width")
    return picture._replace(image=as_mode(picture.image, mode))


def _augment(picture: Picture, augment: v2.Transform) -> Picture:
    image, number, objects = picture
    boxes = BoundingBoxes(objects["boxes"], format="XYXY", canvas_size=(image.height, image.width))
    wrapped = {**objects, "boxes": boxes}
    if "masks" in objects:
        wrapped["masks"] = Mask(objects["masks"])
    pixels, augmented = augment(image, wrapped)
    return Picture(pixels, number, augmented)


def collate(samples: list[tuple[Picture, int, str]]) -> tuple[Batch, Tensor, list[str]]:
    """Images with their objects, their numbers in the data set [B], and complaints."""
    pictures, _, complaints = zip(*samples, strict=True)
    batch = Batch([picture.image for picture in pictures], [picture.objects for picture in pictures])
    return batch, torch.tensor([picture.number for picture in pictures]), list(complaints)


def build_train_data(config: CfgNode, world: World) -> TrainData:
    """Training data; its batches are `collate`'s.

    Images of a batch are padded to one size, of an upright one and another to a square two thirds larger than either.
    So updates have images that are all upright or all not.

    Raises:
        UserError: If the data is missing or malformed, or an epoch has no update.
    """
    data = config.DATA
    source, _ = _open(config, data.TRAIN_IMAGES, data.TRAIN_ANNOTATIONS)
    replace = data.ON_ERROR == "skip"
    samples = ImageSamples(source, transform(config, is_training=True), replace=replace, blank=source.blank)
    per_update = data.BATCH_SIZE * world.size * accumulation_steps(config)
    sampler = AlikeBatchSampler(source.upright, per_update, data.BATCH_SIZE, world.rank, world.size, config.SEED)
    check_steps(config, world, len(source), len(sampler))
    loader = DataLoader(samples, batch_sampler=sampler, **loader_settings(config, world, collate))
    return TrainData(loader, source.classes, len(source), len(sampler))


@dataclass(frozen=True)
class CocoEvalData(EvalData):
    """Evaluation batches of this rank, of one image each, so that no other's size bears on what is found in it.

    Attributes:
        coco: The truth.
        with_masks: Whether masks are scored too.
        is_main: Whether this is the rank that scores.
    """

    coco: COCO
    with_masks: bool
    is_main: bool


def build_eval_data(config: CfgNode, world: World) -> CocoEvalData:
    """Validation data.

    Raises:
        UserError: If it is missing or malformed, or there is nothing to find in it.
    """
    data = config.DATA
    source, coco = _open(config, data.VAL_IMAGES, data.VAL_ANNOTATIONS)
    if all(annotation["iscrowd"] for annotation in coco.dataset["annotations"]):
        raise UserError(f"{data.VAL_ANNOTATIONS} has no object to find: set DATA.VAL_ANNOTATIONS")
    samples = ImageSamples(source, transform(config, is_training=False), blank=source.blank)
    loader, rounds = share_out(samples, 1, world, loader_settings(config, world, collate))
    return CocoEvalData(
        loader, finish, source.classes, len(source), rounds, coco, has_masks(config), is_main=world.is_main
    )


def has_masks(config: CfgNode) -> bool:
    """Whether the configured detector learns and finds masks."""
    return config.MODEL.DETECTOR.NAME == "mask_rcnn"


def _open(config: CfgNode, images: str, annotations: str) -> tuple[CocoSource, COCO]:
    root = data_root(config)
    coco = read_coco(root / annotations)
    if has_masks(config):
        check_masks(coco, root / annotations)
    return CocoSource(root / images, coco, has_masks(config)), coco
