"""Batches arrive from other processes as they were sent; only large tensors travel in shared memory."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from llava.data.handover import MOST_BYTES, Batch

LARGE = MOST_BYTES // 8 + 1


def make(rows):
    indices = torch.arange(rows[0] + 3)
    layout = {"groups": indices[None], "empty": indices[:0], "strided": indices.view(1, -1).expand(2, -1)[:, ::2]}
    return Batch(input_ids=indices, layout=layout, images=torch.ones(2, 3), rows=[7], large=torch.arange(LARGE))


def test_a_batch_arrives_as_it_was_sent():
    (found,) = DataLoader([2], batch_size=1, collate_fn=make, num_workers=1)
    sent = make([2])
    assert list(found) == list(sent)
    assert list(found["layout"]) == list(sent["layout"])
    assert found["rows"] == [7]
    pairs = [(found[name], sent[name]) for name in ("input_ids", "images", "large")]
    pairs += [(found["layout"][name], sent["layout"][name]) for name in sent["layout"]]
    for one, other in pairs:
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    found["input_ids"] += 1  # can be written
    assert [found[name].is_shared() for name in ("input_ids", "images", "large")] == [False, True, True]
    assert not found["layout"]["groups"].is_shared()
