"""Rows of a cache of trees, and where their tokens lie: `[stem | trunk | branches | answers as they grow]`.

Letters as in `llava/inference/tree_cache.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from llava.constants import TRUNK
from llava.inference.grouping import Branch, Group

NOBODY = -1
"""Branch number of a position that holds nothing."""
MULTIPLE = 8
"""Lengths of masks are multiples of it, as fast kernels want; so are numbers of tokens, so that few shapes occur."""


@dataclass(eq=False)
class Row:
    """A group with its pictures, in a cache or about to be.

    Attributes:
        group: its branches that are not finished.
        pixels: on the CPU, one tensor per picture, to begin again if memory runs out.
        trunk_embeds: (T, D) of the group's trunk.
        slot: number of the row; this and what follows is set when the group is put into a cache.
        start: position id of the first token of a branch.
        fill: first position that holds nothing.
        columns: number of each branch that is not finished, from 1.
        is_released: its place in the cache is given away, as its last tokens are computed.
    """

    group: Group
    pixels: list[Tensor]
    trunk_embeds: Tensor
    slot: int = -1
    start: int = 0
    fill: int = 0
    columns: dict[Branch, int] = field(default_factory=dict)
    is_released: bool = False

    @property
    def trunk_length(self) -> int:
        """Positions of the trunk."""
        return len(self.trunk_embeds)

    @property
    def length(self) -> int:
        """Positions of trunk and branches."""
        return self.trunk_length + self.group.branch_length


def round_up(number: int, multiple: int = MULTIPLE) -> int:
    """Return the next multiple."""
    return -(-number // multiple) * multiple


class Layout(NamedTuple):
    """Where the tokens of groups lie, on the CPU: row by row, the trunk and behind it the branches.

    Attributes:
        owners: (r, L) int16, branch number of each position of the rows.
        branch_ids: (r, Q) int64, token ids of the branches, 0 where there is none.
        places: (3, r (T + Q)) int64, position id, row of the cache, and place in it of each token.
        kept: (2, M) int64, indices of the positions whose logits are wanted, among all tokens and among the branches'.
    """

    owners: Tensor
    branch_ids: Tensor
    places: Tensor
    kept: Tensor


def lay_out(rows: Sequence[Row], stem: int, trunk: int, length: int) -> Layout:
    """Return the layout of groups whose trunks are padded to `trunk` positions and whose rows to `length`."""
    width = length - stem - trunk  # Q
    owners = torch.full((len(rows), length), NOBODY, dtype=torch.int16)
    owners[:, : stem + trunk] = TRUNK
    own, ids, behind, kept = [], [], [], []
    for number, row in enumerate(rows):
        owners[number, row.start : stem + trunk] = NOBODY
        row_own, row_ids, positions = [], [], []
        for branch, column in row.columns.items():
            tokens = branch.tokens
            row_own += [column] * len(tokens)
            row_ids += tokens
            positions += range(row.start, row.start + len(tokens))
            end = number * width + len(row_ids)
            kept += ((index + (number + 1) * trunk, index) for index in range(end - branch.ask.n_kept, end))
        padding = width - len(row_ids)
        own.append(row_own + [NOBODY] * padding)
        ids.append(row_ids + [0] * padding)
        behind.append(positions + [0] * padding)
    owners[:, stem + trunk :] = torch.tensor(own, dtype=torch.int16)
    back = torch.tensor(behind)
    positions = torch.cat([torch.arange(stem, stem + trunk).expand(len(rows), -1), back], dim=1)
    slots = torch.tensor([row.slot for row in rows])[:, None].expand_as(positions)
    in_row = torch.arange(stem, length).expand_as(positions)
    places = torch.stack([positions, slots, in_row]).flatten(1)
    return Layout(owners, torch.tensor(ids), places, torch.tensor(kept).T.contiguous())
