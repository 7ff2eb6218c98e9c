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

    What a query sees are then three stretches of keys, known from the query alone: less to look up in each block.

    Args:
        groups: as in `tree_mask`, padding behind everything else.
        branches: as in `tree_mask`.
    """
    bounds = (bound.to(torch.int32) for bound in _stretches(groups, branches))
    stem_stop, trunk_start, trunk_stop, branch_start = bounds

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_stem = key < stem_stop[batch, query]
        in_trunk = (key >= trunk_start[batch, query]) & (key < trunk_stop[batch, query])
        return (in_stem | in_trunk | (key >= branch_start[batch, query])) & (query >= key)

    rows, length = groups.shape
    return create_block_mask(sees, rows, None, length, length, device=groups.device)


def _stretches(groups: Tensor, branches: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return where each position's stem stops, its trunk starts and stops, and its branch starts, (B, S) each."""
    positions = torch.arange(groups.shape[1], device=groups.device).expand_as(groups)
    new_group = torch.ones_like(groups, dtype=torch.bool)
    new_group[:, 1:] = (groups[:, 1:] != groups[:, :-1]) | (groups[:, 1:] == NO_GROUP)
    new_branch = new_group.clone()
    new_branch[:, 1:] |= branches[:, 1:] != branches[:, :-1]
    group_start = (positions * new_group).cummax(dim=1).values
    branch_start = (positions * new_branch).cummax(dim=1).values
    is_trunk = (branches == TRUNK).long()
    trunk_seen = is_trunk.cumsum(dim=1)
    before_group = (trunk_seen - is_trunk).gather(1, group_start)
    stem_stop = (groups == STEM).sum(dim=1, keepdim=True) * (groups != NO_GROUP)
    return stem_stop, group_start, group_start + trunk_seen - before_group, branch_start


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
