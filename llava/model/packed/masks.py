"""Attention masks for packed rows in which several suffixes share a prefix.

A row holds prefix groups one after the other. A prefix group is an image prefix (system prompt, image) followed by its
suffixes (a question and its answer each). A position attends to what precedes it in its own suffix and in its group's
image prefix, never to another suffix or group. What all groups of a row begin with may be placed once before them, as
the system prefix, which all of them attend to. Because attention is causal, a prefix doesn't attend to its suffixes:
each suffix computes what it would compute alone after its own copy of the prefix, if its position ids continue from the
prefix's end.

Masks are boolean, True = attends.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from llava.constants import IMAGE_PREFIX, MASK_BLOCK, NO_GROUP, SYSTEM_PREFIX


def dense_mask(groups: Tensor, suffixes: Tensor) -> Tensor:
    """Return which keys each query attends to, (B, 1, S, S) bool.

    Args:
        groups: (B, S) int64, number of each position's prefix group; `NO_GROUP` for padding, which attends to itself
            alone, `SYSTEM_PREFIX` for the row's system prefix.
        suffixes: (B, S) int64, `IMAGE_PREFIX` or the number of the suffix within its group.
    """
    length = groups.shape[1]
    same_group = (groups[:, :, None] == groups[:, None, :]) | (groups[:, None, :] == SYSTEM_PREFIX)  # (B, S, S)
    same_suffix = (suffixes[:, None, :] == IMAGE_PREFIX) | (suffixes[:, :, None] == suffixes[:, None, :])
    is_real = groups[:, :, None] != NO_GROUP
    causal = groups.new_ones(length, length, dtype=bool).tril()
    itself = groups.new_ones(length, dtype=bool).diag()
    return (same_group & same_suffix & is_real & causal | itself)[:, None]


def dense_mask_rows(groups: Tensor, suffixes: Tensor, queries: Tensor) -> Tensor:
    """Return the mask of some queries over the keys of all rows, one row after the other, (1, 1, queries, B x S) bool.

    Args:
        groups: as in `dense_mask`.
        suffixes: as in `dense_mask`.
        queries: (queries,) int64, flat indices of positions that are not padding.
    """
    rows = torch.arange(len(groups), device=groups.device)[:, None].expand_as(groups)
    row, group, suffix = rows.flatten(), groups.flatten(), suffixes.flatten()
    before = torch.arange(len(group), device=groups.device) <= queries[:, None]  # (queries, B x S)
    same_group = (group == group[queries, None]) | (group == SYSTEM_PREFIX)
    same_suffix = (suffix == IMAGE_PREFIX) | (suffix == suffix[queries, None])
    return (before & (row == row[queries, None]) & same_group & same_suffix)[None, None]


def block_mask(groups: Tensor, suffixes: Tensor) -> BlockMask:
    """Return `dense_mask` as a block mask for FlexAttention, which skips 128 x 128 blocks without any attention.

    System prefix, groups, image prefixes and suffixes must be contiguous, in this order, with padding last. Each key is
    then attended to by one interval of queries, which begins with the key itself: two comparisons per pair, and the
    blocks follow from where the intervals end, without evaluating every pair of positions.

    Args:
        groups: as in `dense_mask`.
        suffixes: as in `dense_mask`.
    """
    length = groups.shape[1]
    stops = _query_stops(groups, suffixes).to(torch.int32)

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query < stops[batch, key])

    is_partial, is_full = _classify_blocks(stops)
    partial, full = (_block_indices(blocks) for blocks in (is_partial, is_full))
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=MASK_BLOCK, mask_mod=attends, seq_lengths=(length, length)
    )


def _query_stops(groups: Tensor, suffixes: Tensor) -> Tensor:
    """Return the first query after each key's last one, (B, S)."""
    starts_group = torch.ones_like(groups, dtype=torch.bool)
    starts_group[:, 1:] = (groups[:, 1:] != groups[:, :-1]) | (groups[:, 1:] == NO_GROUP)
    starts_suffix = starts_group.clone()
    starts_suffix[:, 1:] |= suffixes[:, 1:] != suffixes[:, :-1]
    stops = torch.where(suffixes == IMAGE_PREFIX, _next_start(starts_group), _next_start(starts_suffix))
    n_real = (groups != NO_GROUP).sum(dim=1, keepdim=True)
    return torch.where(groups == SYSTEM_PREFIX, n_real, stops)


def _next_start(starts: Tensor) -> Tensor:
    """Return for each position the next start after it, (B, S); the row's end if there is none."""
    length = starts.shape[1]
    indices = torch.arange(length, device=starts.device).expand_as(starts).masked_fill(~starts, length)
    later = torch.nn.functional.pad(indices[:, 1:], (0, 1), value=length)
    return later.flip(1).cummin(dim=1).values.flip(1)


def _classify_blocks(stops: Tensor) -> tuple[Tensor, Tensor]:
    """Return which blocks are partly and which are fully attended, (B, 1, query blocks, key blocks) bool each.

    Args:
        stops: (B, S), see `_query_stops`.
    """
    rows, length = stops.shape
    count = -(-length // MASK_BLOCK)
    in_blocks = torch.nn.functional.pad(stops, (0, count * MASK_BLOCK - length)).view(rows, 1, 1, count, MASK_BLOCK)
    first, last = in_blocks.amin(dim=-1), in_blocks.amax(dim=-1)  # (B, 1, 1, key blocks)
    queries = torch.arange(count, device=stops.device, dtype=stops.dtype)[:, None]
    keys = torch.arange(count, device=stops.device, dtype=stops.dtype)
    is_attended = ((queries > keys) & (last > queries * MASK_BLOCK)) | (queries == keys)
    is_full = (queries > keys) & (first >= (queries + 1) * MASK_BLOCK)
    return is_attended & ~is_full, is_full


def _block_indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of key blocks of each query block, (B, 1, query blocks), and their indices, then the others."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)


def suffix_prefill_mask(suffixes: Tensor, first: int) -> Tensor:
    """Return which keys the positions from `first` on attend to, in rows of one group, (B, 1, S - first, S) bool.

    Padding attends to the prefix and to other padding, so that no query is without a key.

    Args:
        suffixes: (B, S), `IMAGE_PREFIX`, the number of the suffix, or a negative number for padding.
        first: length of system prefix and image prefix.
    """
    length = suffixes.shape[1]
    own, keys = suffixes[:, None, first:, None], suffixes[:, None, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=suffixes.device).tril()[first:]
    return ((keys == IMAGE_PREFIX) | (keys == own)) & causal


def suffix_decode_mask(suffixes: Tensor, count: int) -> Tensor:
    """Return which keys the next token of each suffix of each row attends to, (B, 1, count, S) bool.

    Args:
        suffixes: (B, S), of the keys of rows of one prefix group: `IMAGE_PREFIX`, the number of the suffix, or a
            negative number where there is no key.
        count: queries of a row; the first is for suffix 1.
    """
    numbers = torch.arange(1, count + 1, device=suffixes.device, dtype=suffixes.dtype)
    keys = suffixes[:, None, None, :]
    return (keys == IMAGE_PREFIX) | (keys == numbers[None, None, :, None])
