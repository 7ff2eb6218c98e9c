"""Who sees whom where several questions stand behind one prefix: masks for rows that are trees.

A row holds groups one after the other. A group is a trunk (system prompt, image) and branches (a question and its
answer each) behind it. A position sees what stands before it in its own branch and in its group's trunk, never another
branch and never another group. Because attention is causal the trunk doesn't see the branches, so that each branch
computes what it would compute alone behind its own copy of the trunk, if its position ids restart behind the trunk.

Letters: `B` rows, `S` positions of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

TRUNK = 0
"""Branch number of a group's shared prefix; branches are numbered from 1."""
NO_GROUP = -1
"""Group number of padding, which sees itself alone so that no row of the mask is empty."""


def tree_mask(groups: Tensor, branches: Tensor) -> Tensor:
    """Return which keys each query sees, (B, 1, S, S) bool, True = sees; for attention with a dense mask.

    Args:
        groups: (B, S) int64, number of each position's group, `NO_GROUP` for padding.
        branches: (B, S) int64, `TRUNK` or the number of the branch within the group.
    """
    length = groups.shape[1]
    same_group = groups[:, :, None] == groups[:, None, :]  # (B, S, S)
    on_the_way = (branches[:, None, :] == TRUNK) | (branches[:, :, None] == branches[:, None, :])
    is_real = groups[:, None, :] != NO_GROUP
    causal = groups.new_ones(length, length, dtype=bool).tril()
    itself = groups.new_ones(length, dtype=bool).diag()
    return (same_group & on_the_way & is_real & causal | itself)[:, None]


def block_tree_mask(groups: Tensor, branches: Tensor) -> BlockMask:
    """Return the same mask for FlexAttention, which skips blocks of 128 x 128 that nobody sees; args as `tree_mask`."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        group = groups[batch, query]
        same_group = (group == groups[batch, key]) & (group != NO_GROUP)
        branch = branches[batch, key]
        on_the_way = (branch == TRUNK) | (branch == branches[batch, query])
        return (same_group & on_the_way & (query >= key)) | (query == key)

    rows, length = groups.shape
    return create_block_mask(sees, rows, None, length, length, device=groups.device)


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
