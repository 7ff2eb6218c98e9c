"""Every row comes once, batches are of one modality, and seed and epoch alone decide the order."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.length_sampler import ModalityLengthSampler, group_by_length, group_by_modality

rows = st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=120)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(rows, st.integers(1, 9))
@settings(deadline=None)
def test_an_order_is_a_permutation_of_pure_batches(rows, batch_size):
    lengths, has_image = [row[0] for row in rows], [row[1] for row in rows]
    order = group_by_modality(lengths, has_image, batch_size, seeded())
    assert sorted(order) == list(range(len(rows)))
    counts = Counter(has_image)
    whole = sum(count // batch_size for count in counts.values())
    for start in range(0, whole * batch_size, batch_size):
        assert len({has_image[index] for index in order[start : start + batch_size]}) == 1


@given(st.integers(0, 60), st.integers(1, 7))
@settings(deadline=None)
def test_lengths_within_a_stretch_fall_into_sorted_batches(count, batch_size):
    lengths = [(index * 7919) % 101 for index in range(count)]
    batches = group_by_length(range(count), lengths, batch_size, seeded())
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    spans = sorted(([lengths[index] for index in batch] for batch in batches), reverse=True)
    if count <= 50 * batch_size:  # one stretch: batches don't overlap in length
        assert all(min(left) >= max(right) for left, right in itertools.pairwise(spans))


@pytest.mark.parametrize("kind", [True, False])
def test_one_modality_alone(kind):
    order = group_by_modality([3] * 10, [kind] * 10, 4, seeded())
    assert sorted(order) == list(range(10))


def test_only_the_last_batch_mixes():
    has_image = [True] * 5 + [False] * 5
    order = group_by_modality([1] * 10, has_image, 4, seeded())
    kinds = [has_image[index] for index in order]
    assert kinds[:8] in ([True] * 4 + [False] * 4, [False] * 4 + [True] * 4)
    assert sorted(kinds[8:]) == [False, True]


def test_seed_and_epoch_decide():
    def order(seed, epoch):
        sampler = ModalityLengthSampler(list(range(40)), [index % 3 > 0 for index in range(40)], 4, seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == 40
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert sorted(order(1, 1)) == list(range(40))
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6


def test_the_randomness_of_others_is_left_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    list(ModalityLengthSampler([1] * 20, [True] * 20, 4, 0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_rows():
    assert group_by_modality([], [], 4, seeded()) == []
