"""Waiting queue of the batch engine: prefix groups in order, their images read and encoded ahead in batches."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from llava.data.records import spliced_length
from llava.inference.engine.limits import Limits
from llava.inference.engine.model_runner import ModelRunner
from llava.inference.engine.sequence import PrefixGroup, RequestError, Sequence
from llava.inference.prompts import PromptError
from llava.inference.session import Session


class WaitingQueue:
    """Prefix groups that wait for a slot.

    Args:
        groups: in order; may be a generator.
        images: pixels of each group's images or why they can't be read, in the same order; read as they are needed.
        session: knows how long answers may become.
        runner: encodes the images.
        limits: sizes.

    Attributes:
        failed: sequences that can't be answered; the caller takes them.
        group_size: most sequences of a group, larger ones are divided; halved when memory runs out.
        encoder_batch: images that are encoded together; halved when memory runs out.
    """

    def __init__(
        self,
        groups: Iterable[PrefixGroup],
        images: Iterator[list[Tensor] | RequestError],
        session: Session,
        runner: ModelRunner,
        limits: Limits,
    ) -> None:
        self.failed: list[Sequence] = []
        self.group_size, self.encoder_batch = limits.group_size, limits.encoder_batch
        self._groups, self._images = iter(groups), images
        self._session, self._runner = session, runner
        self._next_batch, self._planned_groups = limits.first_groups, limits.planned_groups
        self._planned: deque[PrefixGroup] = deque()  # images not read
        self._preempted: deque[PrefixGroup] = deque()  # images read; they go first
        self._encoded: deque[PrefixGroup] = deque()
        self._plan_ahead()

    def __bool__(self) -> bool:
        return bool(self._planned or self._preempted or self._encoded)

    def __len__(self) -> int:
        """Return the number of waiting groups, as far as they are planned."""
        return len(self._planned) + len(self._preempted) + len(self._encoded)

    @property
    def has_encoded(self) -> bool:
        """Whether the images of the next group are encoded."""
        return bool(self._encoded)

    def expected_length(self) -> int:
        """Return the positions of the next group's image prefix and suffixes, before its images are read; 0 = none."""
        tower = self._session.model.get_vision_tower()
        patches = tower.num_patches if tower else 0
        for queue in (self._encoded, self._preempted, self._planned):
            if queue:
                return spliced_length(queue[0].prefix_ids, patches) + queue[0].suffix_length
        return 0

    def encode_ahead(self) -> None:
        """Encode the next images, if none are; to be called while the device is busy."""
        if not self._encoded and (self._preempted or self._planned):
            self._encode_next()
        if not self._planned:
            next(self._images, None)  # so that the processes that read images end

    def peek(self) -> PrefixGroup | None:
        """Return the next group; None if there is none, or if all groups whose images are read next have failed.

        Returning then lets the engine report failures as they come, also where every image is missing.
        """
        if not self._encoded and (self._preempted or self._planned):
            self._encode_next()
        if not self._encoded:
            return None
        first = self._encoded[0]
        if len(first.sequences) > self.group_size:
            rest = replace(first, sequences=first.sequences[self.group_size :])
            first.sequences = first.sequences[: self.group_size]
            self._encoded.insert(1, rest)
        return first

    def pop(self) -> PrefixGroup:
        """Remove and return the group that `peek` gave."""
        return self._encoded.popleft()

    def preempt(self, group: PrefixGroup) -> None:
        """Put a group in front, with its answers so far; its images are encoded again."""
        group.prefix_embeds, group.holds_slot = None, False
        for sequence in group.sequences:
            sequence.in_flight = 0
        self._preempted.appendleft(group)

    def drop_embeddings(self) -> None:
        """Free the memory of encoded images."""
        while self._encoded:
            self.preempt(self._encoded.pop())

    def _plan_ahead(self) -> None:
        self._planned.extend(itertools.islice(self._groups, self._planned_groups - len(self._planned)))

    def _encode_next(self) -> None:
        size, self._next_batch = min(self.encoder_batch, self._next_batch), self.encoder_batch
        batch = [self._preempted.popleft() for _ in range(min(len(self._preempted), size))]
        try:
            for _ in range(min(size - len(batch), len(self._planned))):
                pixels, group = next(self._images), self._planned.popleft()
                if isinstance(pixels, RequestError):
                    self._fail(group.sequences, pixels)
                else:
                    group.pixels = pixels
                    batch.append(group)
            self._plan_ahead()
            embeds = self._runner.embed_prefixes(batch, self.encoder_batch)
        except torch.OutOfMemoryError:
            self._preempted.extendleft(reversed(batch))
            self.drop_embeddings()
            raise
        for group, prefix_embeds in zip(batch, embeds, strict=True):
            group.prefix_embeds = prefix_embeds
            self._limit_answers(group)
            if group.sequences:
                self._encoded.append(group)
            else:
                group.drop_images()

    def _limit_answers(self, group: PrefixGroup) -> None:
        """Set the longest answer of each sequence, and fail those that leave nothing of the context."""
        start, kept = self._runner.system_length + group.prefix_length, []
        for sequence in group.sequences:
            max_new_tokens = 0 if sequence.request.targets else self._runner.sampling.max_new_tokens
            try:
                sequence.max_tokens = self._session.answer_limit(start + len(sequence.suffix_ids), max_new_tokens)
            except PromptError as error:
                self._fail([sequence], RequestError(error.code, str(error)))
            else:
                kept.append(sequence)
        group.sequences = kept

    def _fail(self, sequences: list[Sequence], error: RequestError) -> None:
        for sequence in sequences:
            sequence.error = error
        self.failed += sequences
