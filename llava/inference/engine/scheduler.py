"""Scheduler of the batch engine: decides what the model runner computes next, and alone changes sequences.

Prefill steps come first, as soon as enough slots are free: each takes as many waiting groups as fit, and gives the
first token of each answer. Otherwise a decode step grows every running sequence by a token. A batch is scheduled before
the tokens of earlier ones have reached the host; a sequence that turns out to be finished has then been decoded one
step too far, and that token is dropped. Its slot is overwritten by a later prefill step, in the order of the device's
queue.

On out-of-memory every running sequence is preempted (its tokens are kept), and the KV cache is rebuilt with half of the
slots.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from llava.inference.engine.kv_layout import round_up
from llava.inference.engine.limits import SHORT_ANSWERS, Limits
from llava.inference.engine.model_runner import ModelRunner
from llava.inference.engine.sequence import Batch, PrefixGroup, Sequence
from llava.inference.engine.waiting import WaitingQueue
from llava.inference.session import Session

logger = logging.getLogger(__name__)

PREFILLS_PER_CACHE = 3  # prefill steps that fit the slots of a KV cache, so that one can be queued after another
_TOO_LONG = 1.5  # a KV cache with slots longer than needed by this factor is rebuilt once it is empty
_LARGE_PREFILL = 0.25  # share of `prefill_tokens`; such a prefill step runs longer than a CUDA graph capture


class Scheduler:
    """Takes prefix groups from a waiting queue through prefill and decode steps to their answers.

    Args:
        waiting: prefix groups in order.
        session: says when an answer has ended.
        runner: makes the KV cache and moves its slots; the caller lets it run the batches.
        limits: sizes.

    Attributes:
        waiting: as given.
        running: prefix groups with sequences that are not finished.
    """

    def __init__(self, waiting: WaitingQueue, session: Session, runner: ModelRunner, limits: Limits) -> None:
        self.waiting = waiting
        self.running: list[PrefixGroup] = []
        self._runner, self._is_stop = runner, _stop_test(session)
        self._system_length, self._max_new_tokens = runner.system_length, runner.sampling.max_new_tokens
        self._max_slots, self._prefill_tokens = limits.max_slots, limits.prefill_tokens
        self._answer_tokens, self._is_ahead = limits.answer_tokens, limits.steps_in_flight > 0
        self._max_sequences = limits.max_sequences or math.inf
        self._n_slots = self._capacity = 0  # no KV cache
        self._free_slots: list[int] = []
        self._in_flight: deque[Batch] = deque()
        self._finished: list[Sequence] = []
        self._has_decoded = self._is_busy = False

    def __bool__(self) -> bool:
        return bool(self.waiting or self.running or self._in_flight or self._finished)

    def schedule(self) -> Batch | None:
        """Return the next batch; None if there is nothing to compute before tokens in flight reach the host.

        Raises:
            torch.OutOfMemoryError: if images or a KV cache don't fit the memory, see `preempt_all`.
        """
        if groups := self._admit():
            batch = self._prefill_batch(groups)
        elif self._make_room():
            batch = self._decode_batch()
        else:
            batch = None
        if batch is None:
            return None
        self._has_decoded = not groups
        self._is_busy = sum(map(_length, groups)) >= _LARGE_PREFILL * self._prefill_tokens
        self._in_flight.append(batch)
        return batch

    def update(self, columns: list[list[Any]]) -> None:
        """Append the tokens of the oldest batch in flight, and finish sequences that have ended.

        Args:
            columns: what `ModelRunner.run` returned for the batch, on the host.
        """
        members = self._in_flight.popleft().members
        if members[0][1].request.targets:
            logprobs = iter(columns[0])
            for group, sequence in members:
                sequence.logprobs = list(itertools.islice(logprobs, len(sequence.request.targets)))
                self._finish(group, sequence)
            return
        for (group, sequence), token, *scores in zip(members, *columns, strict=True):
            sequence.in_flight -= 1
            if sequence.is_finished:  # which was not known when this batch was scheduled
                continue
            if scores:
                sequence.logprobs.append(scores[0])
                sequence.runner_up = sequence.runner_up or (scores[1], scores[2])
            sequence.token_ids.append(token)
            if len(sequence.token_ids) >= sequence.max_tokens or self._is_stop(sequence.token_ids):
                self._finish(group, sequence)

    def take_finished(self) -> Iterator[Sequence]:
        """Yield the sequences that have failed or finished since the last call."""
        failed, self.waiting.failed = self.waiting.failed, []
        finished, self._finished = self._finished, []
        yield from (*failed, *finished)

    def preempt_all(self, error: torch.OutOfMemoryError) -> None:
        """Let every running sequence wait again, with its tokens so far, and halve all sizes.

        Raises:
            torch.OutOfMemoryError: the given one, if a single sequence does not fit.
        """
        waiting, n_slots = self.waiting, self._n_slots or self._max_slots
        if max(n_slots, waiting.encoder_batch, waiting.group_size) == 1:
            raise error
        if n_slots == 1:
            waiting.group_size = max(1, waiting.group_size // 2)
        self._max_slots = max(1, n_slots // 2)
        self._prefill_tokens = max(1, self._prefill_tokens // 2)
        waiting.encoder_batch = max(1, waiting.encoder_batch // 2)
        logger.warning(
            "out of memory: all running sequences are preempted, the KV cache is rebuilt with at most %d slots",
            self._max_slots,
        )
        waiting.drop_embeddings()
        for group in reversed(self.running):
            waiting.preempt(group)
        self.running, self._n_slots = [], 0
        self._in_flight.clear()
        self._runner.free_kv_cache()

    def _admit(self) -> list[PrefixGroup]:
        """Move the groups of the next prefill step from waiting to running; none if it should wait for more slots."""
        waiting, running = self.waiting, self.running
        if not self._n_slots and waiting:  # while images are read
            self._allocate(waiting.expected_length())
        first = waiting.peek()
        if first is None or not self._has_room(first):
            return []
        prefix_length = suffix_length = 0
        n_running = len(running)
        n_sequences = sum(len(group.sequences) for group in running)
        most = min(len(self._free_slots), self._slots_per_prefill())
        while len(running) - n_running < most and (group := waiting.peek()):
            prefix_length = max(prefix_length, group.prefix_length)
            suffix_length = max(suffix_length, group.suffix_length)
            length = round_up(self._system_length + prefix_length + suffix_length)
            n_sequences += len(group.sequences)
            n_tokens = (len(running) - n_running + 1) * (length - self._system_length)
            is_too_long = length + self._answer_room() > self._capacity or n_tokens > self._prefill_tokens
            if (is_too_long and len(running) > n_running) or (running and n_sequences > self._max_sequences):
                break
            running.append(waiting.pop())
            if not n_running and not waiting.has_encoded:
                break  # the device is idle
        return running[n_running:]

    def _has_room(self, first: PrefixGroup) -> bool:
        """Return whether a prefill step that starts with this group should come now; make a KV cache if need be."""
        needed, fitting = self._needs(_length(first))
        if not self.running and not needed <= self._capacity <= _TOO_LONG * needed:
            self._allocate(_length(first))
        if needed > self._capacity:
            return False
        free, wanted = len(self._free_slots), min(fitting, self._slots_per_prefill())
        if self._max_new_tokens <= SHORT_ANSWERS:
            wanted -= wanted // 4  # a smaller prefill step costs less than another decode step
        elif (
            self._is_ahead
            and not self._has_decoded
            and free < len(self.waiting)
            and any(map(_needs_tokens, self.running))
        ):
            wanted *= 2  # the last free slots are filled after a decode step, while it is not known which it will free
        return not self.running or free >= wanted

    def _needs(self, length: int) -> tuple[int, int]:
        """Return the capacity of a slot for a group of `length` positions, and how many groups fit a prefill step."""
        capacity = round_up(self._system_length + length) + self._answer_room()
        return capacity, max(1, self._prefill_tokens // max(1, length))

    def _answer_room(self) -> int:
        """Return the positions that a slot keeps for answers."""
        return round_up(min(self._answer_tokens, self.waiting.group_size * (self._max_new_tokens - 1)))

    def _slots_per_prefill(self) -> int:
        """Return the most slots that a prefill step fills."""
        n_slots = max(1, self._n_slots // PREFILLS_PER_CACHE) if self._is_ahead else self._n_slots
        return min(n_slots, len(self.waiting))

    def _allocate(self, length: int) -> None:
        """Make a KV cache for groups of at most `length` positions."""
        capacity, fitting = self._needs(length)
        self._n_slots = 0
        self._runner.free_kv_cache()
        free = self._runner.fitting_slots(capacity, self._prefill_tokens)
        n_slots = min(free, self._max_slots, self._max_sequences)
        if fitting < n_slots < len(self.waiting):
            n_slots -= n_slots % fitting
        n_slots = min(n_slots, len(self.waiting))
        logger.debug("KV cache: %d slots of %d positions", n_slots, capacity)
        self._runner.allocate_kv_cache(n_slots, capacity)
        self._n_slots, self._capacity, self._free_slots = n_slots, capacity, list(range(n_slots))

    def _prefill_batch(self, groups: list[PrefixGroup]) -> Batch:
        prefix_length = max(group.prefix_length for group in groups)
        length = round_up(self._system_length + prefix_length + max(group.suffix_length for group in groups))
        for group, slot in zip(groups, self._take_slots(len(groups)), strict=True):
            group.slot, group.length, group.holds_slot = slot, length, True
            group.start = self._system_length + group.prefix_length
            for column, sequence in enumerate(group.sequences, start=1):
                sequence.column = column
        members = [(group, sequence) for group in groups for sequence in group.sequences]
        self._launch(members)
        return Batch(members, groups, prefix_length, length)

    def _decode_batch(self) -> Batch | None:
        members, inputs = [], []
        for group in self.running:
            for sequence in group.sequences:
                if sequence.needs_token:
                    position = group.start + len(sequence.suffix_ids) + sequence.n_scheduled - 1
                    inputs.append((position, group.slot, group.length, sequence.column))
                    members.append((group, sequence))
                    group.length += 1
        if not members:
            return None
        self._launch(members)
        return Batch(members, inputs=inputs, capture_now=self._is_busy)

    def _launch(self, members: list[tuple[PrefixGroup, Sequence]]) -> None:
        """Count a token of each sequence as in flight; free the slots of groups whose last tokens are."""
        for _, sequence in members:
            sequence.in_flight += 1
        for group in {group for group, _ in members}:
            if not _needs_tokens(group):
                self._free_slot(group)

    def _make_room(self) -> bool:
        """Preempt groups whose slot has no room for the next tokens; compact the slots when few are left.

        Returns:
            False if groups must be preempted whose tokens are still in flight.
        """
        full = [group for group in self.running if group.length + _needs_tokens(group) > self._capacity]
        if full and self._in_flight:
            return False
        for group in full:
            self.running.remove(group)
            self._free_slot(group)
            self.waiting.preempt(group)
        if full:
            self._answer_tokens *= 2
        held = sorted((group for group in self.running if group.holds_slot), key=lambda group: group.slot)
        if held and not self.waiting and 2 * len(held) <= 1 + held[-1].slot:
            self._runner.compact([group.slot for group in held])
            for slot, group in enumerate(held):
                group.slot = slot
            self._free_slots = list(range(len(held), self._n_slots))
        return True

    def _finish(self, group: PrefixGroup, sequence: Sequence) -> None:
        sequence.is_finished = True
        group.sequences.remove(sequence)
        self._finished.append(sequence)
        if not group.sequences:
            self.running.remove(group)
            self._free_slot(group)
            group.drop_images()

    def _take_slots(self, count: int) -> list[int]:
        """Take free slots, contiguous ones if possible: these are read without a copy."""
        free = self._free_slots
        starts = (index for index in range(len(free) - count + 1) if free[index + count - 1] == free[index] + count - 1)
        first = next(starts, 0)
        self._free_slots = free[:first] + free[first + count :]
        return free[first : first + count]

    def _free_slot(self, group: PrefixGroup) -> None:
        """Free the slot of a group that is computed no further, if it still holds one."""
        if group.holds_slot:
            self._free_slots.append(group.slot)
            self._free_slots.sort()
        group.holds_slot = False


def _needs_tokens(group: PrefixGroup) -> int:
    """Return how many of a group's sequences may need another decode step."""
    return sum(sequence.needs_token for sequence in group.sequences)


def _length(group: PrefixGroup) -> int:
    return group.prefix_length + group.suffix_length


def _stop_test(session: Session) -> Callable[[list[int]], bool]:
    """Return the test whether an answer's ids, at least one, end with a stop id or contain the stop text."""
    stop_ids, stop_text = frozenset(session.stop_ids), session.template.stop_text
    if not session.stops_on_text:
        return lambda ids: ids[-1] in stop_ids
    decode = session.tokenizer.decode
    return lambda ids: ids[-1] in stop_ids or stop_text in decode(ids, skip_special_tokens=True)
