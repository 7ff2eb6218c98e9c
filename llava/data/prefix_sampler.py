"""Sampler that puts records of one image prefix into one batch, and batches of similar cost side by side.

The cost of a batch is its number of positions: an image prefix counts once for all of its records in a batch, the
system prefix that all records share once for the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from llava.data.length_sampler import MEGABATCH
from llava.data.packing import group_records, system_prefix_length
from llava.data.records import EncodedRecord

LARGEST_SHARE = 0.75
"""Most of a batch that records of one prefix take: a batch full of them would cost far less than the others."""


class Sharing(NamedTuple):
    """Which records share an image prefix, and what it saves.

    Attributes:
        groups: indices of the records of each prefix; a record that shares nothing is alone.
        prefixes: positions of each group's prefix, 0 for records that are alone.
        suffixes: positions of each record after its prefix.
        system_prefix: positions that all records begin with, a part of every prefix.
    """

    groups: list[list[int]]
    prefixes: list[int]
    suffixes: list[int]
    system_prefix: int = 0

    @property
    def saves(self) -> bool:
        """Whether any prefix has several records."""
        return any(self.prefixes)


class _Piece(NamedTuple):
    members: list[int]
    group: int


def find_sharing(records: Sequence[EncodedRecord], lengths: Sequence[int]) -> Sharing:
    """Find the records that share an image prefix.

    Args:
        records: of the training data.
        lengths: positions of each, patches included.
    """
    groups, prefixes, suffixes = group_records(records, lengths), [], list(lengths)
    for members, prefix in groups:
        first, shared = members[0], 0
        if len(members) > 1:
            shared = prefix + lengths[first] - len(records[first].input_ids)
            for index in members:
                suffixes[index] -= shared
        prefixes.append(shared)
    return Sharing([group.members for group in groups], prefixes, suffixes, system_prefix_length(records))


def batch_costs(order: Sequence[int], batch_size: int, sharing: Sharing) -> list[int]:
    """Return the positions of each batch of an order, an upper bound: part of a group may share a longer prefix."""
    group_of = {index: group for group, members in enumerate(sharing.groups) for index in members}
    costs = []
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        groups = {group_of[index] for index in batch}
        whole = sum(sharing.suffixes[index] for index in batch) + sum(sharing.prefixes[group] for group in groups)
        costs.append(whole - sharing.system_prefix * (len(groups) - 1))
    return costs


def waiting_share(costs: Sequence[int], processes: int) -> float:
    """Return the share of time that processes wait for the one with the largest batch, 0..1.

    Args:
        costs: of consecutive batches, dealt out one to each process.
        processes: how many.
    """
    steps = [costs[start : start + processes] for start in range(0, len(costs), processes)]
    whole = [step for step in steps if len(step) == processes]
    spent = processes * sum(map(max, whole))
    return 1 - sum(map(sum, whole)) / spent if spent else 0.0


def shared_order(sharing: Sharing, batch_size: int, processes: int, generator: torch.Generator) -> list[int]:
    """Return an order of all records in which every `batch_size` consecutive ones are a batch.

    Groups are shuffled and cut into megabatches, each of which is distributed over batches of equal size and similar
    cost, a group as a whole where it fits. Batches of one step, one per process, are those of most similar cost; the
    steps come in random order. Only the last batch may be smaller.

    Args:
        sharing: of the data.
        batch_size: records of a batch.
        processes: world size; each computes one batch of a step.
        generator: of the randomness.
    """
    pieces = _shuffled_pieces(sharing, max(1, int(batch_size * LARGEST_SHARE)), generator)
    steps, last = [], []
    for megabatch in _cut_megabatches(pieces, MEGABATCH * processes * batch_size):
        batches = _distribute(megabatch, batch_size, sharing)
        short = [batch for batch in batches if len(batch) < batch_size]
        whole = [batch for batch in batches if len(batch) == batch_size]
        costs = batch_costs([index for batch in whole for index in batch], batch_size, sharing)
        whole = [whole[position] for position in sorted(range(len(whole)), key=costs.__getitem__)]
        complete = len(whole) // processes * processes
        steps += [whole[first : first + processes] for first in range(0, complete, processes)]
        last += whole[complete:] + short
    order = torch.randperm(len(steps), generator=generator).tolist()
    return [index for batch in [*(batch for step in order for batch in steps[step]), *last] for index in batch]


def _shuffled_pieces(sharing: Sharing, largest: int, generator: torch.Generator) -> list[_Piece]:
    """Shuffle groups and the records in them; divide those above `largest` records evenly."""
    pieces = []
    for group in torch.randperm(len(sharing.groups), generator=generator).tolist():
        members = sharing.groups[group]
        if len(members) > 1:
            members = [members[position] for position in torch.randperm(len(members), generator=generator).tolist()]
        count = -(-len(members) // largest)
        pieces += [_Piece(members[part::count], group) for part in range(count)]
    return pieces


def _cut_megabatches(pieces: Sequence[_Piece], size: int) -> Iterator[list[_Piece]]:
    """Yield megabatches of exactly `size` records, the last one of what is left; a piece on the border is cut."""
    megabatch: list[_Piece] = []
    room = size
    for piece in pieces:
        members = piece.members
        while len(members) >= room:
            yield [*megabatch, _Piece(members[:room], piece.group)]
            megabatch, members, room = [], members[room:], size
        if members:
            megabatch.append(_Piece(members, piece.group))
            room -= len(members)
    if megabatch:
        yield megabatch


def _distribute(megabatch: Sequence[_Piece], batch_size: int, sharing: Sharing) -> list[list[int]]:
    """Distribute pieces over batches of `batch_size` records and similar cost; the last batch takes what is left.

    The pieces with most records for their positions come first, each into the batch with room for it that has most
    records left for the positions left to it; where none has room, the piece is cut.
    """

    def cost(piece: _Piece) -> int:
        return (
            sharing.prefixes[piece.group]
            + sum(sharing.suffixes[index] for index in piece.members)
            - sharing.system_prefix
        )

    total = sum(len(piece.members) for piece in megabatch)
    count = -(-total // batch_size)
    room = [batch_size] * (count - 1) + [total - batch_size * (count - 1)]
    share = sum(map(cost, megabatch)) / total
    # Positions left to each batch; the floor below ranks a batch that is over its budget last.
    budget = [share * places for places in room]
    batches: list[list[int]] = [[] for _ in room]
    for piece in sorted(megabatch, key=lambda piece: -len(piece.members) / cost(piece)):
        members = piece.members
        while members:
            taker = max(
                range(count),
                key=lambda batch: (min(room[batch], len(members)), room[batch] / max(budget[batch], share / 2)),
            )
            taken, members = members[: room[taker]], members[room[taker] :]
            batches[taker] += taken
            room[taker] -= len(taken)
            budget[taker] -= cost(_Piece(taken, piece.group))
    return batches


class SharedPrefixSampler(Sampler[int]):
    """Records in the order of `shared_order`; seed and epoch decide it.

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
        return len(self.sharing.suffixes)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order())

    def order(self) -> list[int]:
        """Return the order of the epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return shared_order(self.sharing, self.batch_size, self.processes, generator)

    def costs(self) -> list[int]:
        """Return the positions of each batch of the epoch, at most."""
        return batch_costs(self.order(), self.batch_size, self.sharing)
