"""Masks of rows that are trees: written out, against an oracle, and FlexAttention's against the dense one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from llava.model import tree_attention
from llava.model.tree_attention import (
    NO_GROUP,
    STEM,
    TRUNK,
    block_pack_mask,
    block_tree_mask,
    branch_mask,
    later_mask,
    tree_mask,
    tree_mask_rows,
)


def test_the_mask_written_out():
    groups = torch.tensor([[STEM, 0, 0, 0, 0, 1, NO_GROUP]])
    branches = torch.tensor([[TRUNK, TRUNK, 1, 1, 2, TRUNK, TRUNK]])
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert tree_mask(groups, branches)[0, 0].int().tolist() == expected


@given(st.lists(st.tuples(st.integers(STEM, 2), st.integers(0, 3)), min_size=1, max_size=12))
def test_equals_the_definition(positions):
    groups, branches = (torch.tensor([column]) for column in zip(*positions, strict=True))
    mask = tree_mask(groups, branches)[0, 0]
    for query, (group, branch) in enumerate(positions):
        for key, (other_group, other_branch) in enumerate(positions):
            in_group = other_group in (group, STEM) and group != NO_GROUP
            in_sight = key < query and in_group and other_branch in (TRUNK, branch)
            assert mask[query, key] == (key == query or in_sight)


@given(st.lists(st.tuples(st.integers(STEM, 2), st.integers(0, 3)), min_size=6, max_size=6), st.data())
def test_rows_of_the_mask_over_the_keys_of_all_rows(positions, data):
    groups, branches = (torch.tensor(column).view(2, 3) for column in zip(*positions, strict=True))
    queries = data.draw(st.lists(st.sampled_from(range(6)), max_size=4))
    queries = torch.tensor([query for query in queries if groups.flatten()[query] != NO_GROUP], dtype=torch.int64)
    rows = tree_mask_rows(groups, branches, queries)
    assert rows.shape == (1, 1, len(queries), 6)
    whole = torch.block_diag(*tree_mask(groups, branches)[:, 0])
    assert torch.equal(rows[0, 0], whole[queries])


pack_groups = st.tuples(st.integers(1, 4), st.lists(st.integers(1, 3), max_size=3))
"""Length of the trunk, lengths of the branches."""


pack_rows = st.lists(
    st.tuples(st.integers(0, 2), st.lists(pack_groups, max_size=3), st.integers(0, 3)), min_size=1, max_size=3
)
"""Length of the stem, groups, padding."""


def columns_of(rows):
    """Groups and branches of rows."""
    columns = []
    for stem, laid_out, padding in rows:
        positions = [(STEM, TRUNK)] * stem
        for number, (trunk, lengths) in enumerate(laid_out):
            positions += [(number, TRUNK)] * trunk
            for branch, length in enumerate(lengths, start=1):
                positions += [(number, branch)] * length
        columns.append(positions + [(NO_GROUP, TRUNK)] * padding)
    length = max(1, *map(len, columns))
    columns = [row + [(NO_GROUP, TRUNK)] * (length - len(row)) for row in columns]
    return torch.tensor(columns).permute(2, 0, 1)


@given(pack_rows)
@settings(deadline=None)  # the first call takes longer
def test_the_mask_of_packs_is_that_of_trees(rows):
    groups, branches = columns_of(rows)
    mask = block_pack_mask(groups, branches)
    seen = create_mask(mask.mask_mod, len(rows), 1, groups.shape[1], groups.shape[1], device="cpu")
    assert torch.equal(seen, tree_mask(groups, branches))


@given(pack_rows, st.sampled_from([2, 3, 8]))
@settings(deadline=None)
def test_blocks_are_those_of_a_look_at_every_pair(rows, size):
    groups, branches = columns_of(rows)
    length = groups.shape[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention, "BLOCK", size)
        mask = block_pack_mask(groups, branches)
    expected = create_block_mask(mask.mask_mod, len(rows), 1, length, length, device="cpu", BLOCK_SIZE=size)
    for name in ("kv", "q", "full_kv", "full_q"):
        counts, numbers = (getattr(mask, f"{name}_{field}") for field in ("num_blocks", "indices"))
        its_counts, its_numbers = (getattr(expected, f"{name}_{field}") for field in ("num_blocks", "indices"))
        assert torch.equal(counts, its_counts)
        is_listed = torch.arange(numbers.shape[-1]) < counts[..., None]
        assert torch.equal(numbers[is_listed], its_numbers[is_listed])
    assert mask.seq_lengths == (length, length)


def test_flex_attention_gives_what_the_dense_mask_gives():
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([[0] * 90 + [1] * 60 + [NO_GROUP] * 10, [0] * 150 + [NO_GROUP] * 10])
    branches = torch.tensor([[0] * 50 + [1] * 20 + [2] * 20 + [0] * 40 + [1] * 20 + [0] * 10, [0] * 140 + [1] * 20])
    query, key, value = torch.randn(3, 2, 2, 160, 16, dtype=torch.float64, generator=generator)  # (B, heads, S, width)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=tree_mask(groups, branches))
    flexible = flex_attention(query, key, value, block_mask=block_tree_mask(groups, branches))
    torch.testing.assert_close(flexible, dense, rtol=0, atol=1e-12)


def test_what_branches_see_written_out():
    branches = torch.tensor([[TRUNK, TRUNK, -1, 1, 1, 2, -1, -1]], dtype=torch.int16)
    expected = [
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 0, 1, 1],
    ]
    assert branch_mask(branches, 3)[0, 0].int().tolist() == expected


@given(st.integers(0, 4), st.integers(0, 2), st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_branches_see_what_the_tree_lets_them_see(trunk, gap, behind):
    row = torch.tensor([[TRUNK] * trunk + [-1] * gap + behind])
    whole = tree_mask(torch.where(row < 0, NO_GROUP, 0), row)
    assert torch.equal(branch_mask(row, trunk + gap), whole[:, :, trunk + gap :])


def test_what_the_next_tokens_see_written_out():
    branches = torch.tensor([[TRUNK, TRUNK, 1, 2, 2, -1], [TRUNK, -1, 3, 3, 1, 3]], dtype=torch.int16)
    expected = [
        [[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]],
        [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1]],
    ]
    assert later_mask(branches, 3)[:, 0].int().tolist() == expected


@given(st.lists(st.integers(0, 3), min_size=1, max_size=10), st.integers(1, 3))
def test_the_next_token_sees_what_it_would_see_behind_the_others(branches, branch):
    """As a token of its branch at the end of the row would, but for itself."""
    row = torch.tensor([[*branches, branch]])
    behind = tree_mask(torch.zeros_like(row), row)[0, 0, -1, :-1]
    assert later_mask(row[:, :-1], 3)[0, 0, branch - 1].tolist() == behind.tolist()
