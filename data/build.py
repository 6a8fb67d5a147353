"""Loaders and mixup from the configuration."""

import atexit
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from timm.data import IterableImageDataset, Mixup
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from yacs.config import CfgNode

from data.datasets import ImageSamples, ImageStream, Sample, Source, check_same_classes, map_classes, open_split
from data.finish import Normalize
from data.samplers import TrainBatchSampler
from data.transforms import eval_transform, train_transform
from utils.config import mixes
from utils.dist import World, check_alike
from utils.errors import UserError
from utils.signals import end_loaders, ignore_stop_signals


@dataclass(frozen=True)
class TrainData:
    """Training batches of this rank.

    Attributes:
        loader: Gives (8-bit images [B, C, H, W], class numbers [B], complaints about broken images: B texts, mostly
            empty).
        classes: Class names by number, or None where the data does not tell.
        images: Images over all ranks.
        steps_per_epoch: Batches of an epoch.
    """

    loader: DataLoader
    classes: list[str] | None
    images: int
    steps_per_epoch: int

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the epoch that the loader gives out next, and the batch of this rank that it begins with."""
        giver = self.loader.dataset if isinstance(self.loader.dataset, ImageStream) else self.loader.batch_sampler
        giver.set_epoch(epoch, first_batch)

    def names(self, epoch: int, batches: range) -> list[str]:
        """What the samples of some of this rank's batches of an epoch are called; a stream does not tell."""
        if isinstance(self.loader.dataset, ImageStream):
            return ["samples of a stream, which has no names for them"]
        indices = self.loader.batch_sampler.indices(epoch, batches)
        return [self.loader.dataset.source.name(index) for index in indices]


@dataclass(frozen=True)
class EvalData:
    """Evaluation batches of this rank: every image on exactly one rank, once.

    Attributes:
        loader: Gives (8-bit images [B, C, H, W], class numbers [B], complaints about broken images: B texts, mostly
            empty).
        finish: Makes the network's input of the images on the device.
        classes: Class names of the data by number, or None where it does not tell.
        images: Images over all ranks, or 0 where a stream does not tell.
        rounds: Batches that every rank has, or 0 where that is not known.
    """

    loader: DataLoader
    finish: Callable[[Any], Any]
    classes: list[str] | None
    images: int
    rounds: int

    @property
    def source(self) -> Source | None:
        """The images, to name them and look at some again; None for a stream, which can do neither."""
        return None if isinstance(self.loader.dataset, ImageStream) else self.loader.dataset.source


def build_train_data(config: CfgNode, world: World) -> TrainData:
    """Training data.

    Raises:
        UserError: If the data is missing, an epoch has no update, or a loader process no shard.
    """
    data, transform = config.DATA, train_transform(config)
    source = open_split(config, data.TRAIN_SPLIT, is_training=True)
    replace = data.ON_ERROR == "skip"
    if isinstance(source, IterableImageDataset):
        if config.AUG.REPEATS > 1:
            raise UserError(
                f"AUG.REPEATS {config.AUG.REPEATS} needs random access, which {data.DATASET} has not: set it to 1"
            )
        _check_shards(source, config, world)
        source.set_loader_cfg(num_workers=_workers(config, world))
        stream = ImageStream(source, transform, world, config.SEED, data.BATCH_SIZE, replace)
        loader = DataLoader(stream, data.BATCH_SIZE, drop_last=True, **loader_settings(config, world))
        classes, images, steps = stream.classes, len(stream) * world.size, len(stream) // data.BATCH_SIZE
    else:
        sampler = TrainBatchSampler(
            len(source), data.BATCH_SIZE, world.rank, world.size, config.SEED, config.AUG.REPEATS
        )
        samples = ImageSamples(source, transform, replace=replace)
        loader = DataLoader(samples, batch_sampler=sampler, **loader_settings(config, world))
        classes, images, steps = source.classes, len(source), len(sampler)
    check_steps(config, world, images, steps)
    return TrainData(loader, classes, images, steps)


def check_steps(config: CfgNode, world: World, images: int, steps: int, advice: str = "lower --batch-size") -> None:
    """Refuses epochs without an update.

    Args:
        config: The configuration.
        world: This process among all.
        images: Training images over all ranks.
        steps: Batches of an epoch.
        advice: What to do about it.

    Raises:
        UserError: If the training images do not fill a batch on every rank.
    """
    if steps == 0:
        raise UserError(
            f"an epoch has no update: {images} training images do not fill a batch of {config.DATA.BATCH_SIZE} "
            f"on each of {world.size} rank(s): {advice}"
        )


def build_eval_data(config: CfgNode, world: World, known: list[str] | None, num_classes: int | None) -> EvalData:
    """Validation data, its classes numbered as the network numbers them.

    Args:
        config: The configuration.
        world: This process among all.
        known: Class names of the network by number, where they are known.
        num_classes: Number of classes of the network; None to take the data's.

    Raises:
        UserError: If the data is missing or has classes that the network does not know.
    """
    data, transform = config.DATA, eval_transform(config)
    source = open_split(config, data.VAL_SPLIT, is_training=False)
    if isinstance(source, IterableImageDataset):
        finish = Normalize(config, world.device)
        source.set_loader_cfg(num_workers=_workers(config, world))
        stream = ImageStream(source, transform, world, seed=None)
        sides = ("the checkpoint", "the data")
        check_same_classes(known, stream.classes, sides, "score it on data of the same classes")
        loader = DataLoader(stream, data.BATCH_SIZE, **loader_settings(config, world))
        return EvalData(loader, finish, stream.classes, source.reader.num_samples or 0, rounds=0)
    to_class = map_classes(source.classes, known, num_classes or len(source.classes or []))
    return eval_data(ImageSamples(source, transform, to_class), config, world)


def check_readers(data: EvalData) -> None:
    """Refuses a stream that ranks read with unlike numbers of processes; every rank must call.

    Shards are dealt out to the processes of a rank: with other numbers of them, ranks would score some images twice
    and others never.

    Raises:
        UserError: On all ranks.
    """
    readers = max(data.loader.num_workers, 1) if isinstance(data.loader.dataset, ImageStream) else 0
    check_alike(
        {"the number of processes that read the stream": readers},
        "set DATA.NUM_WORKERS to the same on all of them, and to no more than each has cores for",
    )


def eval_data(samples: ImageSamples, config: CfgNode, world: World) -> EvalData:
    """This rank's share of images with random access, for evaluation.

    Args:
        samples: All images, transformed.
        config: The configuration.
        world: This process among all.
    """
    loader, rounds = share_out(samples, config.DATA.BATCH_SIZE, world, loader_settings(config, world))
    return EvalData(loader, Normalize(config, world.device), samples.source.classes, len(samples), rounds)


def share_out(samples: ImageSamples, batch_size: int, world: World, settings: dict[str, Any]) -> tuple[DataLoader, int]:
    """This rank's batches of samples to score, each of which is on exactly one rank; and how many every rank has.

    Args:
        samples: All of them; a rank has every so many-th from its own number on, as there are ranks.
        batch_size: Samples of a batch.
        world: This process among all.
        settings: Those of `loader_settings`.
    """
    own = range(world.rank, len(samples), world.size)
    return DataLoader(samples, batch_size, sampler=own, **settings), math.ceil(len(samples) // world.size / batch_size)


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """A batch: images [B, C, H, W] that lie as [B, H, W, C] in memory, as samples do, so that they are only copied."""
    images, targets, complaints = zip(*samples, strict=True)
    pixels = default_collate([image.permute(1, 2, 0) for image in images])
    return pixels.permute(0, 3, 1, 2), torch.tensor(targets), list(complaints)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _workers(config: CfgNode, world: World) -> int:
    """The configured number of loader processes, or as many as this rank has cores where that is less."""
    return min(config.DATA.NUM_WORKERS, max(available_cores() // world.local_size, 1))


def _check_shards(source: IterableImageDataset, config: CfgNode, world: World) -> None:
    """Refuses fewer WebDataset shards than loader processes, of which some would have no images and end epochs early.

    Raises:
        UserError: If there are too few.
    """
    if not config.DATA.DATASET.lower().startswith("wds/"):
        return  # other streams are not dealt out by shards
    shards, processes = len(source.reader.split_info.filenames), max(_workers(config, world), 1) * world.size
    if shards < processes:
        most = shards // world.size
        lower = f"lower DATA.NUM_WORKERS to {most} or " if most else ""
        raise UserError(
            f"{config.DATA.DATA_PATH} has {shards} training shard(s) for {processes} loader processes on {world.size} "
            f"rank(s), and each needs one: {lower}pack again with a smaller --shard-size"
        )


@cache  # once: before torch registers an end of its own, which then comes first, as the last that is registered does
def _end_loaders_at_exit() -> None:
    atexit.register(end_loaders)


def loader_settings(
    config: CfgNode, world: World, collate: Callable[[list[Any]], tuple[Any, Any, list[str]]] = collate
) -> dict[str, Any]:
    """What torch's loader is to be given beside data and order.

    Args:
        config: The configuration.
        world: This process among all.
        collate: Makes a batch of samples.
    """
    workers = _workers(config, world)
    if workers:
        _end_loaders_at_exit()
    return {
        "num_workers": workers,
        "collate_fn": collate,
        "pin_memory": config.DATA.PIN_MEMORY and world.device.type == "cuda",
        "persistent_workers": workers > 0,
        "worker_init_fn": ignore_stop_signals,
    }


def build_mixup(config: CfgNode, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, with label smoothing in the mixed targets, or None where both are off."""
    if not mixes(config):
        return None
    aug = config.AUG
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=num_classes,
    )
