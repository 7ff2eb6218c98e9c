"""Keys and values of many groups: a row each, `[stem | trunk | branches | answers as they grow]`.

The stem is computed once and stands in every row. A row's questions share its stem and trunk; a token of an answer is
put behind everything else of its row, and marked with its branch, which decides who sees it.

Letters: `R` rows, `C` positions of a row, `P` of the stem, `T` of the longest trunk, `Q` of the longest branches; `K`,
`d`, `H` as in `llava/model/flat_llama.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.inference.grouping import Branch, Group
from llava.model.flat_llama import FlatLlama, additive, attend_dense
from llava.model.tree_attention import NO_GROUP, TRUNK, later_mask, tree_mask

NOBODY = -1
"""Branch number of a position that holds nothing."""
MULTIPLE = 16
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
    """

    group: Group
    pixels: list[Tensor]
    trunk_embeds: Tensor
    slot: int = -1
    start: int = 0
    fill: int = 0
    columns: dict[Branch, int] = field(default_factory=dict)

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


def row_bytes(llama: FlatLlama, capacity: int) -> int:
    """Return the size of a row of so many positions."""
    keys, width = llama.key_shape
    return 2 * llama.n_layers * capacity * keys * width * llama.dtype.itemsize


class TreeCache:
    """Rows of one capacity.

    Args:
        llama: computes keys and values.
        stem_ids: of the run; may be empty.
        n_rows: R.
        capacity: C, a multiple of `MULTIPLE`.

    Raises:
        torch.OutOfMemoryError: if they don't fit.
    """

    def __init__(self, llama: FlatLlama, stem_ids: Sequence[int], n_rows: int, capacity: int) -> None:
        self.n_rows, self.capacity = n_rows, capacity
        self._llama = llama
        self._stem = len(stem_ids)
        shape, device = (n_rows, capacity, *llama.key_shape), llama.device
        # Zeros, because what a mask hides is still multiplied by 0.
        self._keys = [torch.zeros(shape, dtype=llama.dtype, device=device) for _ in range(llama.n_layers)]
        self._values = [torch.zeros_like(keys) for keys in self._keys]
        self._owners = torch.full((n_rows, capacity), NOBODY, dtype=torch.int16, device=device)
        self._owners[:, : self._stem] = TRUNK
        self._free = list(range(n_rows))
        if stem_ids:
            self._compute_stem(stem_ids)

    @property
    def n_free(self) -> int:
        """Rows that hold no group."""
        return len(self._free)

    def release(self, row: Row) -> None:
        """Make room: the group of the row is finished."""
        self._free.append(row.slot)
        self._free.sort()

    def prefill(self, rows: Sequence[Row]) -> Tensor:
        """Put groups into free rows, and return the logits of the last `n_kept` positions of their branches, (M, W).

        Args:
            rows: at most `n_free`; each fits the capacity.
        """
        stem, device = self._stem, self._llama.device
        trunk = max(row.trunk_length for row in rows)
        branches = max(row.group.branch_length for row in rows)
        length = round_up(stem + trunk + branches)  # L
        branches = length - stem - trunk
        slots = self._take(len(rows))
        for row, slot in zip(rows, slots, strict=True):
            row.slot, row.start, row.fill = slot, stem + row.trunk_length, length
            row.columns = {branch: number for number, branch in enumerate(row.group.branches, start=1)}
        layout = _Layout(rows, stem, trunk, branches)
        owners = send(layout.owners, device)  # (r, L) int16
        groups = torch.where(owners == NOBODY, NO_GROUP, 0)
        mask = tree_mask(groups, owners)[:, :, stem + trunk :]  # (r, 1, Q, L)
        bias = additive(mask, self._llama.dtype)
        place = _as_slice(slots, device)
        self._owners[place] = NOBODY
        self._owners[place, :length] = owners

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            parts = []
            for cache, flat in ((keys, key), (values, value)):
                cut = flat.split([len(rows) * trunk, len(rows) * branches])
                cache[place, stem : stem + trunk] = cut[0].unflatten(0, (len(rows), trunk))
                cache[place, stem + trunk : length] = cut[1].unflatten(0, (len(rows), branches))
                parts.append(cache[place, :length])
            of_trunks, of_branches = query.split([len(rows) * trunk, len(rows) * branches])
            behind = attend_dense(of_branches.unflatten(0, (len(rows), branches)), *parts, bias)
            if layer == self._llama.n_layers - 1:
                return behind[kept_behind]
            if not trunk:
                return behind
            seen = [part[:, : stem + trunk] for part in parts]
            return torch.cat([attend_dense(of_trunks.unflatten(0, (len(rows), trunk)), *seen, None), behind])

        embeds = self._embed(rows, layout, trunk)
        positions, kept_behind = send(layout.positions, device), send(layout.kept, device)
        return self._llama.keys_and_logits(embeds, positions, attend, kept_behind + len(rows) * trunk)

    def step(self, live: Sequence[tuple[Row, Branch]]) -> Tensor:
        """Take the last token of each answer, and return the logits of the next, (M, W).

        Args:
            live: answers that are not finished; their rows have room.
        """
        device = self._llama.device
        n_padded = round_up(len(live)) if self._llama.compiled else len(live)
        entries = []
        for row, branch in live:
            position = row.start + len(branch.tokens) - 1
            entries.append((branch.generated[-1], position, row.slot, row.columns[branch], row.fill))
            row.fill += 1
        entries += entries[:1] * (n_padded - len(live))  # computed again and not looked at
        tokens, positions, slots, columns, places = send(torch.tensor(entries).T.contiguous(), device)
        n_rows = 1 + max(row.slot for row, _ in live)
        n_columns = max(max(row.columns.values()) for row, _ in live)
        used = min(self.capacity, round_up(max(row.fill for row, _ in live), 4 * MULTIPLE))
        self._owners[slots, places] = columns.to(self._owners.dtype)
        bias = additive(later_mask(self._owners[:n_rows, :used], n_columns), self._llama.dtype)  # (R, 1, columns, L)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys[slots, places] = key
            values[slots, places] = value
            grid = query.new_zeros(n_rows, n_columns, *query.shape[1:])
            grid[slots, columns - 1] = query
            attended = attend_dense(grid, keys[:n_rows, :used], values[:n_rows, :used], bias)
            return attended[slots * n_columns + columns - 1]

        everything = torch.arange(n_padded, device=device)
        logits = self._llama.keys_and_logits(self._llama.embed(tokens), positions, attend, everything)
        return logits[: len(live)]

    def compact(self, rows: Sequence[Row]) -> None:
        """Move the groups into the first rows, so that a step has less to read.

        Args:
            rows: all that the cache holds.
        """
        rows = sorted(rows, key=lambda row: row.slot)
        slots = torch.tensor([row.slot for row in rows], device=self._llama.device)
        for part in (*self._keys, *self._values, self._owners):
            part[: len(rows)] = part[slots]
        for number, row in enumerate(rows):
            row.slot = number
        self._free = list(range(len(rows), self.n_rows))

    def _compute_stem(self, stem_ids: Sequence[int]) -> None:
        length, device = len(stem_ids), self._llama.device

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._keys[layer][:, :length] = key
            self._values[layer][:, :length] = value
            attended = attend_dense(query[None], key[None], value[None], None)
            return attended[-1:] if layer == self._llama.n_layers - 1 else attended

        embeds = self._llama.embed(torch.tensor(stem_ids, device=device))
        last = torch.tensor([length - 1], device=device)
        positions = torch.arange(length, device=device)
        self._llama.keys_and_logits(embeds, positions, attend, last, is_once=True)

    def _embed(self, rows: Sequence[Row], layout: _Layout, trunk: int) -> Tensor:
        """Return the embeddings of all trunks and behind them of all branches, (r T + r Q, D)."""
        embed = self._llama.embed
        behind = embed(send(layout.branch_ids, self._llama.device))  # (r Q, D)
        fronts = []
        for row in rows:
            fronts.append(row.trunk_embeds)
            if row.trunk_length < trunk:
                fronts.append(row.trunk_embeds.new_zeros(trunk - row.trunk_length, row.trunk_embeds.shape[1]))
        return torch.cat([*fronts, behind])

    def _take(self, count: int) -> list[int]:
        """Return free rows, if possible neighbours, which need no copy to be read together."""
        free = self._free
        starts = (index for index in range(len(free) - count + 1) if free[index + count - 1] == free[index] + count - 1)
        first = next(starts, 0)
        taken = free[first : first + count]
        self._free = free[:first] + free[first + count :]
        return taken


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for what the device is doing."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class _Layout:
    """Where the tokens of groups lie in their rows, on the CPU.

    Attributes:
        owners: (r, L) int16, branch number of each position.
        branch_ids: (r Q,) int64, token ids of the branches, 0 where there is none.
        positions: (r T + r Q,) int64, position ids of all trunks and behind them of all branches.
        kept: (M,) int64, indices into the branches of the positions whose logits are wanted.
    """

    def __init__(self, rows: Sequence[Row], stem: int, trunk: int, branches: int) -> None:
        owners, ids, behind, kept = [], [], [], []
        for number, row in enumerate(rows):
            own, row_ids, positions = [], [], []
            for branch, column in row.columns.items():
                tokens = branch.tokens
                own += [column] * len(tokens)
                row_ids += tokens
                positions += range(row.start, row.start + len(tokens))
                end = number * branches + len(row_ids)
                kept += range(end - branch.ask.n_kept, end)
            padding = branches - len(row_ids)
            gap = trunk - row.trunk_length
            owners.append([TRUNK] * (stem + row.trunk_length) + [NOBODY] * gap + own + [NOBODY] * padding)
            ids += row_ids + [0] * padding
            behind += positions + [0] * padding
        front = torch.arange(stem, stem + trunk).repeat(len(rows))
        self.owners = torch.tensor(owners, dtype=torch.int16)
        self.branch_ids = torch.tensor(ids)
        self.positions = torch.cat([front, torch.tensor(behind)])
        self.kept = torch.tensor(kept)


def _as_slice(slots: Sequence[int], device: torch.device) -> slice | Tensor:
    """Return neighbouring rows as a slice, which is read in place, others as indices."""
    if list(slots) == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return torch.tensor(slots, device=device)
