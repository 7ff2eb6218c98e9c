"""Layout of a prefill step in the KV cache: which slot, offset and position id each token has. Pure functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llava.constants import IMAGE_PREFIX
from llava.inference.engine.sequence import PrefixGroup

EMPTY = -1
"""Column of a position that holds no key."""
MULTIPLE = 8
"""Lengths of masks are multiples of it, as fast kernels want; so are numbers of tokens, so that few shapes occur."""


def round_up(number: int, multiple: int = MULTIPLE) -> int:
    """Return the next multiple."""
    return -(-number // multiple) * multiple


class PrefillLayout(NamedTuple):
    """Where the tokens of prefix groups lie, on the CPU: group by group, the image prefix and then the suffixes.

    Attributes:
        columns: (groups, length) int16, column of the sequence that each position of the slots belongs to.
        suffix_ids: (groups, suffix positions) int64, token ids, 0 for padding.
        places: (3, tokens) int64, position id, slot and offset in the slot of each token.
        kept: (2, logits) int64, indices of the positions whose logits are needed, among all tokens and among suffix
            tokens.
    """

    columns: Tensor
    suffix_ids: Tensor
    places: Tensor
    kept: Tensor


def layout_prefill(groups: list[PrefixGroup], system_length: int, prefix_length: int, length: int) -> PrefillLayout:
    """Return the layout of prefix groups in their slots.

    Args:
        groups: in the order of their tokens; each has its slot.
        system_length: positions of the system prefix.
        prefix_length: positions that each image prefix is padded to.
        length: positions that each slot is padded to.
    """
    first = system_length + prefix_length  # offset of the suffixes
    width = length - first
    columns = torch.full((len(groups), length), EMPTY, dtype=torch.int16)
    columns[:, :first] = IMAGE_PREFIX
    all_columns, all_ids, all_positions, kept = [], [], [], []
    for number, group in enumerate(groups):
        columns[number, group.start : first] = EMPTY
        own_columns, own_ids, own_positions = [], [], []
        for sequence in group.sequences:
            ids = sequence.prefill_ids
            own_columns += [sequence.column] * len(ids)
            own_ids += ids
            own_positions += range(group.start, group.start + len(ids))
            end = number * width + len(own_ids)
            n_logits = sequence.request.n_logits
            kept += ((index + (number + 1) * prefix_length, index) for index in range(end - n_logits, end))
        padding = width - len(own_ids)
        all_columns.append(own_columns + [EMPTY] * padding)
        all_ids.append(own_ids + [0] * padding)
        all_positions.append(own_positions + [0] * padding)
    columns[:, first:] = torch.tensor(all_columns, dtype=torch.int16)
    prefix_positions = torch.arange(system_length, first).expand(len(groups), -1)
    positions = torch.cat([prefix_positions, torch.tensor(all_positions)], dim=1)
    slots = torch.tensor([group.slot for group in groups])[:, None].expand_as(positions)
    offsets = torch.arange(system_length, length).expand_as(positions)
    places = torch.stack([positions, slots, offsets]).flatten(1)
    return PrefillLayout(columns, torch.tensor(all_ids), places, torch.tensor(kept).T.contiguous())
