"""Folders and timm's data sets -> samples of (image tensor, class number), with the class names checked.

A *source* gives PIL images and class numbers, and knows its class names where they can be told; `ImageSamples` and
`ImageStream` decode and transform what sources give. A broken image never stops a loader: it comes through as
a *complaint* beside a blank image, or beside another image where broken ones are replaced, and whoever takes the batch
decides.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image
from timm.data import IterableImageDataset, create_dataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS
from yacs.config import CfgNode

from data.files import endings, files_below, folders_in, walk
from data.samplers import SampleKey
from data.tar import TarSource
from data.transforms import Transform
from utils.dist import World
from utils.errors import BrokenDataError, UserError, listing, reason
from utils.seeding import number_for, seed_host

_FOLDER_NAMES = ("folder", "imagenet")  # the published configurations call an ImageNet folder 'imagenet'
_BLANK_SIZE = (64, 64)
_MOST_REPLACEMENTS = 100  # if so many samples in a row are broken, the data is gone
_TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")


class Source(Protocol):
    """Images with class numbers, in a fixed order.

    Attributes:
        classes: Names by class number, or None where the data does not tell.
    """

    classes: list[str] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image, perhaps not decoded yet, and its class number."""

    def name(self, index: int) -> str:
        """What to call a sample in an error."""

    def class_of(self, index: int) -> str | None:
        """The name of a sample's class, where it can be told without reading the sample."""


class FolderSource:
    """An ImageNet folder, root/<class>/**/<image>, classes in the order of their names.

    Args:
        root: The folder of one split.
        allow_empty: Whether classes may have no images.

    Raises:
        UserError: If the folder is missing or holds no classes, a class no images, or one of them cannot be read.
    """

    def __init__(self, root: Path, allow_empty: bool = False) -> None:
        if not root.is_dir():
            raise UserError(f"{root} is no folder: put images in {root}/<class>/, or name another --data-path")
        self.classes = folders_in(root)
        if not self.classes:
            raise UserError(f"{root} has no class folders: put images in {root}/<class>/, or name another --data-path")
        # Not by torchvision's ImageFolder, which passes over folders that it cannot read.
        samples = [
            (os.fsencode(f"{folder}/{file}"), number)
            for number, name in enumerate(self.classes)
            for folder, files in sorted(walk(root / name))
            for file in sorted(files)
            if file.lower().endswith(IMG_EXTENSIONS)
        ]
        # Arrays, as reading an object would copy its page of memory into every loader's process.
        self._paths = np.array([path for path, _ in samples], np.bytes_)
        self._targets = np.array([number for _, number in samples], np.int64)
        full = set(self._targets.tolist())
        empty = [name for number, name in enumerate(self.classes) if number not in full]
        if empty and not allow_empty:
            others = endings(str(path) for name in empty for path in files_below(root / name))
            told = f"; files of other endings there: {listing(sorted(others))}" if others else ""
            raise UserError(
                f"{root} has classes without images ({listing(empty)}{told}): add images or remove the folders"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Opens a file."""
        return Image.open(self.name(index)), int(self._targets[index])

    def name(self, index: int) -> str:
        """The file's path."""
        return os.fsdecode(self._paths[index])

    def class_of(self, index: int) -> str | None:
        """The name of its class's folder."""
        return self.classes[self._targets[index]]


class TimmSource:
    """What timm's `create_dataset` reads with random access: Hugging Face's and torchvision's data sets."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._reader = getattr(dataset, "reader", None)  # torchvision's data sets have none
        if hasattr(dataset, "loader"):
            dataset.loader = Image.open  # as torchvision's own cuts 16 bits off above 255, which `as_mode` does not
        self.classes = class_names(dataset)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image as timm's reader or torchvision gives it."""
        if self._reader is None:
            image, target = self._dataset[index]
            return image, int(target)
        file, target = self._reader[index][:2]  # not through the data set, which puts another image for a broken one
        return Image.open(file), int(target)

    def name(self, index: int) -> str:
        """What the reader calls the sample, or its file where torchvision tells; its number where neither does."""
        if self._reader is not None:
            return self._reader.filename(index) or f"sample {index}"
        samples = getattr(self._dataset, "samples", None)
        return str(samples[index][0]) if samples else f"sample {index}"

    def class_of(self, index: int) -> str | None:
        """The name of its class, where the reader has a list of them."""
        targets = getattr(self._reader or self._dataset, "targets", None)
        return self.classes[int(targets[index])] if targets is not None and self.classes else None


def class_names(dataset: Any) -> list[str] | None:
    """Names by class number, of a data set of timm or torchvision, or None where it does not tell."""
    if names := getattr(dataset, "classes", None):
        return list(map(str, names))
    reader = getattr(dataset, "reader", None)
    if names := getattr(reader, "info", {}).get("classes"):  # of WebDataset shards that tools/pack_dataset.py wrote
        return names
    numbers = getattr(reader, "class_to_idx", None)
    if not numbers:
        return None
    return [str(name) for name, _ in sorted(numbers.items(), key=lambda item: item[1])]


Sample = tuple[Tensor, int, str]  # (8-bit image [C, H, W], class number, complaint: empty where nothing was wrong)


def blank_image() -> Image.Image:
    """What stands for a broken image."""
    return Image.new("RGB", _BLANK_SIZE)


class ImageSamples(Dataset):
    """Samples with random access.

    Args:
        source: The images.
        transform: What is done to an image.
        to_class: Class number of the source -> class number of the network; the same if None.
        replace: Whether another sample takes a broken one's place.
        blank: Gives what stands for a broken image, where no other sample does.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        to_class: Sequence[int] | None = None,
        replace: bool = False,
        blank: Callable[[], Any] = blank_image,
    ) -> None:
        self.source, self._transform = source, transform
        self._to_class, self._replace, self._blank = to_class, replace, blank

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """A sample by its index, or by its index and the seed of its augmentation.

        No part of a broken image is ever given out: a blank image takes its place, or with `replace` another sample
        that the seed chooses.

        Raises:
            BrokenDataError: If no sample can be read to replace a broken one.
        """
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, target, complaint = self._read(index, seed)
        if image is None and self._replace:
            image, target = self._replacement(seed, complaint)
        image = image or self._decode(self._blank(), seed)
        return self._transform.augment(image), self._to_class[target] if self._to_class else target, complaint

    def _read(self, index: int, seed: int | None) -> tuple[Image.Image | None, int, str]:
        try:
            image, target = self.source.read(index)
            return self._decode(image, seed), target, ""
        except Exception as error:  # decoders and readers raise errors of every kind at garbage
            of_class = f" of class {name}" if (name := self.source.class_of(index)) else ""
            return None, 0, f"{self.source.name(index)}{of_class} is broken ({reason(error)})"

    def _decode(self, image: Image.Image, seed: int | None) -> Image.Image:
        if seed is not None:  # each time anew, as fast loading draws a crop before it finds that an image is broken
            seed_host(seed)
        return self._transform.decode(image)

    def _replacement(self, seed: int | None, complaint: str) -> tuple[Image.Image, int]:
        for attempt in range(_MOST_REPLACEMENTS):
            image, target, _ = self._read(number_for(seed or 0, "replacement", attempt) % len(self), seed)
            if image is not None:
                return image, target
        raise BrokenDataError(f"{complaint}, and so are {_MOST_REPLACEMENTS} others: is the data still there?")


class ImageStream(IterableDataset):
    """Samples in the order in which timm's streaming readers give them (WebDataset, TFDS, streamed Hugging Face sets).

    In training timm deals the shards out to ranks and workers. In evaluation every rank reads the whole stream and
    keeps every rank-th sample, so that each counts once on any number of ranks.

    Args:
        dataset: timm's.
        transform: What is done to an image.
        world: This process among all.
        seed: The run's seed in training; None for evaluation.
        batch_size: Images of a batch, which an epoch that is gone on with is skipped ahead by.
        replace: Whether the sample before takes a broken one's place, or a blank image where that is broken, too. A
            place that stayed empty would be missing in the end, and would put a run gone on with off its own.
    """

    def __init__(
        self,
        dataset: IterableImageDataset,
        transform: Transform,
        world: World,
        seed: int | None,
        batch_size: int = 1,
        replace: bool = False,
    ) -> None:
        self.dataset, self._transform, self._world, self._seed = dataset, transform, world, seed
        self._batch_size, self._replace = batch_size, replace
        # (epoch, its first batch): workers outlive an epoch and must see it
        self._start = torch.zeros(2, dtype=torch.int64).share_memory_()
        self.classes = class_names(dataset)
        if seed is None:
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the epoch that is given out next, and the batch that it begins with."""
        self._start.copy_(torch.tensor([epoch, first_batch]))
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, first_batch = self._start.tolist()
        passed = len(range(worker, first_batch, workers)) * self._batch_size  # workers give batches in turn
        first = passed - 1 if self._replace else passed  # the last that is passed over may take the next one's place
        before = None
        for count, (image, target) in enumerate(self._raw()):
            if self._seed is not None:
                if count < first:
                    continue
                seed_host(number_for(self._seed, "augment stream", epoch, self._world.rank, worker, count))
            elif count % self._world.size != self._world.rank:
                continue
            found, complaint = None, ""
            try:
                found = self._transform.decode(image), int(target)
            except Exception as error:
                complaint = f"an image of the stream is broken ({reason(error)})"
            given = found or before or (self._transform.decode(blank_image()), int(target))
            before = found if self._replace else None
            if count >= passed:
                yield self._transform.augment(given[0]), given[1], complaint

    def _raw(self) -> Iterator[tuple[Image.Image, int]]:
        try:
            yield from self.dataset
        except (OSError, SyntaxError, ValueError) as error:
            raise BrokenDataError(f"the stream is broken ({reason(error)}): mend its shards") from None


def data_root(config: CfgNode) -> Path:
    """The folder of the data.

    Raises:
        UserError: If none is named.
    """
    if not config.DATA.DATA_PATH:
        raise UserError("DATA.DATA_PATH is empty: name the data with --data-path")
    return Path(config.DATA.DATA_PATH)


def open_split(config: CfgNode, split: str, is_training: bool) -> Source | IterableImageDataset:
    """A split of the configured data set.

    Args:
        config: The configuration.
        split: Its name: a folder, a tar file's stem, or what timm's reader calls a split.
        is_training: Whether it is read for training.

    Raises:
        UserError: If there is no such data.
    """
    name = config.DATA.DATASET
    root = Path() if name.lower().startswith(("hfds/", "hfids/", "tfds/")) else data_root(config)
    if name in _FOLDER_NAMES:
        if not root.is_dir():
            raise UserError(
                f"{root} is no folder: --data-path must hold {config.DATA.TRAIN_SPLIT}/ and {config.DATA.VAL_SPLIT}/"
            )
        return FolderSource(root / split)
    if name == "tar":
        return TarSource(root, split)
    if not name.lower().startswith(_TIMM_PREFIXES):
        raise UserError(
            f"DATA.DATASET is {name!r}: choose folder, tar, or timm's name of a data set, after one of "
            + ", ".join(_TIMM_PREFIXES)
        )
    settings = {"batch_size": config.DATA.BATCH_SIZE, "seed": config.SEED}
    if not name.lower().startswith("tfds/"):  # whose reader makes images of arrays
        settings["input_img_mode"] = ""  # none, as timm would cut 16 bits off above 255, which `as_mode` does not
    path = config.DATA.DATA_PATH
    try:
        dataset = create_dataset(name, path or None, split, is_training=is_training, **settings)
    except Exception as error:  # timm's readers, and the libraries below them, raise errors of many kinds
        where = f"DATA.DATASET {name}, split {split}, under '{path}'"
        raise UserError(f"{where} cannot be opened ({reason(error)}): mend the data or the names") from None
    return dataset if isinstance(dataset, IterableImageDataset) else TimmSource(dataset)


def count_classes(config: CfgNode, classes: list[str] | None) -> int:
    """The number of classes, from the data, checked against the configuration.

    Raises:
        UserError: If they disagree, or neither tells.
    """
    configured = config.MODEL.GMA.NUM_CLASSES
    if classes is None and configured == 0:
        raise UserError(f"DATA.DATASET {config.DATA.DATASET} does not tell its classes: set MODEL.GMA.NUM_CLASSES")
    if classes is not None and configured not in (0, len(classes)):
        raise UserError(
            f"the data has {len(classes)} classes but MODEL.GMA.NUM_CLASSES is {configured}: "
            f"add --opts MODEL.GMA.NUM_CLASSES {len(classes)}, or mend the folders"
        )
    return configured or len(classes or [])


def check_same_classes(
    first: list[str] | None,
    second: list[str] | None,
    sides: tuple[str, str] = ("training", "validation"),
    advice: str = "make the folders agree",
) -> None:
    """Refuses classes of two sides that differ, where both are known.

    Args:
        first: Names by number, of training data or of what `sides` says.
        second: Names by number, of validation data or of what `sides` says.
        sides: What the two are.
        advice: What to do about it.

    Raises:
        UserError: Naming classes that only one of them has.
    """
    if first == second or first is None or second is None:
        return
    only = [sorted(set(first) - set(second)), sorted(set(second) - set(first))]
    told = [f"only in {side}: {listing(names)}" for side, names in zip(sides, only, strict=True) if names]
    difference = "; ".join(told) or "the same ones in another order"
    composed = [{normalize("NFC", name) for name in names} for names in only]
    if told and composed[0] == composed[1]:
        difference += "; the same letters, but other bytes of Unicode"
    raise UserError(f"the classes of {' and '.join(sides)} differ ({difference}): {advice}")


def repeated(names: Sequence[str]) -> list[str]:
    """The names that more than one class has."""
    return sorted(name for name, times in Counter(names).items() if times > 1)


def map_classes(found: list[str] | None, known: list[str] | None, num_classes: int) -> list[int] | None:
    """Class numbers of a network for the classes of a data set, by name.

    Args:
        found: Class names of the data.
        known: Class names of the network, if its checkpoint tells them.
        num_classes: Number of classes of the network.

    Returns:
        The network's number of each class of the data; None where both number them alike.

    Raises:
        UserError: If the data has a class that the network does not know, or the names cannot be matched.
    """
    if found is None or found == known:
        return None
    if known is None:
        if len(found) != num_classes:
            raise UserError(
                f"the data has {len(found)} classes, the network {num_classes}, and the checkpoint does not name them: "
                "score it on data of all its classes"
            )
        return None
    numbers = {name: number for number, name in enumerate(known)}
    if unknown := [name for name in found if name not in numbers]:
        raise UserError(f"the checkpoint does not know the classes {listing(unknown)}: remove their folders")
    return [numbers[name] for name in found]
