"""Records behind the prefixes they share: which records belong together, and where each of their tokens stands.

Records with the same images whose ids agree up to the last image form a `Group`: a trunk, which they have in common,
and one branch each. The trunk holds all the images and nothing that is supervised, and ends before the token that
predicts a record's first supervised one. Records without images, or with supervised text before their last image, are
groups of their own: a trunk without branches. A pack lays groups out one after the other in rows. What all groups of a
row begin with, the system prompt as a rule, stands before them once, as the row's stem.
`llava.model.tree_attention` says who sees whom.

Letters: `R` rows of a pack, `S` positions of a row, `M` positions of all images.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, NO_GROUP, STEM, TRUNK
from llava.data.records import EncodedRecord

BLOCK = 128
"""Positions that FlexAttention handles at once; the smallest step of padded lengths."""


class Group(NamedTuple):
    """Records behind one trunk.

    Attributes:
        members: their indices.
        trunk: tokens they share, an image counting as one; of a single record all of them.
    """

    members: list[int]
    trunk: int


class Pack(NamedTuple):
    """One batch.

    Attributes:
        input_ids: (R, S) int64, 0 in the place of patches and padding.
        labels: (R, S) int64; the label of a group's first position is `IGNORE_INDEX`, as nothing predicts it.
        position_ids: (R, S) int64, of each branch counting on from its trunk's end.
        groups: (R, S) int64, from 0 in each row, `STEM` for its stem, `NO_GROUP` for padding.
        branches: (R, S) int64, `TRUNK` or the number of the branch within its group.
        supervised: (K,) int64, flat indices of the positions that predict a supervised token, which stands behind them.
        image_positions: (M,) int64, flat indices of the positions that images take.
        patches: (M,) int64, which of all images' features, one after the other, stands there.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    groups: Tensor
    branches: Tensor
    supervised: Tensor
    image_positions: Tensor
    patches: Tensor


def sharing_key(record: EncodedRecord) -> Hashable | None:
    """Return what records must have in common to share a prefix; None if this one can't."""
    shared = record.input_ids[: _end_of_images(record)]
    if not record.images or len(shared) > last_shareable(record):
        return None
    return tuple(os.fspath(path) for path in record.images), tuple(shared)


def last_shareable(record: EncodedRecord) -> int:
    """Return how many tokens of a record may be in a trunk: all that don't predict a supervised one."""
    first = next((index for index, label in enumerate(record.labels) if label != IGNORE_INDEX), len(record.labels))
    return max(first - 1, 0)


def common_prefix(records: Sequence[EncodedRecord]) -> int:
    """Return the length of the longest trunk of records with the same `sharing_key`, in tokens."""
    limit = min(map(last_shareable, records))
    return agreement([record.input_ids[:limit] for record in records])


def common_stem(records: Sequence[EncodedRecord]) -> int:
    """Return how many tokens all records begin with, before any image or supervised token's predictor."""
    return agreement([record.input_ids[: min(_start_of_images(record), last_shareable(record))] for record in records])


def agreement(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many elements all sequences begin with."""
    first, last = min(sequences), max(sequences)  # what these two agree in, all that lie between them do
    return next(
        (index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )


def group_records(records: Sequence[EncodedRecord], lengths: Sequence[int], budget: int | None = None) -> list[Group]:
    """Find the groups of a batch, in the order of their first members.

    Args:
        records: of the batch.
        lengths: positions of each record, patches included.
        budget: most positions of a group; what is above it starts another group, a record alone may be longer. None =
            no limit.
    """
    sets: dict[Hashable, list[int]] = {}
    for index, record in enumerate(records):
        key = sharing_key(record)
        sets.setdefault(index if key is None else key, []).append(index)
    return [group for members in sets.values() for group in _divide(members, records, lengths, budget)]


def _divide(
    members: Sequence[int], records: Sequence[EncodedRecord], lengths: Sequence[int], budget: int | None
) -> Iterator[Group]:
    trunk = common_prefix([records[index] for index in members])
    patches = lengths[members[0]] - len(records[members[0]].input_ids)  # what the images add, the same in all of them
    taken: list[int] = []
    size = 0
    for index in members:
        branch = lengths[index] - patches - trunk
        if taken and budget is not None and size + branch > budget:
            yield _group(taken, records, trunk)
            taken = []
        size = size + branch if taken else lengths[index]
        taken.append(index)
    yield _group(taken, records, trunk)


def _group(members: list[int], records: Sequence[EncodedRecord], trunk: int) -> Group:
    return Group(members, trunk if len(members) > 1 else len(records[members[0]].input_ids))


def group_length(group: Group, records: Sequence[EncodedRecord], lengths: Sequence[int]) -> int:
    """Return how many positions a group takes."""
    first, *others = group.members
    return lengths[first] + sum(len(records[index].input_ids) - group.trunk for index in others)


def fill_rows(lengths: Sequence[int], budget: int | None) -> list[list[int]]:
    """Distribute groups over rows of at most `budget` positions: the longest first, each into the first row with room.

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
    """Lay records out behind the prefixes they share.

    Args:
        records: of the batch.
        features: of each record and each of its images, which of all images' features are its own; records that share
            an image name the same ones.
        budget: most positions of a row, unless a record alone is longer; None = one row for all.
        multiple: see `padded_length`.
        lengths: see `padded_length`.
    """
    whole = [
        len(record.input_ids) + sum(len(image) - 1 for image in images)
        for record, images in zip(records, features, strict=True)
    ]
    groups = group_records(records, whole, budget)
    rows = fill_rows([group_length(group, records, whole) for group in groups], budget)
    columns = [_lay_out_row([groups[index] for index in row], records, features) for row in rows]
    length = padded_length(max(len(row[0]) for row in columns), multiple, lengths)
    padding = (0, IGNORE_INDEX, 0, NO_GROUP, TRUNK, -1)
    input_ids, labels, position_ids, numbers, branches, patches = (
        torch.from_numpy(
            numpy.stack(
                [numpy.pad(row[column], (0, length - len(row[column])), constant_values=value) for row in columns]
            )
        )
        for column, value in enumerate(padding)
    )
    supervised = (labels.flatten()[1:] != IGNORE_INDEX).nonzero().flatten()
    image_positions = (patches.flatten() >= 0).nonzero().flatten()
    return Pack(
        input_ids,
        labels,
        position_ids,
        numbers,
        branches,
        supervised,
        image_positions,
        patches.flatten()[image_positions],
    )


def padded_length(positions: int, multiple: int, lengths: Sequence[int] = ()) -> int:
    """Return the shortest of some lengths that so many positions fit into; where none is, a multiple of `multiple`."""
    fitting = [length for length in lengths if length >= positions]
    return min(fitting, default=-(-positions // multiple) * multiple)


_Columns = list[numpy.ndarray]
"""input_ids, labels, position_ids, group, branch, patch or -1: equally long."""


def _concatenate(pieces: Sequence[_Columns]) -> _Columns:
    return [numpy.concatenate(column) for column in zip(*pieces, strict=True)]


def _lay_out_row(
    groups: Sequence[Group], records: Sequence[EncodedRecord], features: Sequence[Sequence[range]]
) -> _Columns:
    """Return the positions of a row."""
    firsts = [records[group.members[0]] for group in groups]
    stem = common_stem(firsts) if len(groups) > 1 else 0
    pieces = [_segment(firsts[0], slice(0, stem), (), 0, STEM, TRUNK)]
    for number, group in enumerate(groups):
        pieces += _lay_out(group, number, stem, records, features)
    return _concatenate(pieces)


def _lay_out(
    group: Group, number: int, stem: int, records: Sequence[EncodedRecord], features: Sequence[Sequence[range]]
) -> list[_Columns]:
    """Return the positions of a group, the `number`th of its row, behind the row's stem."""
    first = records[group.members[0]]
    pieces = [_segment(first, slice(stem, group.trunk), features[group.members[0]], stem, number, TRUNK)]
    pieces[0][1][:1] = IGNORE_INDEX
    start = stem + len(pieces[0][0])
    if len(group.members) > 1:
        rest = slice(group.trunk, None)
        for branch, index in enumerate(group.members, start=1):
            pieces.append(_segment(records[index], rest, (), start, number, branch))
    return pieces


def _segment(
    record: EncodedRecord, part: slice, images: Sequence[range], start: int, group: int, branch: int
) -> _Columns:
    """Return the positions of a part of a record, counting from `start`."""
    ids, labels = (numpy.array(values[part], dtype=numpy.int64) for values in (record.input_ids, record.labels))
    places = numpy.flatnonzero(ids == IMAGE_TOKEN_INDEX)
    counts = numpy.ones_like(ids)
    counts[places] = [len(image) for image in images]
    ids, labels = ids.repeat(counts), labels.repeat(counts)
    is_image = ids == IMAGE_TOKEN_INDEX
    patches = numpy.full_like(ids, -1)
    patches[is_image] = [patch for image in images for patch in image]
    positions = numpy.arange(start, start + len(ids))
    return [
        numpy.where(is_image, 0, ids),
        labels,
        positions,
        numpy.full_like(ids, group),
        numpy.full_like(ids, branch),
        patches,
    ]


def _start_of_images(record: EncodedRecord) -> int:
    ids = record.input_ids
    return ids.index(IMAGE_TOKEN_INDEX) if IMAGE_TOKEN_INDEX in ids else len(ids)


def _end_of_images(record: EncodedRecord) -> int:
    ids = record.input_ids
    return len(ids) - ids[::-1].index(IMAGE_TOKEN_INDEX) if IMAGE_TOKEN_INDEX in ids else 0
