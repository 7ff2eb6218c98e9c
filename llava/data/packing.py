"""Pack records that share an image prefix: the tokens of a batch, with every shared prefix laid out once.

A prefix group is a set of records with the same images whose ids agree up to the last image. Its image prefix stands
once, followed by one suffix per record. The prefix holds all images and no supervised token, and ends before the token
that predicts a record's first supervised one. Records without images, or with supervised text before their last image,
are groups of their own, without suffixes. A row of a pack holds groups one after the other. What all groups of a row
begin with, usually the system prompt, stands once before them as the row's system prefix.
`llava.model.packed.masks` says which positions attend to which.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_PREFIX, IMAGE_TOKEN_INDEX, NO_GROUP, SYSTEM_PREFIX
from llava.data.records import EncodedRecord

_PADDING = numpy.array([0, IGNORE_INDEX, 0, NO_GROUP, IMAGE_PREFIX, -1])
"""What a position of padding holds in each column: input_ids, labels, position_ids, group, suffix, patch."""


class RecordGroup(NamedTuple):
    """Records that share an image prefix.

    Attributes:
        members: their indices.
        prefix: tokens they share, an image counting as one; all tokens of a record that is alone.
    """

    members: list[int]
    prefix: int


class Pack(NamedTuple):
    """Model inputs of one batch: (B, S) int64 columns, and flat indices into them.

    Attributes:
        input_ids: 0 where patches or padding stand.
        labels: `IGNORE_INDEX` also at the first position of a group, which no token predicts.
        position_ids: each suffix counts on from the end of its group's prefix.
        groups: from 0 in each row; `SYSTEM_PREFIX` for the row's system prefix, `NO_GROUP` for padding.
        suffixes: from 1 in each group; `IMAGE_PREFIX` for its prefix.
        supervised: flat indices of the positions that predict a supervised token, which is the next one.
        image_positions: flat indices of the positions that image patches take.
        patches: index of the patch at each of these, among the patches of all images of the batch.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    groups: Tensor
    suffixes: Tensor
    supervised: Tensor
    image_positions: Tensor
    patches: Tensor


def sharing_key(record: EncodedRecord) -> Hashable | None:
    """Return what records must have in common to share an image prefix; None if this one can't."""
    shared = record.input_ids[: _end_of_images(record)]
    if not record.images or len(shared) > _longest_prefix(record):
        return None
    return tuple(os.fspath(path) for path in record.images), tuple(shared)


def image_prefix_length(records: Sequence[EncodedRecord]) -> int:
    """Return how many tokens records with the same `sharing_key` share, without a predictor of a supervised token."""
    limit = min(map(_longest_prefix, records))
    return common_prefix_length([record.input_ids[:limit] for record in records])


def system_prefix_length(records: Sequence[EncodedRecord]) -> int:
    """Return how many tokens all records begin with, before any image or predictor of a supervised token."""
    return common_prefix_length(
        [record.input_ids[: min(_start_of_images(record), _longest_prefix(record))] for record in records]
    )


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest common prefix."""
    first, last = min(sequences), max(sequences)  # all sequences lie between these two, so they agree as far
    pairs = enumerate(zip(first, last, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(last)))


def _longest_prefix(record: EncodedRecord) -> int:
    """Return how many tokens of a record a prefix may hold: those before the predictor of its first supervised one."""
    first = next((index for index, label in enumerate(record.labels) if label != IGNORE_INDEX), len(record.labels))
    return max(first - 1, 0)


def _start_of_images(record: EncodedRecord) -> int:
    ids = record.input_ids
    return ids.index(IMAGE_TOKEN_INDEX) if IMAGE_TOKEN_INDEX in ids else len(ids)


def _end_of_images(record: EncodedRecord) -> int:
    ids = record.input_ids
    return len(ids) - ids[::-1].index(IMAGE_TOKEN_INDEX) if IMAGE_TOKEN_INDEX in ids else 0


def group_records(
    records: Sequence[EncodedRecord], lengths: Sequence[int], budget: int | None = None
) -> list[RecordGroup]:
    """Find the prefix groups of records, in the order of their first members.

    Args:
        records: of a batch, or of all training data.
        lengths: positions of each record, patches included.
        budget: most positions of a group; larger ones are split, and a record alone may be longer. None = no limit.
    """
    by_key: dict[Hashable, list[int]] = {}
    for index, record in enumerate(records):
        key = sharing_key(record)
        by_key.setdefault(index if key is None else key, []).append(index)
    return [group for members in by_key.values() for group in _split(members, records, lengths, budget)]


def _split(
    members: Sequence[int], records: Sequence[EncodedRecord], lengths: Sequence[int], budget: int | None
) -> list[RecordGroup]:
    prefix = image_prefix_length([records[index] for index in members])
    first = members[0]
    prefix_positions = prefix + lengths[first] - len(records[first].input_ids)  # the same images in all of them
    parts: list[list[int]] = []
    size = 0
    for index in members:
        suffix = lengths[index] - prefix_positions
        if parts and (budget is None or size + suffix <= budget):
            parts[-1].append(index)
            size += suffix
        else:
            parts.append([index])
            size = lengths[index]
    return [RecordGroup(part, prefix if len(part) > 1 else len(records[part[0]].input_ids)) for part in parts]


def group_length(group: RecordGroup, records: Sequence[EncodedRecord], lengths: Sequence[int]) -> int:
    """Return how many positions a group takes."""
    first, *others = group.members
    return lengths[first] + sum(len(records[index].input_ids) - group.prefix for index in others)


def fill_rows(lengths: Sequence[int], budget: int | None) -> list[list[int]]:
    """Bin-pack groups into rows of at most `budget` positions: first fit, longest first.

    Args:
        lengths: of the groups; one above the budget gets a row of its own.
        budget: None = one row for all.

    Returns:
        the groups' indices, ascending within a row.
    """
    if budget is None:
        return [list(range(len(lengths)))]
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda group: -lengths[group]):
        row = next((row for row, left in enumerate(room) if lengths[index] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(budget)
        rows[row].append(index)
        room[row] -= lengths[index]
    return [sorted(row) for row in rows]


def pack_records(
    records: Sequence[EncodedRecord],
    features: Sequence[Sequence[range]],
    *,
    budget: int | None = None,
    multiple: int = 1,
    lengths: Sequence[int] = (),
) -> Pack:
    """Pack the records of a batch.

    Args:
        records: of the batch.
        features: for each record and each of its images, the indices of the image's patches among those of all images;
            records that share an image name the same ones.
        budget: most positions of a row, unless a record alone is longer; None = one row for all.
        multiple: see `padded_length`.
        lengths: see `padded_length`.
    """
    positions = [
        len(record.input_ids) + sum(len(image) - 1 for image in images)
        for record, images in zip(records, features, strict=True)
    ]
    groups = group_records(records, positions, budget)
    filled = fill_rows([group_length(group, records, positions) for group in groups], budget)
    rows = [_lay_out_row([groups[index] for index in row], records, features) for row in filled]
    length = padded_length(max(row.shape[1] for row in rows), multiple, lengths)
    columns = numpy.empty((len(_PADDING), len(rows), length), dtype=numpy.int64)
    columns[:] = _PADDING[:, None, None]
    for number, row in enumerate(rows):
        columns[:, number, : row.shape[1]] = row
    *tokens, patches = torch.from_numpy(columns)
    labels, patches = tokens[1], patches.flatten()
    supervised = (labels.flatten()[1:] != IGNORE_INDEX).nonzero().flatten()
    image_positions = (patches >= 0).nonzero().flatten()
    return Pack(*tokens, supervised, image_positions, patches[image_positions])


def padded_length(positions: int, multiple: int, lengths: Sequence[int] = ()) -> int:
    """Return the shortest of `lengths` that holds these positions; if none does, the next multiple of `multiple`."""
    fitting = [length for length in lengths if length >= positions]
    return min(fitting, default=-(-positions // multiple) * multiple)


def _lay_out_row(
    groups: Sequence[RecordGroup], records: Sequence[EncodedRecord], features: Sequence[Sequence[range]]
) -> numpy.ndarray:
    """Return the columns of `_PADDING` for a row of groups, (6, positions) int64."""
    firsts = [records[group.members[0]] for group in groups]
    system = system_prefix_length(firsts) if len(groups) > 1 else 0
    pieces = [_lay_out(firsts[0], slice(0, system), (), 0, SYSTEM_PREFIX, IMAGE_PREFIX)]
    for number, group in enumerate(groups):
        first, *_ = group.members
        prefix = _lay_out(records[first], slice(system, group.prefix), features[first], system, number, IMAGE_PREFIX)
        prefix[1, :1] = IGNORE_INDEX
        pieces.append(prefix)
        if len(group.members) > 1:
            start, rest = system + prefix.shape[1], slice(group.prefix, None)
            for suffix, index in enumerate(group.members, start=1):
                pieces.append(_lay_out(records[index], rest, (), start, number, suffix))
    return numpy.concatenate(pieces, axis=1)


def _lay_out(
    record: EncodedRecord, part: slice, images: Sequence[range], start: int, group: int, suffix: int
) -> numpy.ndarray:
    """Return the columns of `_PADDING` for a part of a record whose positions count from `start`."""
    ids, labels = (numpy.array(values[part], dtype=numpy.int64) for values in (record.input_ids, record.labels))
    counts = numpy.ones_like(ids)
    counts[ids == IMAGE_TOKEN_INDEX] = [len(image) for image in images]
    ids, labels = ids.repeat(counts), labels.repeat(counts)
    is_image = ids == IMAGE_TOKEN_INDEX
    ids[is_image] = 0
    columns = numpy.empty((len(_PADDING), len(ids)), dtype=numpy.int64)
    columns[0], columns[1], columns[2] = ids, labels, numpy.arange(start, start + len(ids))
    columns[3], columns[4], columns[5] = group, suffix, -1
    columns[5, is_image] = [patch for image in images for patch in image]
    return columns
