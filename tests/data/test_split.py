"""No image is on both sides, whatever ties rows together, and the same seed always gives the same sides."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.split import held_out, ranked, split_rows, tie_rows

ROWS = st.lists(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=3), min_size=1, max_size=30)


@given(ROWS, st.floats(0.01, 0.99), st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_no_name_is_on_both_sides(rows, share, seed):
    if len(set(tie_rows(rows))) < 2:
        with pytest.raises(ValueError, match=r"^rows of one image can't be split; pass rows of their own with --eval_"):
            split_rows(rows, share, seed)
        return
    flags = split_rows(rows, share, seed)
    sides = [
        {name for row, flag in zip(rows, flags, strict=True) if flag is side for name in row} for side in (False, True)
    ]
    assert not sides[0] & sides[1]
    assert sides[0]
    assert sides[1]


@given(ROWS)
@settings(max_examples=300, deadline=None)
def test_groups_are_the_connected_rows(rows):
    """Against a plain flood fill."""
    groups = tie_rows(rows)
    for start in range(len(rows)):
        reached, names = {start}, set(rows[start])
        while found := {place for place, row in enumerate(rows) if names & set(row)} - reached:
            reached |= found
            names |= {name for place in found for name in rows[place]}
        assert {place for place, group in enumerate(groups) if group == groups[start]} == reached
        assert groups[start] == min(names)


@given(ROWS, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_the_order_of_rows_does_not_matter(rows, seed):
    if len(set(tie_rows(rows))) < 2:
        return
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    flags, shuffled = split_rows(rows, 0.3, seed), split_rows([rows[place] for place in order], 0.3, seed)
    assert [flags[place] for place in order] == shuffled


def test_the_share_is_that_of_the_groups():
    rows = [[f"{index}.jpg"] for index in range(1000) for _ in range(1 + index % 3)]
    flags = split_rows(rows, 0.02, 0)
    chosen = {row[0] for row, flag in zip(rows, flags, strict=True) if flag}
    assert len(chosen) == 20
    assert chosen != {row[0] for row, flag in zip(rows, split_rows(rows, 0.02, 1), strict=True) if flag}


def test_chosen_by_hash():
    """sha256 of "0:name": spelt out, so that no change of the rule goes unseen."""
    assert ranked(["a", "b", "c", "d"], 0) == ["d", "a", "c", "b"]
    assert held_out(["a", "b", "c", "d"], 0.5, 0) == {"d", "a"}
    assert held_out(["a", "b"], 0.001, 0) == {"a"}
    assert held_out(["a", "b"], 0.999, 0) == {"a"}


@pytest.mark.parametrize("share", [0, 1, -0.5, 2])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match=rf"^the validation share must lie between 0 and 1, not {share}$"):
        held_out(["a", "b"], share, 0)
