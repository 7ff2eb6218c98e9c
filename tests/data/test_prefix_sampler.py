"""Orders that keep records of one prefix together: each record once, batches of similar cost, seed and epoch decide."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from llava.data.prefix_sampler import (
    SharedPrefixSampler,
    Sharing,
    batch_costs,
    find_sharing,
    shared_order,
    waiting_share,
)
from llava.data.records import EncodedRecord, spliced_length

__, IMAGE = -100, -200
PATCHES = 576

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def question(image, *words):
    return EncodedRecord([1, IMAGE, *words, 2], [__] * (2 + len(words)) + [2], [Path(image)])


def sharing_of(sizes):
    """Groups of these sizes: a prefix of 600 positions, suffixes of 10 to 19."""
    groups, start = [], 0
    for size in sizes:
        groups.append(list(range(start, start + size)))
        start += size
    suffixes = [10 + 7919 * row % 10 for row in range(start)]
    for group in groups:
        if len(group) == 1:
            suffixes[group[0]] += 600
    return Sharing(groups, [600 if len(group) > 1 else 0 for group in groups], suffixes, system_prefix=30)


def test_what_is_shared():
    text = EncodedRecord([1, 4, 2], [__, __, 2], [])
    records = [question("a", 5, 6), question("b", 5), question("a", 5, 7, 8), text, text]
    lengths = [spliced_length(record.input_ids, PATCHES) for record in records]
    sharing = find_sharing(records, lengths)
    assert sharing == Sharing([[0, 2], [1], [3], [4]], [578, 0, 0, 0], [2, 579, 3, 3, 3], system_prefix=1)
    assert sharing.saves
    assert batch_costs([0, 1, 2, 3, 4], 5, sharing) == [578 + 2 + 3 + 579 + 3 + 3 - 3]
    assert batch_costs([0, 1, 2, 3, 4], 2, sharing) == [578 + 2 + 579 - 1, 578 + 3 + 3 - 1, 3]
    assert not find_sharing(records[1:], lengths[1:]).saves


@given(sizes, st.integers(1, 9), st.integers(1, 3), st.integers(0, 3))
@settings(deadline=None)
def test_every_row_comes_once(sizes, batch_size, processes, seed):
    sharing = sharing_of(sizes)
    order = shared_order(sharing, batch_size, processes, torch.Generator().manual_seed(seed))
    assert sorted(order) == list(range(sum(sizes)))


@given(sizes, st.integers(1, 9), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_every_row_comes_once_however_the_batches_are_dealt(sizes, batch_size, processes):
    """As accelerate deals them; only the last step may be completed with rows from the epoch's start."""
    sampler = SharedPrefixSampler(sharing_of(sizes), batch_size, processes, seed=0)
    order = list(sampler)
    shares = [
        [row for batch in BatchSamplerShard(BatchSampler(sampler, batch_size, False), processes, rank) for row in batch]
        for rank in range(processes)
    ]
    dealt = [
        row
        for step in range(0, len(shares[0]), batch_size)
        for share in shares
        for row in share[step : step + batch_size]
    ]
    assert dealt[: len(order)] == order
    assert len(dealt) - len(order) < processes * batch_size


def test_groups_stay_together_and_batches_cost_the_same():
    sizes = [
        size
        for size, count in {1: 50, 2: 200, 3: 300, 4: 130, 6: 60, 9: 40, 14: 20, 25: 8}.items()
        for _ in range(count)
    ]
    sharing = sharing_of(sizes)
    sampler = SharedPrefixSampler(sharing, 16, 2, seed=0)
    costs = sampler.costs()
    once = sum(sharing.prefixes) + sum(sharing.suffixes) - sharing.system_prefix * (len(sizes) - len(costs))
    assert once < sum(costs) < 1.1 * once
    assert statistics.pstdev(costs[:-1]) < 0.1 * statistics.mean(costs[:-1])
    assert waiting_share(costs, 2) < 0.01


def test_waiting():
    assert waiting_share([10, 10, 5, 10], 2) == 1 - 35 / 40
    assert waiting_share([10, 10, 5], 2) == 0.0  # a step that is not whole doesn't count
    assert waiting_share([7, 3], 1) == 0.0
    assert waiting_share([], 2) == 0.0


def test_seed_and_epoch_decide():
    def order(seed, epoch):
        sampler = SharedPrefixSampler(sharing_of([3] * 20), 4, 1, seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == 60
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6


def test_the_randomness_of_others_is_left_alone():
    before = torch.random.get_rng_state()
    list(SharedPrefixSampler(sharing_of([3] * 20), 4, 1, seed=0))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("size", [1, 5, 100])
def test_one_group_alone(size):
    assert sorted(SharedPrefixSampler(sharing_of([size]), 4, 2, seed=0)) == list(range(size))
