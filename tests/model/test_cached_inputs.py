"""Arguments of a call with a KV cache, by their values."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from llava.model.cached_inputs import (
    fit_to_cache,
    is_left_padded,
    mask_with_cache,
    padding_side,
    positions_in_rows,
    take_cache,
)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[0, 1, 1], [1, 1, 1]], True),
        ([[1, 1, 1]], False),
        ([[1, 1, 0], [1, 1, 1]], False),
        ([[0, 1, 0], [1, 1, 1]], False),
        ([[1, 0, 1], [1, 1, 1]], False),
    ],
)
def test_left_padding_is_seen_in_the_mask(mask, expected):
    assert is_left_padded(torch.tensor(mask)) is expected
    assert padding_side(torch.tensor(mask), "right") == ("left" if expected else "right")
    assert padding_side(None, "left") == "left"


SHORT = {  # mask over tokens, cached positions, new tokens, side in the config -> mask over positions
    "whole": ([[0, 1, 1]], 2, 1, "right", [[0, 1, 1]]),
    "no cache": ([[1, 1, 0]], 0, 3, "right", [[1, 1, 0]]),
    "ones": ([[1, 1, 1]], 5, 1, "right", [[1] * 6]),
    "new tokens alone": ([[1, 1]], 3, 2, "right", [[1] * 5]),
    "left": ([[0, 1, 1, 1], [1, 1, 1, 1]], 5, 1, "right", [[0, 1, 1, 1, 1, 1], [1] * 6]),
    "right": ([[1, 1, 0, 1], [1, 1, 1, 1]], 5, 1, "right", [[1, 1, 1, 1, 0, 1], [1] * 6]),
    "right, a step later": ([[1, 1, 0, 1, 1], [1] * 5], 6, 1, "right", [[1, 1, 1, 1, 0, 1, 1], [1] * 7]),
    "right, spliced to the left": ([[1, 1, 0, 1], [1, 1, 1, 1]], 5, 1, "left", [[0, 1, 1, 1, 1, 1], [1] * 6]),
    "padding of every row": ([[0, 1, 1, 1]], 5, 1, "right", [[1] * 6]),
    "padding of every row and more": (
        [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], 5, 1, "right", [[0, 1, 1, 1, 1, 1], [1] * 6],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("mask", "cached", "tokens", "side", "expected"), SHORT.values(), ids=SHORT)
def test_a_mask_over_tokens_becomes_one_over_positions(mask, cached, tokens, side, expected):
    for dtype in (torch.long, torch.bool, torch.float32):
        found = mask_with_cache(torch.tensor(mask).to(dtype), cached, (len(mask), tokens), side)
        assert found.dtype == dtype
        assert found.long().tolist() == expected


def test_positions_leave_padding_out():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]])
    assert positions_in_rows(mask, 2).tolist() == [[0, 1], [2, 3], [1, 2]]


def filled_cache(length):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, length, 4), torch.zeros(1, 2, length, 4), 0)
    return cache


def test_position_ids_stay_where_the_mask_covers_the_cache():
    cache = filled_cache(5)
    whole, short, given = torch.ones(1, 6), torch.ones(1, 4), torch.tensor([[9]])
    assert fit_to_cache(whole, given, cache, (1, 1), "right")[1] is given
    assert fit_to_cache(short, given, cache, (1, 1), "right")[1].tolist() == [[5]]
    assert fit_to_cache(None, None, cache, (1, 1), "right") == (None, None)
    four = torch.ones(1, 1, 1, 6)
    assert fit_to_cache(four, None, cache, (1, 1), "right")[0] is four


def test_a_cache_comes_under_either_name_and_as_tuples():
    cache, keys = DynamicCache(), torch.randn(1, 2, 3, 4)
    assert take_cache(None, None) is None
    assert take_cache(cache, None) is take_cache(None, cache) is cache
    assert take_cache((), None).get_seq_length() == 0
    filled = take_cache(((keys, keys + 1), (keys + 2, keys + 3)), None)
    assert filled.get_seq_length() == 3
    assert [bool(torch.equal(layer.values, keys + add)) for layer, add in zip(filled.layers, (1, 3), strict=True)]
    with pytest.raises(ValueError, match=r"^past_key_values and cache are both given; pass one of them$"):
        take_cache(cache, cache)
