"""Which samples, in which order, on which rank."""

from collections.abc import Hashable, Iterator, Sequence
from itertools import chain

import torch
from torch.utils.data import Sampler

from utils.seeding import number_for

SampleKey = tuple[int, int]  # (index in the data set, seed of the augmentation)


class TrainBatchSampler(Sampler[list[SampleKey]]):
    """This rank's micro-batches of an epoch, in an order that depends on (seed, epoch) only.

    Each micro-batch over all ranks is the next `batch_size * ranks` samples of the order, dealt out in turn. Samples
    that do not fill the last one are left out, others each epoch.

    Args:
        length: Samples in the data set.
        batch_size: Samples of a micro-batch on each rank.
        rank: This rank.
        ranks: Number of ranks.
        seed: The run's seed.
        repeats: Above 1, repeated augmentation: an epoch has 1/repeats of the samples, each that many times in a row
            and so mostly on different ranks, augmented differently (https://arxiv.org/abs/1901.09335).
    """

    def __init__(self, length: int, batch_size: int, rank: int, ranks: int, seed: int, repeats: int = 1) -> None:
        self._length, self._batch_size, self._rank, self._ranks = length, batch_size, rank, ranks
        self._seed, self._repeats = seed, repeats
        self.epoch = self._first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the epoch that is given out next, and the batch that it begins with."""
        self.epoch, self._first_batch = epoch, first_batch

    def __len__(self) -> int:
        return self._length // (self._batch_size * self._ranks)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = self._order(self.epoch)
        for batch in range(self._first_batch, len(self)):
            yield [self._key(order, place) for place in self._places(batch)]

    def indices(self, epoch: int, batches: range) -> list[int]:
        """The samples of some of this rank's batches of an epoch."""
        order = self._order(epoch)
        return [order[place // self._repeats] for batch in batches for place in self._places(batch)]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(number_for(self._seed, "order", epoch))
        return torch.randperm(self._length, generator=generator).tolist()

    def _places(self, batch: int) -> range:
        size = self._batch_size * self._ranks
        return range(batch * size + self._rank, (batch + 1) * size, self._ranks)

    def _key(self, order: list[int], place: int) -> SampleKey:
        index, copy = order[place // self._repeats], place % self._repeats
        return index, number_for(self._seed, "augment", self.epoch, index, copy)


class EndlessBatchSampler(TrainBatchSampler):
    """As `TrainBatchSampler`, with epochs of so many micro-batches, however often they pass over the data.

    Every pass has an order of its own, and goes on where the epoch before it ended.

    Args:
        length: Samples in the data set.
        batches: Micro-batches of an epoch.
        batch_size: Samples of a micro-batch on each rank.
        rank: This rank.
        ranks: Number of ranks.
        seed: The run's seed.
    """

    def __init__(self, length: int, batches: int, batch_size: int, rank: int, ranks: int, seed: int) -> None:
        super().__init__(length, batch_size, rank, ranks, seed)
        self._batches = batches

    def __len__(self) -> int:
        return self._batches if self._length else 0

    def _order(self, epoch: int) -> list[int]:
        places = len(self) * self._batch_size * self._ranks
        first_pass, skipped = divmod(epoch * places, max(self._length, 1))
        order: list[int] = []
        while len(order) < skipped + places:
            order += super()._order(first_pass)
            first_pass += 1
        return order[skipped : skipped + places]

    def _key(self, order: list[int], place: int) -> SampleKey:
        index, before = order[place], self.epoch * len(order)
        passes = (before + place) // self._length
        return index, number_for(self._seed, "augment", passes, index)


class AlikeBatchSampler(TrainBatchSampler):
    """As `TrainBatchSampler`, with updates whose samples are of one kind, but for the last ones of an epoch.

    An epoch has the same samples, of which each update takes the next of one kind, so that the order depends on the
    images of an update, too, but not on how many ranks and micro-batches share them.

    Args:
        kinds: Of each sample.
        per_update: Samples of an update over all ranks.
        batch_size: Samples of a micro-batch on each rank.
        rank: This rank.
        ranks: Number of ranks.
        seed: The run's seed.
    """

    def __init__(
        self, kinds: Sequence[Hashable], per_update: int, batch_size: int, rank: int, ranks: int, seed: int
    ) -> None:
        super().__init__(len(kinds), batch_size, rank, ranks, seed)
        self._kinds, self._per_update = kinds, per_update

    def _order(self, epoch: int) -> list[int]:
        order, arranged = super()._order(epoch), []
        waiting: dict[Hashable, list[int]] = {}
        in_updates = len(order) // self._per_update * self._per_update  # a rare kind is not left out more often
        for index in order[:in_updates]:
            alike = waiting.setdefault(self._kinds[index], [])
            alike.append(index)
            if len(alike) == self._per_update:
                arranged += alike
                alike.clear()
        return [*arranged, *chain.from_iterable(waiting.values()), *order[in_updates:]]
