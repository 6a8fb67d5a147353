"""All randomness comes from here: a number for (seed, purpose, where), so that no random state has to be kept.

A sample's augmentation depends on (seed, epoch, index), erasing, mixup and drop path on (seed, update, step, rank), the
order of an epoch on (seed, epoch). A resumed run therefore draws what an undisturbed run draws, on any number of
workers.
"""

import hashlib
import random

import numpy as np
import torch


def number_for(seed: int, purpose: str, *where: int) -> int:
    """A 63-bit number that depends on all of its arguments and on nothing else.

    Args:
        seed: The run's seed.
        purpose: What the number is for; different purposes get unrelated numbers.
        where: For which epoch, update, sample or rank.
    """
    text = repr((int(seed), purpose, tuple(int(place) for place in where)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(number: int) -> None:
    """Seeds the generators that the network, erasing and mixup draw from, on all devices."""
    seed_host(number)
    torch.manual_seed(number)


def seed_host(number: int) -> None:
    """Seeds the generators that timm's augmentations draw from: the same numbers, without a word to any GPU.

    `torch.manual_seed` keeps a stack trace for GPUs that are not in use yet, which takes long beside loading a sample.
    """
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
