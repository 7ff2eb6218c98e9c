"""The batch engine: groups enter a cache of rows together, their answers grow together, finished ones leave.

`Engine.run` is a loop of three moves. Prefill: as many waiting groups as fit a launch go into free rows; this gives the
first token of each answer. Step: every answer in the cache grows by a token. Retreat: what does not fit the memory
goes back to the waiting groups, with the answers as far as they have come, and the next cache is smaller.

A GPU gets each move before the tokens of the last one are looked at, so that it never waits: tokens stay there as the
next step's input. An answer that turns out to be finished has then taken one step too many, which is dropped.

Laws: an answer depends on its own prompt alone, whatever is computed beside it; each branch of the plan comes out once.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from llava.inference.arrival import Arrival
from llava.inference.backlog import Backlog, Failed
from llava.inference.grouping import Branch
from llava.inference.selection import score_tokens, select_tokens
from llava.inference.session import Sampling, Session
from llava.inference.tree_cache import TreeCache, row_bytes
from llava.inference.tree_rows import Row, round_up
from llava.model.devices import free_memory, send
from llava.model.flat_llama import FlatLlama

logger = logging.getLogger(__name__)

MAX_ROWS = {"cuda": 160, "cpu": 8, "mps": 16}
PREFILL_POSITIONS = {"cuda": 16_384, "cpu": 2_048, "mps": 4_096}
"""Of a launch: enough to keep the linear layers busy."""
MOVES_AHEAD = {"cuda": 1}
"""Moves that a device is given before the tokens of an earlier one are waited for; beside a CPU it gains nothing."""
LAUNCHES_OF_CACHE = 3
"""At least so many launches fill a cache, so that one can wait behind the others."""
FIRST_SPARE = 128
"""Positions that a row keeps for its answers at first; doubled when they turn out to be longer."""
SCORED_AT_ONCE = 1_024
_SHARE_USED = {"cuda": 0.92, "cpu": 0.5, "mps": 0.6}
"""Of the free memory."""
_TOO_WIDE = 1.5
"""A cache whose rows are so many times longer than needed is made anew as soon as it is empty."""
_EARLY = 4
"""Behind a prefill of at least this part of a launch's positions there is time to record a step."""
_SOON = 4
"""Answers of at most so many tokens are taken to end by the limit: which rows become free is known ahead."""


class Selected(Arrival):
    """Tokens or scores that are on their way from the device.

    Args:
        branches: whose they are.
        tensors: on the device, one value per branch or target each.
    """

    def __init__(self, branches: list[tuple[Row, Branch]], tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self.branches = branches


class Engine:
    """Computes the groups of a plan.

    Args:
        session: model and template; `is_flat(session.model)`.
        sampling: how answers are chosen, without beams.
        stem_ids: of the plan.
        chance_of: for sampling, (ask's key, tokens so far) -> number in [0, 1) that decides the next token.
        with_scores: note the probability of each token and of the first one's runner-up.
        max_questions: answers that grow at a time; None = what fits.
        compiled: as in `FlatLlama`.
        graphed: as in `TreeCache`.

    Attributes:
        spare: positions of a row of the next cache for answers.
    """

    def __init__(
        self,
        session: Session,
        sampling: Sampling,
        stem_ids: Sequence[int],
        *,
        chance_of: Callable[[int, int], float] | None = None,
        with_scores: bool = False,
        max_questions: int | None = None,
        compiled: bool = False,
        graphed: bool = False,
    ) -> None:
        self._session, self._sampling, self._stem_ids = session, sampling, list(stem_ids)
        self._chance_of, self._with_scores, self._graphed = chance_of, with_scores, graphed
        self._llama = FlatLlama(session.model, compiled=compiled)
        kind = self._llama.device.type
        self._max_rows = MAX_ROWS.get(kind, MAX_ROWS["cpu"])
        self._positions = PREFILL_POSITIONS.get(kind, PREFILL_POSITIONS["cpu"])
        self._ends_soon = sampling.max_new_tokens <= _SOON
        self._ahead = MOVES_AHEAD.get(kind, 0) * (_SOON - 1 if self._ends_soon else 1)
        self._max_questions = max_questions or self._max_rows * 32
        self._stop_ids = frozenset(session.stop_ids)
        self._cache: TreeCache | None = None
        self._rows: list[Row] = []
        self._has_stepped = self._is_busy = False
        self._selected: deque[Selected] = deque()
        self._finished: list[Branch] = []
        self.spare = FIRST_SPARE

    @property
    def is_compiled(self) -> bool:
        """Whether shapes should be few."""
        return self._llama.compiled

    def run(self, backlog: Backlog) -> Iterator[Branch | Failed]:
        """Yield every branch of the backlog once, as soon as it is finished or has failed.

        Raises:
            torch.OutOfMemoryError: if a single question does not fit.
        """
        while backlog or self._rows or self._selected or self._finished:
            finished, self._finished = self._finished, []
            has_more = False
            try:
                has_more = self._launch(backlog)
            except torch.OutOfMemoryError as error:
                self._retreat(backlog, error)
            failed, backlog.failed = backlog.failed, []
            yield from (*failed, *finished)  # what the caller does with them is done while the device computes
            if self._selected and (len(self._selected) > self._ahead or not has_more):
                self._collect(self._selected.popleft())

    @torch.no_grad()
    def _launch(self, backlog: Backlog) -> bool:
        """Give the device a prefill or a step; return whether there was one to give."""
        rows = self._next_rows(backlog)
        if rows:
            self._prefill(rows)
        elif self._make_room(backlog) and (live := self._going_on()):
            self._select(live, self._cache.step(live, is_early=self._is_busy))
        else:
            return False
        self._has_stepped = not rows
        self._is_busy = _EARLY * sum(row.length for row in rows) >= self._positions
        backlog.prepare()
        return True

    def _going_on(self, rows: Sequence[Row] | None = None) -> list[tuple[Row, Branch]]:
        """Return the answers that may need a token more than those that are here or on their way."""
        limit = self._sampling.max_new_tokens
        return [
            (row, branch)
            for row in (self._rows if rows is None else rows)
            for branch in row.group.branches
            if not branch.ask.targets and len(branch.generated) + branch.n_coming < limit
        ]

    def _next_rows(self, backlog: Backlog) -> list[Row]:
        """Take the groups of the next prefill; none if it should wait for more rows to become free."""
        rows: list[Row] = []
        try:
            if self._cache is None and backlog:  # while pictures are read
                self._make_cache(backlog.expected_length(), backlog)
            first = backlog.peek()
            if first is not None and self._has_room(first, backlog):
                self._take(rows, backlog)
        except torch.OutOfMemoryError:
            for row in reversed(rows):
                backlog.put_back(row)
            raise
        return rows

    def _take(self, rows: list[Row], backlog: Backlog) -> None:
        """Move groups from the backlog into the list, as many as fit a launch."""
        stem, trunk, branches = len(self._stem_ids), 0, 0
        asked = sum(len(row.group.branches) for row in self._rows)
        most = min(self._cache.n_free, self._rows_at_once(backlog))
        while len(rows) < most and (row := backlog.peek()):
            trunk, branches = max(trunk, row.trunk_length), max(branches, row.group.branch_length)
            length = round_up(stem + trunk + branches)
            asked += len(row.group.branches)
            is_too_long = length + self._spare(backlog) > self._cache.capacity
            if rows and (is_too_long or (len(rows) + 1) * (length - stem) > self._positions):
                break
            if (rows or self._rows) and asked > self._max_questions:
                break
            rows.append(backlog.take())
            if not self._rows and not backlog.is_ready:
                break  # the device has nothing to do yet

    def _has_room(self, first: Row, backlog: Backlog) -> bool:
        """Return whether a prefill that starts with this group should be launched now; make a cache if need be."""
        needed, at_once = self._needs(first.length, backlog)
        if not self._rows and not needed <= self._cache.capacity <= _TOO_WIDE * needed:
            self._make_cache(first.length, backlog)
        if needed > self._cache.capacity:
            return False
        free, wanted = self._cache.n_free, min(at_once, self._rows_at_once(backlog))
        if self._ends_soon:
            wanted -= wanted // 4  # a smaller launch costs less than another step
        elif self._ahead and not self._has_stepped and free < len(backlog) and self._going_on():
            wanted *= 2  # the last free rows are filled behind a step, while it is not known which rows it will free
        return not self._rows or free >= wanted

    def _needs(self, length: int, backlog: Backlog) -> tuple[int, int]:
        """Return the capacity that a group of so many positions needs, and how many of them fit a launch."""
        capacity = round_up(len(self._stem_ids) + length) + self._spare(backlog)
        return capacity, max(1, self._positions // max(1, length))

    def _make_cache(self, length: int, backlog: Backlog) -> None:
        """Make a cache for groups of at most so many positions."""
        needed, at_once = self._needs(length, backlog)
        self._cache = None  # its memory is needed for the next
        n_rows = min(self._fitting_rows(needed), self._max_rows, self._max_questions)
        if at_once < n_rows < len(backlog):
            n_rows -= n_rows % at_once
        n_rows = min(n_rows, len(backlog))
        logger.debug("cache: %d rows of %d positions", n_rows, needed)
        self._cache = TreeCache(self._llama, self._stem_ids, n_rows, needed, graphed=self._graphed)
        if self._llama.device.type == "cuda":
            torch.cuda.empty_cache()  # what an earlier cache left and this one didn't take: recordings can't take it

    def _rows_at_once(self, backlog: Backlog) -> int:
        """Return the most rows that a launch fills."""
        n_rows = self._cache.n_rows
        if self._ahead:
            n_rows = max(1, n_rows // LAUNCHES_OF_CACHE)
        return min(n_rows, len(backlog))

    def _fitting_rows(self, capacity: int) -> int:
        """Return the rows of a capacity that the device has room for, beside what computing takes; at least 1."""
        device, config = self._llama.device, self._session.model.config
        values = 3 * config.intermediate_size + 12 * config.hidden_size  # of a position, while it is computed
        workspace = self._positions * values * self._llama.dtype.itemsize + config.vocab_size * 2**14
        free = free_memory(device)
        if device.type == "cuda":  # what an earlier cache has left is taken again, which is faster than to map it anew
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        available = free * _SHARE_USED.get(device.type, _SHARE_USED["cpu"]) - workspace
        return max(1, int(available // row_bytes(self._llama, capacity)))

    def _spare(self, backlog: Backlog) -> int:
        """Return the positions that a row keeps for its answers."""
        return round_up(min(self.spare, backlog.max_branches * (self._sampling.max_new_tokens - 1)))

    def _prefill(self, rows: Sequence[Row]) -> None:
        self._rows += rows
        logits = self._cache.prefill(rows)
        branches = [(row, branch) for row in rows for branch in row.group.branches]
        if branches[0][1].ask.targets:
            targets = [token for _, branch in branches for token in branch.ask.targets]
            parts = zip(logits.split(SCORED_AT_ONCE), torch.tensor(targets).split(SCORED_AT_ONCE), strict=True)
            scores = [score_tokens(part, send(tokens, logits.device))[0] for part, tokens in parts]
            self._selected.append(Selected(branches, [torch.cat(scores)]))
        else:
            self._select(branches, logits)

    def _select(self, branches: list[tuple[Row, Branch]], logits: Tensor) -> None:
        """Choose the next token of each answer; `_collect` waits for it."""
        chances = None
        if self._sampling.temperature > 0:
            steps = ((branch.ask.key, len(branch.generated) + branch.n_coming) for _, branch in branches)
            chances = list(itertools.starmap(self._chance_of, steps))
        tokens = select_tokens(logits, self._sampling, chances)
        scores = score_tokens(logits, tokens) if self._with_scores else ()
        self._cache.choose(branches, tokens)
        self._selected.append(Selected(branches, [tokens, *scores]))
        for _, branch in branches:
            branch.n_coming += 1
        for row in {row for row, _ in branches}:
            if not self._going_on([row]):  # its last tokens are on their way, nothing reads it again
                self._cache.release(row)

    def _collect(self, selected: Selected) -> None:
        """Take chosen tokens from the device, and let finished answers go."""
        branches, columns = selected.branches, selected.wait()
        if branches[0][1].ask.targets:
            logprobs = iter(columns[0])
            for row, branch in branches:
                branch.logprobs = list(itertools.islice(logprobs, len(branch.ask.targets)))
                self._finish(row, branch)
            return
        for (row, branch), token, *scores in zip(branches, *columns, strict=True):
            branch.n_coming -= 1
            if branch not in row.columns:  # finished, which was not known when this was launched
                continue
            if scores:
                branch.logprobs.append(scores[0])
                branch.runner_up = branch.runner_up or (scores[1], scores[2])
            branch.generated.append(token)
            if self._is_finished(branch.generated):
                self._finish(row, branch)

    def _is_finished(self, ids: Sequence[int]) -> bool:
        if ids[-1] in self._stop_ids or len(ids) >= self._sampling.max_new_tokens:
            return True
        session = self._session
        if not session.stops_on_text:
            return False
        return session.template.stop_text in session.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _finish(self, row: Row, branch: Branch) -> None:
        row.group.branches.remove(branch)
        del row.columns[branch]
        self._finished.append(branch)
        if not row.group.branches:
            self._rows.remove(row)
            self._cache.release(row)

    def _make_room(self, backlog: Backlog) -> bool:
        """Let rows without room for the next tokens wait again, and bring the others together when few are left.

        Returns:
            Whether that was possible: not while tokens of such rows are on their way.
        """
        full = [row for row in self._rows if row.fill + len(self._going_on([row])) > self._cache.capacity]
        if full and self._selected:
            return False
        for row in full:
            self._rows.remove(row)
            self._cache.release(row)
            backlog.put_back(row)
        if full:
            self.spare *= 2
        held = [row for row in self._rows if not row.is_released]
        if held and not backlog and 2 * len(held) <= 1 + max(row.slot for row in held):
            self._cache.compact(held)
        return True

    def _retreat(self, backlog: Backlog, error: torch.OutOfMemoryError) -> None:
        """Begin again with half of everything, where the answers are."""
        n_rows = self._max_rows if self._cache is None else self._cache.n_rows
        if max(n_rows, backlog.encoder_batch, backlog.max_branches) == 1:
            raise error
        if n_rows == 1:
            backlog.max_branches = max(1, backlog.max_branches // 2)
        self._max_rows = max(1, n_rows // 2)
        self._positions = max(1, self._positions // 2)
        backlog.encoder_batch = max(1, backlog.encoder_batch // 2)
        logger.warning("out of memory; going on with %d pictures at a time", self._max_rows)
        for row in reversed(self._rows):
            for branch in row.group.branches:
                branch.n_coming = 0
            backlog.put_back(row)
        backlog.forget_features()
        self._rows, self._cache = [], None
        self._selected.clear()
