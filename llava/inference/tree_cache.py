"""Keys and values of many groups: a row each, `[stem | trunk | branches | answers as they grow]`.

The stem is computed once and stands in every row. A row's questions share its stem and trunk; a token of an answer is
put behind everything else of its row, and marked with its branch, which decides who sees it.

Letters: `R` rows, `C` positions of a row, `P` of the stem, `T` of the longest trunk, `Q` of the longest branches; `K`,
`d`, `H` as in `llava/model/flat_llama.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llava.constants import TRUNK
from llava.inference.grouping import Branch
from llava.inference.step_graphs import USED_MULTIPLE, StepGraphs, StepShape
from llava.inference.tree_rows import NOBODY, Row, lay_out, round_up
from llava.model.attention_kernels import without_plans
from llava.model.devices import send
from llava.model.flat_llama import FlatLlama, Places, additive, attend_causal, attend_dense
from llava.model.tree_attention import branch_mask, later_mask


def row_bytes(llama: FlatLlama, capacity: int) -> int:
    """Return the size of a row of so many positions."""
    keys, width = llama.key_shape
    return 2 * llama.n_layers * capacity * keys * width * llama.dtype.itemsize


class Launch(NamedTuple):
    """What attention needs to know of a prefill.

    Attributes:
        place: rows of the cache.
        n_rows: r.
        trunk: T.
        length: L, positions of a row that are in use.
        bias: (r, 1, Q, L), who sees whom among the branches; None = every row is one line, each sees all before it.
        kept: (M,) int64, positions among the branches whose logits are wanted.
    """

    place: slice | Tensor
    n_rows: int
    trunk: int
    length: int
    bias: Tensor | None
    kept: Tensor


class TreeCache:
    """Rows of one capacity.

    Args:
        llama: computes keys and values.
        stem_ids: of the run; may be empty.
        n_rows: R.
        capacity: C, a multiple of `MULTIPLE`.
        graphed: record the steps of answers as CUDA graphs.

    Raises:
        torch.OutOfMemoryError: if they don't fit.
    """

    def __init__(
        self, llama: FlatLlama, stem_ids: Sequence[int], n_rows: int, capacity: int, *, graphed: bool = False
    ) -> None:
        self.n_rows, self.capacity = n_rows, capacity
        self._llama = llama
        self._stem = len(stem_ids)
        shape, device = (n_rows, capacity, *llama.key_shape), llama.device
        # Zeros, because what a mask hides is still multiplied by 0.
        self._layers = [
            tuple(torch.zeros(shape, dtype=llama.dtype, device=device) for _ in range(2)) for _ in range(llama.n_layers)
        ]
        self._owners = torch.full((n_rows, capacity), NOBODY, dtype=torch.int16, device=device)
        self._owners[:, : self._stem] = TRUNK
        self._chosen = torch.zeros(n_rows, capacity, dtype=torch.int64, device=device)  # of each branch of each row
        self._free = list(range(n_rows))
        self._graphs = StepGraphs() if graphed else None
        if stem_ids:
            self._compute_stem(stem_ids)

    @property
    def n_free(self) -> int:
        """Rows that hold no group."""
        return len(self._free)

    def release(self, row: Row) -> None:
        """Make room: nothing of the row is computed any more; again it changes nothing."""
        if not row.is_released:
            self._free.append(row.slot)
            self._free.sort()
        row.is_released = True

    def prefill(self, rows: Sequence[Row]) -> Tensor:
        """Put groups into free rows, and return the logits of the last `n_kept` positions of their branches, (M, W).

        Args:
            rows: at most `n_free`; each fits the capacity.
        """
        stem, llama, n_rows = self._stem, self._llama, len(rows)
        trunk = max(row.trunk_length for row in rows)
        length = round_up(stem + trunk + max(row.group.branch_length for row in rows))  # L
        slots = self._take(n_rows)
        for row, slot in zip(rows, slots, strict=True):
            row.slot, row.start, row.fill, row.is_released = slot, stem + row.trunk_length, length, False
            row.columns = {branch: number for number, branch in enumerate(row.group.branches, start=1)}
        layout = lay_out(rows, stem, trunk, length)
        owners = send(layout.owners, llama.device)  # (r, L) int16
        place = _as_slice(slots, llama.device)
        self._owners[place] = NOBODY
        self._owners[place, :length] = owners
        kept, kept_behind = map(torch.clone, send(layout.kept, llama.device))
        is_line = all(len(row.group.branches) == 1 and row.trunk_length == trunk for row in rows)
        bias = None if is_line else additive(branch_mask(owners, stem + trunk), llama.dtype)  # (r, 1, Q, L)
        launch = Launch(place, n_rows, trunk, length, bias, kept_behind)
        places = Places(*map(torch.clone, send(layout.places, llama.device)))
        embeds = self._embed(rows, layout.branch_ids, trunk)
        with without_plans():  # each prefill has another shape
            return llama.fill_and_read(embeds, places, self._layers, functools.partial(self._attend, launch), kept)

    def _attend(self, launch: Launch, layer: int, query: Tensor) -> Tensor:
        """Return attention of trunks and branches, in the last layer of the kept positions alone."""
        stem, n_rows, trunk = self._stem, launch.n_rows, launch.trunk
        keys, values = (part[launch.place, : launch.length] for part in self._layers[layer])
        query = query.unflatten(0, (n_rows, -1))
        is_last = layer == self._llama.n_layers - 1
        if launch.bias is not None:
            behind = attend_dense(query[:, trunk:], keys, values, launch.bias)
            if is_last or not trunk:
                return behind[launch.kept] if is_last else behind
        elif is_last:
            return attend_causal(query[:, trunk:], keys, values)[launch.kept]
        end = launch.length if launch.bias is None else stem + trunk
        front = attend_causal(query[:, : end - stem], keys[:, :end], values[:, :end])
        front = front.unflatten(0, (n_rows, end - stem))
        if launch.bias is not None:
            front = torch.cat((front, behind.unflatten(0, (n_rows, -1))), dim=1)
        return front.flatten(0, 1)

    def choose(self, branches: Sequence[tuple[Row, Branch]], tokens: Tensor) -> None:
        """Say which token each answer goes on with, (M,); it may stay on the device."""
        entries = torch.tensor([(row.slot, row.columns[branch] - 1) for row, branch in branches])
        slots, columns = send(entries.T.contiguous(), self._llama.device)
        self._chosen[slots, columns] = tokens

    def step(self, live: Sequence[tuple[Row, Branch]], *, is_early: bool = False) -> Tensor:
        """Take the chosen token of each answer, and return the logits of the next, (M, W).

        Args:
            live: answers that go on; their rows have room. What is in other rows may be lost.
            is_early: as in `StepGraphs`.
        """
        entries = []
        for row, branch in live:
            position = row.start + len(branch.tokens) + branch.n_coming - 1
            entries.append((position, row.slot, row.fill, row.columns[branch]))
            row.fill += 1
        shape = StepShape(
            n_answers=len(live),
            n_rows=1 + max(row.slot for row, _ in live),
            n_columns=max(max(row.columns.values()) for row, _ in live),
            used=max(row.fill for row, _ in live),
        )
        if self._graphs or self._llama.compiled:
            shape = shape.rounded(self.n_rows)
        used = min(self.capacity, round_up(shape.used))
        if self._graphs and self.capacity - used < USED_MULTIPLE:
            used = self.capacity  # a shape less to record
        shape = shape._replace(used=used)
        order = [row.slot for row, _ in live] if _is_whole(shape) else [*range(len(live))]
        if _is_whole(shape):
            # Rows without an answer take a token too, at a place of their own that a prefill will overwrite.
            idle = {slot: (0, slot, shape.used - 1, 1) for slot in range(shape.n_rows)}
            entries = [*(idle | {entry[1]: entry for entry in entries}).values()]
            shape = shape._replace(n_answers=shape.n_rows)
        entries += entries[:1] * (shape.n_answers - len(entries))  # computed again and not looked at
        columns = torch.tensor(entries).T.contiguous()  # (4, M)
        sent = send(columns, self._llama.device)
        if self._graphs is None:
            logits = self._compute_step(sent, shape)
        else:
            logits = self._graphs(self._compute_step, sent, shape, is_early=is_early)
        if order == [*range(len(order))]:
            return logits[: len(order)]
        return logits[send(torch.tensor(order), logits.device)]

    def _compute_step(self, entries: Tensor, shape: StepShape) -> Tensor:
        """Return the logits of a step, (4, M) -> (M, W); entries are position, row, place and branch."""
        positions, slots, places, columns = map(torch.clone, entries)
        tokens = self._chosen[slots, columns - 1]
        n_rows, n_columns, used = shape.n_rows, shape.n_columns, shape.used
        self._owners[slots, places] = columns.to(self._owners.dtype)
        bias = additive(later_mask(self._owners[:n_rows, :used], n_columns), self._llama.dtype)  # (R, 1, columns, L)

        def attend(layer: int, query: Tensor) -> Tensor:
            keys, values = (part[:n_rows, :used] for part in self._layers[layer])
            if _is_whole(shape):
                return attend_dense(query[:, None], keys, values, bias)
            grid = query.new_zeros(n_rows, n_columns, *query.shape[1:])
            grid[slots, columns - 1] = query
            return attend_dense(grid, keys, values, bias)[slots * n_columns + columns - 1]

        everything = torch.arange(len(tokens), device=tokens.device)
        embeds = self._llama.embed(tokens)
        return self._llama.fill_and_read(embeds, Places(positions, slots, places), self._layers, attend, everything)

    def compact(self, rows: Sequence[Row]) -> None:
        """Move the groups into the first rows, so that a step has less to read.

        Args:
            rows: all that the cache holds.
        """
        rows = sorted(rows, key=lambda row: row.slot)
        slots = send(torch.tensor([row.slot for row in rows]), self._llama.device)
        for part in (*itertools.chain(*self._layers), self._owners, self._chosen):
            part[: len(rows)] = part[slots]
        for number, row in enumerate(rows):
            row.slot = number
        self._free = list(range(len(rows), self.n_rows))

    def _compute_stem(self, stem_ids: Sequence[int]) -> None:
        llama, length = self._llama, len(stem_ids)
        positions = torch.arange(length, device=llama.device)

        def attend(layer: int, query: Tensor) -> Tensor:
            for part in self._layers[layer]:
                part[1:, :length] = part[:1, :length]
            keys, values = (part[:1, :length] for part in self._layers[layer])
            attended = attend_causal(query[None], keys, values)
            return attended[-1:] if layer == llama.n_layers - 1 else attended

        embeds = llama.embed(torch.tensor(stem_ids, device=llama.device))
        places = Places(positions, torch.zeros_like(positions), positions)
        with without_plans():
            llama.fill_and_read(embeds, places, self._layers, attend, positions[-1:], is_once=True)

    def _embed(self, rows: Sequence[Row], branch_ids: Tensor, trunk: int) -> Tensor:
        """Return the embeddings row by row, trunk and branches, (r (T + Q), D)."""
        pieces = []
        behind = self._llama.embed(send(branch_ids, self._llama.device))  # (r, Q, D)
        for row, of_branches in zip(rows, behind, strict=True):
            gap = row.trunk_embeds.new_zeros(trunk - row.trunk_length, behind.shape[-1])
            pieces += [row.trunk_embeds, gap, of_branches]
        return torch.cat([piece for piece in pieces if len(piece)])

    def _take(self, count: int) -> list[int]:
        """Return free rows, if possible neighbours, which need no copy to be read together."""
        free = self._free
        starts = (index for index in range(len(free) - count + 1) if free[index + count - 1] == free[index] + count - 1)
        first = next(starts, 0)
        taken = free[first : first + count]
        self._free = free[:first] + free[first + count :]
        return taken


def _is_whole(shape: StepShape) -> bool:
    """Return whether a step is computed for every row in order, one query each, which needs no moving of queries."""
    return shape.n_columns == 1 and shape.n_rows <= shape.n_answers


def _as_slice(slots: Sequence[int], device: torch.device) -> slice | Tensor:
    """Return neighbouring rows as a slice, which is read in place, others as indices."""
    if list(slots) == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return send(torch.tensor(slots), device)
