"""Which samples, in which order, on which rank."""

import pytest
import torch
from helpers_unit import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from data.samplers import AlikeBatchSampler, EndlessBatchSampler, TrainBatchSampler

SPLITS = [(1, 8), (2, 4), (4, 2), (8, 1)]  # (ranks, batch size of each) of one global batch of 8


def epoch_of(length, batch_size, rank=0, ranks=1, seed=0, repeats=1, epoch=0):
    sampler = TrainBatchSampler(length, batch_size, rank, ranks, seed, repeats)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert all(len(batch) == batch_size for batch in batches)
    return batches


def flat(batches):
    return [key for batch in batches for key in batch]


@given(
    length=st.integers(0, 120),
    batch_size=st.integers(1, 9),
    ranks=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 400),
)
@examples(80)
def test_an_epoch_gives_each_sample_at_most_once_over_all_ranks(length, batch_size, ranks, seed, epoch):
    over_ranks = [flat(epoch_of(length, batch_size, rank, ranks, seed, 1, epoch)) for rank in range(ranks)]
    indices = [index for keys in over_ranks for index, _ in keys]
    assert len(set(indices)) == len(indices) == length // (batch_size * ranks) * batch_size * ranks
    assert set(indices) <= set(range(length))


@given(length=st.integers(8, 100), seed=st.integers(0, 99), epoch=st.integers(0, 9), repeats=st.integers(1, 3))
@examples(40)
def test_a_micro_batch_over_all_ranks_does_not_depend_on_their_number(length, seed, epoch, repeats):
    whole = epoch_of(length, 8, 0, 1, seed, repeats, epoch)
    for ranks, batch_size in SPLITS:
        shares = [epoch_of(length, batch_size, rank, ranks, seed, repeats, epoch) for rank in range(ranks)]
        for step, batch in enumerate(whole):
            assert sorted(key for share in shares for key in share[step]) == sorted(batch)
            for rank, share in enumerate(shares):
                assert share[step] == batch[rank::ranks]  # dealt out in turn


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    orders = [
        tuple(index for index, _ in flat(epoch_of(64, 8, seed=seed, epoch=epoch)))
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(orders)) == 16
    assert tuple(range(64)) not in orders


def test_what_one_epoch_leaves_out_others_give():
    left_out = [set(range(11)) - {index for index, _ in flat(epoch_of(11, 8, epoch=epoch))} for epoch in range(30)]
    assert all(len(samples) == 3 for samples in left_out)
    assert set().union(*left_out) == set(range(11))


def test_the_order_is_evenly_random():
    first = torch.tensor([epoch_of(10, 1, epoch=epoch)[0][0][0] for epoch in range(1000)])
    assert torch.bincount(first, minlength=10).min() > 60  # 100 expected of each


def test_a_sampler_keeps_no_state_but_its_epoch():
    sampler = TrainBatchSampler(40, 4, 1, 2, seed=3)
    sampler.set_epoch(5)
    first = list(sampler)
    next(iter(sampler))  # an iteration that is broken off
    torch.manual_seed(99)
    assert list(sampler) == first == epoch_of(40, 4, 1, 2, 3, 1, 5)
    sampler.set_epoch(6)
    sampler.set_epoch(5)
    assert list(sampler) == first


@given(
    length=st.integers(0, 90),
    batch_size=st.integers(1, 6),
    ranks=st.integers(1, 3),
    repeats=st.integers(1, 3),
    epoch=st.integers(0, 9),
    data=st.data(),
)
@examples(80)
def test_an_epoch_that_is_gone_on_with_is_the_tail_of_the_whole(length, batch_size, ranks, repeats, epoch, data):
    rank = data.draw(st.integers(0, ranks - 1))
    whole = epoch_of(length, batch_size, rank, ranks, 5, repeats, epoch)
    sampler = TrainBatchSampler(length, batch_size, rank, ranks, 5, repeats)
    for first in range(len(whole) + 2):
        sampler.set_epoch(epoch, first)
        assert list(sampler) == whole[first:]
    sampler.set_epoch(epoch)
    assert list(sampler) == whole


def test_an_epoch_after_one_that_was_gone_on_with_is_whole():
    sampler = TrainBatchSampler(40, 4, 0, 1, seed=3)
    sampler.set_epoch(5, 7)
    sampler.set_epoch(6)
    assert list(sampler) == epoch_of(40, 4, seed=3, epoch=6)


@given(
    length=st.integers(1, 90),
    batch_size=st.integers(1, 6),
    ranks=st.integers(1, 3),
    repeats=st.integers(1, 3),
    data=st.data(),
)
@examples(60)
def test_the_samples_of_a_batch_can_be_told_without_giving_it_out(length, batch_size, ranks, repeats, data):
    rank = data.draw(st.integers(0, ranks - 1))
    batches = epoch_of(length, batch_size, rank, ranks, 5, repeats, 2)
    first = data.draw(st.integers(0, len(batches)))
    last = data.draw(st.integers(first, len(batches)))
    sampler = TrainBatchSampler(length, batch_size, rank, ranks, 5, repeats)
    sampler.set_epoch(1, first_batch=1)  # it may be giving out another epoch
    assert sampler.indices(2, range(first, last)) == [index for index, _ in flat(batches[first:last])]


def test_nothing_of_skipped_batches_is_read():
    class Counting(Dataset):
        def __init__(self):
            self.read = []

        def __len__(self):
            return 40

        def __getitem__(self, key):
            self.read.append(key)
            return key[0]

    samples, sampler = Counting(), TrainBatchSampler(40, 4, 0, 1, seed=3)
    sampler.set_epoch(2, 7)
    assert len(list(DataLoader(samples, batch_sampler=sampler))) == 3
    assert samples.read == flat(epoch_of(40, 4, seed=3, epoch=2)[7:])


def test_iterating_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    epoch_of(40, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_samples_seed_depends_on_seed_epoch_and_index_only():
    seeds = {}
    for seed in range(3):
        for epoch in range(5):
            for index, number in flat(epoch_of(40, 8, seed=seed, epoch=epoch)):
                seeds[seed, epoch, index] = number
    assert len(set(seeds.values())) == len(seeds) == 3 * 5 * 40
    for rank in range(2):
        for index, number in flat(epoch_of(43, 5, rank, 2, seed=2, epoch=4)):  # another data set, batch and rank
            assert index >= 40 or number == seeds[2, 4, index]


@given(length=st.integers(8, 90), repeats=st.integers(2, 4), ranks=st.sampled_from([1, 2, 4]))
@examples(40)
def test_repeats_give_a_sample_several_times_augmented_differently(length, repeats, ranks):
    keys = [key for rank in range(ranks) for key in flat(epoch_of(length, 8 // ranks, rank, ranks, repeats=repeats))]
    indices = [index for index, _ in keys]
    assert len(keys) == length // 8 * 8  # an epoch is as long as without
    counts = sorted(indices.count(index) for index in set(indices))
    assert counts[1:] == [repeats] * (len(counts) - 1)  # the last one may be cut off
    assert counts[0] <= repeats
    assert len({number for _, number in keys}) == len(keys)


def test_repeats_of_a_sample_lie_on_different_ranks():
    shares = [{index for index, _ in flat(epoch_of(64, 4, rank, 2, repeats=2))} for rank in range(2)]
    assert shares[0] == shares[1]
    assert all(len(flat(epoch_of(64, 4, rank, 2, repeats=2))) == len(shares[rank]) for rank in range(2))


@pytest.mark.parametrize(("length", "batch_size", "ranks"), [(7, 8, 1), (7, 4, 2), (0, 1, 1)])
def test_too_few_samples_for_a_batch_give_none(length, batch_size, ranks):
    assert epoch_of(length, batch_size, 0, ranks) == []


# Epochs of so many batches


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
@examples(60)
def test_epochs_of_so_many_batches_pass_over_the_data_again_and_again(length, batches, batch_size, ranks, epochs):
    samplers = [EndlessBatchSampler(length, batches, batch_size, rank, ranks, seed=3) for rank in range(ranks)]
    given_out = []
    for epoch in range(epochs):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        of_ranks = [list(sampler) for sampler in samplers]
        assert [len(of_rank) for of_rank in of_ranks] == [batches] * ranks == list(map(len, samplers))
        for batch in range(batches):
            told = [sampler.indices(epoch, range(batch, batch + 1)) for sampler in samplers]
            assert told == [[index for index, _ in of_rank[batch]] for of_rank in of_ranks]
            given_out += [of_rank[batch][i] for i in range(batch_size) for of_rank in of_ranks]
    assert len(set(given_out)) == len(given_out) == epochs * batches * batch_size * ranks  # each augmented differently
    for start in range(0, len(given_out) - length + 1, length):
        assert sorted(index for index, _ in given_out[start : start + length]) == list(range(length))


@pytest.mark.parametrize(("batches", "batch_size", "ranks"), [(2, 6, 2), (4, 6, 1), (12, 2, 1), (4, 2, 3)])
def test_an_epoch_of_so_many_batches_has_the_same_samples_however_its_updates_are_cut(batches, batch_size, ranks):
    whole = EndlessBatchSampler(7, 2, 12, 0, 1, seed=4)
    parts = [EndlessBatchSampler(7, batches, batch_size, rank, ranks, seed=4) for rank in range(ranks)]
    for sampler in (whole, *parts):
        sampler.set_epoch(3)
    of_ranks = [list(part) for part in parts]
    dealt = [of_rank[batch][i] for batch in range(batches) for i in range(batch_size) for of_rank in of_ranks]
    assert dealt == [key for batch in whole for key in batch]


def test_passes_over_the_data_have_orders_of_their_own():
    sampler = EndlessBatchSampler(20, 2, 20, 0, 1, seed=0)
    first, second = sampler.indices(0, range(1)), sampler.indices(0, range(1, 2))
    assert first != second and sorted(first) == sorted(second)
    assert sampler.indices(1, range(1)) not in (first, second)


def test_an_epoch_of_so_many_batches_that_is_gone_on_with_is_the_tail_of_the_whole():
    sampler = EndlessBatchSampler(7, 5, 3, 0, 1, seed=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, first_batch=3)
    assert list(sampler) == whole[3:]


def test_no_samples_give_no_batches_however_many_are_asked_for():
    assert list(EndlessBatchSampler(0, 5, 3, 0, 1, seed=1)) == []


# Updates of samples that are alike


def alike(kinds, per_update, batch_size=None, rank=0, ranks=1, epoch=0):
    sampler = AlikeBatchSampler(kinds, per_update, batch_size or per_update, rank, ranks, seed=6)
    sampler.set_epoch(epoch)
    return list(sampler)


@given(kinds=st.lists(st.booleans(), max_size=90), per_update=st.integers(1, 9), epoch=st.integers(0, 3))
@examples(60)
def test_updates_are_of_one_kind_and_an_epoch_of_the_samples_that_it_would_have_anyway(kinds, per_update, epoch):
    batches = alike(kinds, per_update, epoch=epoch)
    assert sorted(flat(batches)) == sorted(flat(epoch_of(len(kinds), per_update, seed=6, epoch=epoch)))
    mixed = [len({kinds[index] for index, _ in batch}) > 1 for batch in batches]
    assert sum(mixed) <= 1 and not any(mixed[:-1])


def test_samples_of_one_kind_come_in_the_order_that_they_would_have_anyway():
    assert alike([True] * 43, 8, 4, 1, 2) == epoch_of(43, 4, 1, 2, seed=6)


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 4), (2, 2), (2, 4), (8, 1)])
def test_updates_of_one_kind_do_not_depend_on_how_they_are_cut(ranks, batch_size):
    kinds = [number % 3 == 0 for number in range(50)]
    whole = alike(kinds, 8)
    shares = [flat(alike(kinds, 8, batch_size, rank, ranks)) for rank in range(ranks)]
    of_rank = 8 // ranks
    for update, keys in enumerate(whole):
        dealt = [share[update * of_rank : (update + 1) * of_rank] for share in shares]
        assert sorted(key for of in dealt for key in of) == sorted(keys)
