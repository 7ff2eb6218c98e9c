"""Who sees whom where several questions stand behind one prefix: masks for rows that are trees.

A row holds groups one after the other. A group is a trunk (system prompt, image) and branches (a question and its
answer each) behind it. A position sees what stands before it in its own branch and in its group's trunk, never another
branch and never another group. What all groups of a row begin with may stand once before them, as the stem, which all
of them see. Because attention is causal the trunk doesn't see the branches, so that each branch
computes what it would compute alone behind its own copy of the trunk, if its position ids restart behind the trunk.

Letters: `B` rows, `S` positions of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from llava.constants import NO_GROUP, STEM, TRUNK

BLOCK = 128
"""Positions that FlexAttention handles at once."""


def tree_mask(groups: Tensor, branches: Tensor) -> Tensor:
    """Return which keys each query sees, (B, 1, S, S) bool, True = sees; for attention with a dense mask.

    Args:
        groups: (B, S) int64, number of each position's group, `NO_GROUP` for padding, `STEM` for the stem.
        branches: (B, S) int64, `TRUNK` or the number of the branch within the group.
    """
    length = groups.shape[1]
    same_group = (groups[:, :, None] == groups[:, None, :]) | (groups[:, None, :] == STEM)  # (B, S, S)
    on_the_way = (branches[:, None, :] == TRUNK) | (branches[:, :, None] == branches[:, None, :])
    is_real = groups[:, :, None] != NO_GROUP
    causal = groups.new_ones(length, length, dtype=bool).tril()
    itself = groups.new_ones(length, dtype=bool).diag()
    return (same_group & on_the_way & is_real & causal | itself)[:, None]


def tree_mask_rows(groups: Tensor, branches: Tensor, queries: Tensor) -> Tensor:
    """Return the mask of some positions alone, over the keys of all rows one after the other, (1, 1, K, B x S) bool.

    Args:
        groups: as in `tree_mask`.
        branches: as in `tree_mask`.
        queries: (K,) int64, flat indices of positions that are no padding.
    """
    rows = torch.arange(len(groups), device=groups.device)[:, None].expand_as(groups)
    row, group, branch = rows.flatten(), groups.flatten(), branches.flatten()
    before = torch.arange(len(group), device=groups.device) <= queries[:, None]  # (K, B x S)
    same_group = (group == group[queries, None]) | (group == STEM)
    on_the_way = (branch == TRUNK) | (branch == branch[queries, None])
    return (before & (row == row[queries, None]) & same_group & on_the_way)[None, None]


def block_tree_mask(groups: Tensor, branches: Tensor) -> BlockMask:
    """Return the same mask for FlexAttention, which skips blocks of 128 x 128 that nobody sees; args as `tree_mask`."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        group = groups[batch, query]
        same_group = ((group == groups[batch, key]) | (groups[batch, key] == STEM)) & (group != NO_GROUP)
        branch = branches[batch, key]
        on_the_way = (branch == TRUNK) | (branch == branches[batch, query])
        return (same_group & on_the_way & (query >= key)) | (query == key)

    rows, length = groups.shape
    return create_block_mask(sees, rows, None, length, length, device=groups.device)


def block_pack_mask(groups: Tensor, branches: Tensor) -> BlockMask:
    """Return `block_tree_mask` of rows in which stem, groups, trunks and branches are each in one piece, in this order.

    Each key is then seen by one stretch of queries, which begins with the key itself: two comparisons in each block,
    and which blocks anybody sees follows from where those stretches end, without a look at every pair of positions.

    Args:
        groups: as in `tree_mask`, padding behind everything else.
        branches: as in `tree_mask`.
    """
    length = groups.shape[1]
    stops = _audience_end(groups, branches).to(torch.int32)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query < stops[batch, key])

    is_seen, is_full = _seen_blocks(stops)
    some, whole = (_numbers(blocks) for blocks in (is_seen & ~is_full, is_full))
    return BlockMask.from_kv_blocks(*some, *whole, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length))


def _seen_blocks(stops: Tensor) -> tuple[Tensor, Tensor]:
    """Return of which blocks any, and of which every, query sees a key, (B, 1, blocks, blocks) bool, queries first.

    Args:
        stops: (B, S), see `_audience_end`.
    """
    rows, length = stops.shape
    count = -(-length // BLOCK)
    in_blocks = torch.nn.functional.pad(stops, (0, count * BLOCK - length)).view(rows, 1, 1, count, BLOCK)
    first, last = in_blocks.amin(dim=-1), in_blocks.amax(dim=-1)  # (B, 1, 1, blocks)
    queries = torch.arange(count, device=stops.device, dtype=stops.dtype)[:, None]
    keys = torch.arange(count, device=stops.device, dtype=stops.dtype)
    is_seen = ((queries > keys) & (last > queries * BLOCK)) | (queries == keys)
    is_full = (queries > keys) & (first >= (queries + 1) * BLOCK)
    return is_seen, is_full


def _numbers(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of keys each block of queries has, (B, 1, blocks), and their numbers before the others."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)


def _audience_end(groups: Tensor, branches: Tensor) -> Tensor:
    """Return the first query behind each key's last one, (B, S)."""
    starts_group = torch.ones_like(groups, dtype=torch.bool)
    starts_group[:, 1:] = (groups[:, 1:] != groups[:, :-1]) | (groups[:, 1:] == NO_GROUP)
    starts_branch = starts_group.clone()
    starts_branch[:, 1:] |= branches[:, 1:] != branches[:, :-1]
    stops = torch.where(branches == TRUNK, _next(starts_group), _next(starts_branch))
    real = (groups != NO_GROUP).sum(dim=1, keepdim=True)
    return torch.where(groups == STEM, real, stops)


def _next(starts: Tensor) -> Tensor:
    """Return for each position where the next piece starts behind it, (B, S); the row's end if none does."""
    length = starts.shape[1]
    places = torch.arange(length, device=starts.device).expand_as(starts).masked_fill(~starts, length)
    behind = torch.nn.functional.pad(places[:, 1:], (0, 1), value=length)
    return behind.flip(1).cummin(dim=1).values.flip(1)


def branch_mask(branches: Tensor, first: int) -> Tensor:
    """Return which keys the positions from `first` on see, in rows with one group each, (B, 1, S - first, S) bool.

    Padding sees the trunk and other padding, so that every position sees something.

    Args:
        branches: (B, S): `TRUNK`, the number of the branch, or a negative number for padding.
        first: length of stem and trunk.
    """
    length = branches.shape[1]
    own, keys = branches[:, None, first:, None], branches[:, None, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=branches.device).tril()[first:]
    return ((keys == TRUNK) | (keys == own)) & causal


def later_mask(branches: Tensor, columns: int) -> Tensor:
    """Return which keys the next token of each branch of each row sees, (B, 1, columns, S) bool, True = sees.

    Args:
        branches: (B, S), of the keys of rows with one group each: `TRUNK`, the number of the branch, or a negative
            number where there is no key.
        columns: queries of a row; the first is for branch 1.
    """
    numbers = torch.arange(1, columns + 1, device=branches.device, dtype=branches.dtype)
    keys = branches[:, None, None, :]
    return (keys == TRUNK) | (keys == numbers[None, None, :, None])
