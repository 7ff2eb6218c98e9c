"""The order of training rows where rows share prefixes: those of one prefix in one batch, batches of similar cost.

A cost is a number of positions: a prefix counts once for all of its rows in a batch, what all rows begin with once for
the batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from llava.data.packing import common_prefix, common_stem, sharing_key
from llava.data.records import EncodedRecord

STRETCH = 50
"""Batches of each process among which rows are distributed together."""
LARGEST_SHARE = 0.75
"""Most of a batch that rows of one prefix take: a batch full of them would cost far less than the others."""


class Sharing(NamedTuple):
    """Which rows share a prefix, and what it saves.

    Attributes:
        groups: indices of the rows behind each prefix; a row that shares nothing is alone.
        prefixes: positions of each group's prefix, 0 for rows that are alone.
        rests: positions of each row behind its prefix.
        stem: positions that all rows begin with, a part of every prefix.
    """

    groups: list[list[int]]
    prefixes: list[int]
    rests: list[int]
    stem: int = 0

    @property
    def saves(self) -> bool:
        """Whether any prefix has several rows."""
        return any(self.prefixes)


class _Piece(NamedTuple):
    rows: list[int]
    group: int


def find_sharing(records: Sequence[EncodedRecord], lengths: Sequence[int]) -> Sharing:
    """Find the rows that share a prefix.

    Args:
        records: of the training data.
        lengths: positions of each, patches included.
    """
    sets: dict[Hashable, list[int]] = {}
    for index, record in enumerate(records):
        key = sharing_key(record)
        sets.setdefault(index if key is None else key, []).append(index)
    prefixes, rests = [], list(lengths)
    for members in sets.values():
        shared = 0
        if len(members) > 1:
            first = records[members[0]]
            patches = lengths[members[0]] - len(first.input_ids)
            shared = common_prefix([records[index] for index in members]) + patches
            for index in members:
                rests[index] -= shared
        prefixes.append(shared)
    return Sharing(list(sets.values()), prefixes, rests, common_stem(records))


def batch_costs(order: Sequence[int], batch_size: int, sharing: Sharing) -> list[int]:
    """Return the positions of each batch of an order, at most: fewer rows may agree further than all of a group."""
    group_of = {row: group for group, rows in enumerate(sharing.groups) for row in rows}
    costs = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        groups = {group_of[row] for row in rows}
        whole = sum(sharing.rests[row] for row in rows) + sum(sharing.prefixes[group] for group in groups)
        costs.append(whole - sharing.stem * (len(groups) - 1))
    return costs


def waiting_share(costs: Sequence[int], processes: int) -> float:
    """Return which share of the processes' time is spent waiting for the one with the largest batch, 0..1.

    Args:
        costs: of consecutive batches, dealt out one to each process.
        processes: how many.
    """
    steps = [costs[start : start + processes] for start in range(0, len(costs), processes)]
    whole = [step for step in steps if len(step) == processes]
    spent = processes * sum(map(max, whole))
    return 1 - sum(map(sum, whole)) / spent if spent else 0.0


def shared_order(sharing: Sharing, batch_size: int, processes: int, generator: torch.Generator) -> list[int]:
    """Return an order of all rows in which each `batch_size` consecutive ones are a batch.

    Groups come in random order; stretches of them are distributed over batches of equal size and similar cost, a group
    as a whole where it fits. Batches that the processes compute at the same time are those of most similar cost, and
    such steps come in random order. Only the last batch may be smaller.

    Args:
        sharing: of the data.
        batch_size: rows of a batch.
        processes: that share the batches, one each at a time.
        generator: of the randomness.
    """
    pieces = _shuffled_pieces(sharing, max(1, int(batch_size * LARGEST_SHARE)), generator)
    steps, last = [], []
    for stretch in _cut_stretches(pieces, STRETCH * processes * batch_size):
        batches = _distribute(stretch, batch_size, sharing)
        short = [batch for batch in batches if len(batch) < batch_size]
        whole = [batch for batch in batches if len(batch) == batch_size]
        costs = dict(zip(map(id, whole), _costs(whole, batch_size, sharing), strict=True))
        whole.sort(key=lambda batch: costs[id(batch)])
        complete = len(whole) // processes * processes
        steps += [whole[first : first + processes] for first in range(0, complete, processes)]
        last += whole[complete:] + short
    order = torch.randperm(len(steps), generator=generator).tolist()
    return [row for batch in [*(batch for step in order for batch in steps[step]), *last] for row in batch]


def _costs(batches: Sequence[Sequence[int]], batch_size: int, sharing: Sharing) -> list[int]:
    return batch_costs([row for batch in batches for row in batch], batch_size, sharing)


def _shuffled_pieces(sharing: Sharing, largest: int, generator: torch.Generator) -> list[_Piece]:
    """Shuffle groups and the rows in them; divide those above `largest` rows evenly."""
    pieces = []
    for group in torch.randperm(len(sharing.groups), generator=generator).tolist():
        rows = sharing.groups[group]
        if len(rows) > 1:
            rows = [rows[position] for position in torch.randperm(len(rows), generator=generator).tolist()]
        count = -(-len(rows) // largest)
        pieces += [_Piece(rows[part::count], group) for part in range(count)]
    return pieces


def _cut_stretches(pieces: Sequence[_Piece], size: int) -> Iterator[list[_Piece]]:
    """Yield stretches of exactly `size` rows, the last one of what is left; a piece on the border is cut."""
    stretch: list[_Piece] = []
    room = size
    for piece in pieces:
        rows = piece.rows
        while len(rows) >= room:
            yield [*stretch, _Piece(rows[:room], piece.group)]
            stretch, rows, room = [], rows[room:], size
        if rows:
            stretch.append(_Piece(rows, piece.group))
            room -= len(rows)
    if stretch:
        yield stretch


def _distribute(stretch: Sequence[_Piece], batch_size: int, sharing: Sharing) -> list[list[int]]:
    """Distribute pieces over batches of `batch_size` rows, the last one of what is left, with similar costs.

    The pieces with most rows for their positions come first, each into the batch with room for it that has most rows
    left for the positions left to it; where none has room, the piece is cut.
    """

    def cost(piece: _Piece) -> int:
        return sharing.prefixes[piece.group] + sum(sharing.rests[row] for row in piece.rows) - sharing.stem

    total = sum(len(piece.rows) for piece in stretch)
    count = -(-total // batch_size)
    room = [batch_size] * (count - 1) + [total - batch_size * (count - 1)]
    share = sum(map(cost, stretch)) / total
    # What a batch may still cost; never nothing, so that a batch that is too dear already comes last.
    budget = [share * rows for rows in room]
    batches: list[list[int]] = [[] for _ in room]
    for piece in sorted(stretch, key=lambda piece: -len(piece.rows) / cost(piece)):
        rows = piece.rows
        while rows:
            taker = max(
                range(count),
                key=lambda batch: (min(room[batch], len(rows)), room[batch] / max(budget[batch], share / 2)),
            )
            taken, rows = rows[: room[taker]], rows[room[taker] :]
            batches[taker] += taken
            room[taker] -= len(taken)
            budget[taker] -= cost(_Piece(taken, piece.group))
    return batches


class SharedPrefixSampler(Sampler[int]):
    """Rows in the order of `shared_order`, another one each epoch, the same for the same seed and epoch.

    Args:
        sharing, batch_size, processes: see `shared_order`.
        seed: of the order.
    """

    def __init__(self, sharing: Sharing, batch_size: int, processes: int, seed: int) -> None:
        self.sharing = sharing
        self.batch_size = batch_size
        self.processes = processes
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; the trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sharing.rests)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order())

    def order(self) -> list[int]:
        """Return the order of the epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return shared_order(self.sharing, self.batch_size, self.processes, generator)

    def costs(self) -> list[int]:
        """Return the positions of each batch of the epoch, at most."""
        return batch_costs(self.order(), self.batch_size, self.sharing)
