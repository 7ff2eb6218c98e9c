"""Masks of packed rows: written out, against an oracle, and FlexAttention's against the dense one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from llava.model.packed import masks
from llava.model.packed.masks import (
    IMAGE_PREFIX,
    NO_GROUP,
    SYSTEM_PREFIX,
    block_mask,
    dense_mask,
    dense_mask_rows,
    suffix_decode_mask,
    suffix_prefill_mask,
)


def test_the_mask_written_out():
    groups = torch.tensor([[SYSTEM_PREFIX, 0, 0, 0, 0, 1, NO_GROUP]])
    suffixes = torch.tensor([[IMAGE_PREFIX, IMAGE_PREFIX, 1, 1, 2, IMAGE_PREFIX, IMAGE_PREFIX]])
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert dense_mask(groups, suffixes)[0, 0].int().tolist() == expected


@given(st.lists(st.tuples(st.integers(SYSTEM_PREFIX, 2), st.integers(0, 3)), min_size=1, max_size=12))
def test_equals_the_definition(positions):
    groups, suffixes = (torch.tensor([column]) for column in zip(*positions, strict=True))
    mask = dense_mask(groups, suffixes)[0, 0]
    for query, (group, suffix) in enumerate(positions):
        for key, (other_group, other_suffix) in enumerate(positions):
            in_group = other_group in (group, SYSTEM_PREFIX) and group != NO_GROUP
            is_visible = key < query and in_group and other_suffix in (IMAGE_PREFIX, suffix)
            assert mask[query, key] == (key == query or is_visible)


@given(st.lists(st.tuples(st.integers(SYSTEM_PREFIX, 2), st.integers(0, 3)), min_size=6, max_size=6), st.data())
def test_rows_of_the_mask_over_the_keys_of_all_rows(positions, data):
    groups, suffixes = (torch.tensor(column).view(2, 3) for column in zip(*positions, strict=True))
    queries = data.draw(st.lists(st.sampled_from(range(6)), max_size=4))
    queries = torch.tensor([query for query in queries if groups.flatten()[query] != NO_GROUP], dtype=torch.int64)
    rows = dense_mask_rows(groups, suffixes, queries)
    assert rows.shape == (1, 1, len(queries), 6)
    whole = torch.block_diag(*dense_mask(groups, suffixes)[:, 0])
    assert torch.equal(rows[0, 0], whole[queries])


pack_groups = st.tuples(st.integers(1, 4), st.lists(st.integers(1, 3), max_size=3))
"""Length of the image prefix, lengths of the suffixes."""


pack_rows = st.lists(
    st.tuples(st.integers(0, 2), st.lists(pack_groups, max_size=3), st.integers(0, 3)), min_size=1, max_size=3
)
"""Length of the system prefix, groups, padding."""


def columns_of(rows):
    """Groups and suffixes of rows."""
    columns = []
    for system, in_row, padding in rows:
        positions = [(SYSTEM_PREFIX, IMAGE_PREFIX)] * system
        for number, (prefix, lengths) in enumerate(in_row):
            positions += [(number, IMAGE_PREFIX)] * prefix
            for suffix, length in enumerate(lengths, start=1):
                positions += [(number, suffix)] * length
        columns.append(positions + [(NO_GROUP, IMAGE_PREFIX)] * padding)
    length = max(1, *map(len, columns))
    columns = [row + [(NO_GROUP, IMAGE_PREFIX)] * (length - len(row)) for row in columns]
    return torch.tensor(columns).permute(2, 0, 1)


@given(pack_rows)
@settings(deadline=None)  # the first call takes longer
def test_the_block_mask_is_the_dense_mask(rows):
    groups, suffixes = columns_of(rows)
    mask = block_mask(groups, suffixes)
    attended = create_mask(mask.mask_mod, len(rows), 1, groups.shape[1], groups.shape[1], device="cpu")
    assert torch.equal(attended, dense_mask(groups, suffixes))


@given(pack_rows, st.sampled_from([2, 3, 8]))
@settings(deadline=None)
def test_blocks_are_those_of_evaluating_every_pair(rows, size):
    groups, suffixes = columns_of(rows)
    length = groups.shape[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "MASK_BLOCK", size)
        mask = block_mask(groups, suffixes)
    expected = create_block_mask(mask.mask_mod, len(rows), 1, length, length, device="cpu", BLOCK_SIZE=size)
    for name in ("kv", "q", "full_kv", "full_q"):
        counts, numbers = (getattr(mask, f"{name}_{field}") for field in ("num_blocks", "indices"))
        its_counts, its_numbers = (getattr(expected, f"{name}_{field}") for field in ("num_blocks", "indices"))
        assert torch.equal(counts, its_counts)
        is_listed = torch.arange(numbers.shape[-1]) < counts[..., None]
        assert torch.equal(numbers[is_listed], its_numbers[is_listed])
    assert mask.seq_lengths == (length, length)


def test_flex_attention_equals_sdpa_with_the_dense_mask():
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([[0] * 90 + [1] * 60 + [NO_GROUP] * 10, [0] * 150 + [NO_GROUP] * 10])
    first = [0] * 50 + [1] * 20 + [2] * 20 + [0] * 40 + [1] * 20 + [0] * 10
    suffixes = torch.tensor([first, [0] * 140 + [1] * 10 + [0] * 10])
    query, key, value = torch.randn(3, 2, 2, 160, 16, dtype=torch.float64, generator=generator)  # (B, H, S, d)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(groups, suffixes))
    flexible = flex_attention(query, key, value, block_mask=block_mask(groups, suffixes))
    torch.testing.assert_close(flexible, dense, rtol=0, atol=1e-12)


def test_the_prefill_mask_written_out():
    suffixes = torch.tensor([[IMAGE_PREFIX, IMAGE_PREFIX, -1, 1, 1, 2, -1, -1]], dtype=torch.int16)
    expected = [
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 0, 1, 1],
    ]
    assert suffix_prefill_mask(suffixes, 3)[0, 0].int().tolist() == expected


@given(st.integers(0, 4), st.integers(0, 2), st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_the_prefill_mask_is_part_of_the_dense_mask(prefix, gap, owners):
    row = torch.tensor([[IMAGE_PREFIX] * prefix + [-1] * gap + owners])
    whole = dense_mask(torch.where(row < 0, NO_GROUP, 0), row)
    assert torch.equal(suffix_prefill_mask(row, prefix + gap), whole[:, :, prefix + gap :])


def test_the_decode_mask_written_out():
    suffixes = torch.tensor(
        [[IMAGE_PREFIX, IMAGE_PREFIX, 1, 2, 2, -1], [IMAGE_PREFIX, -1, 3, 3, 1, 3]], dtype=torch.int16
    )
    expected = [
        [[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]],
        [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1]],
    ]
    assert suffix_decode_mask(suffixes, 3)[:, 0].int().tolist() == expected


@given(st.lists(st.integers(0, 3), min_size=1, max_size=10), st.integers(1, 3))
def test_the_decode_mask_is_a_row_of_the_dense_mask(suffixes, suffix):
    """That of a token of the suffix at the end of the row, without itself."""
    row = torch.tensor([[*suffixes, suffix]])
    expected = dense_mask(torch.zeros_like(row), row)[0, 0, -1, :-1]
    assert suffix_decode_mask(row[:, :-1], 3)[0, 0, suffix - 1].tolist() == expected.tolist()
