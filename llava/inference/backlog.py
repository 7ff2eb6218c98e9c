"""Groups that wait to be computed: their pictures read and encoded, one launch of the encoder for many."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.inference.grouping import Branch, Group, spliced_length
from llava.inference.picture_source import PictureError
from llava.inference.prompts import PromptError
from llava.inference.session import Session
from llava.inference.tree_rows import Row
from llava.model.devices import send

ENCODER_BATCH = 24
"""Pictures that go through the encoder together; also groups whose pictures are sent to the device together."""
FIRST_BATCH = 8
"""Groups of the first launch: the device should not wait for many pictures to be read."""


@dataclass(frozen=True)
class Failed:
    """A question that can't be asked: its branch, and the code and message of its error record."""

    branch: Branch
    code: str
    message: str


class Backlog:
    """Groups in the order of a plan.

    Args:
        session: model and template.
        stem_length: of the plan, in tokens.
        groups: of the plan.
        pictures: pixels or error of each group, in the same order; read as far as needed.
        room: tokens to leave for an answer.
        is_padded: whether the encoder takes batches of one size only.

    Attributes:
        failed: questions that turned out not to be askable, to be taken by the caller.
        encoder_batch: pictures that are encoded together.
        max_branches: of a group that is taken; larger ones are divided.
    """

    def __init__(
        self,
        session: Session,
        stem_length: int,
        groups: Sequence[Group],
        pictures: Iterator[list[Tensor] | PictureError],
        *,
        room: int,
        is_padded: bool,
    ) -> None:
        self.failed: list[Failed] = []
        self.encoder_batch = ENCODER_BATCH
        self.max_branches = max((len(group.branches) for group in groups), default=1)
        self._session, self._stem_length, self._room, self._is_padded = session, stem_length, room, is_padded
        self._groups, self._coming = groups, zip(groups, pictures, strict=True)
        self._n_coming = len(groups)
        self._again: deque[tuple[Group, list[Tensor]]] = deque()
        self._ready: deque[Row] = deque()
        self._is_new = True

    def __bool__(self) -> bool:
        return bool(self._n_coming or self._again or self._ready)

    def __len__(self) -> int:
        return self._n_coming + len(self._again) + len(self._ready)

    @property
    def is_ready(self) -> bool:
        """Whether the pictures of the next group are encoded."""
        return bool(self._ready)

    def expected_length(self) -> int:
        """Return the positions of the next group's trunk and branches, whose pictures need not be there; 0 if none."""
        if self._ready:
            return self._ready[0].length
        if not self:
            return 0
        group = self._again[0][0] if self._again else self._groups[len(self._groups) - self._n_coming]
        tower = self._session.model.get_vision_tower()
        return spliced_length(group.trunk_ids, lambda: tower.num_patches) + group.branch_length

    def prepare(self) -> None:
        """Have the next pictures encoded, if none are; for when the device has something to do meanwhile."""
        if not self._ready and (self._again or self._n_coming):
            self._load()
        if not self._n_coming:
            next(self._coming, None)  # the processes that read pictures end

    def peek(self) -> Row | None:
        """Return the next group, or None if there is none."""
        while not self._ready and (self._again or self._n_coming):
            self._load()
        if not self._ready:
            return None
        first = self._ready[0]
        branches = first.group.branches
        if len(branches) > self.max_branches:
            parts = (branches[: self.max_branches], branches[self.max_branches :])
            halves = [replace(first, group=replace(first.group, branches=part)) for part in parts]
            self._ready.popleft()
            self._ready.extendleft(reversed(halves))
        return self._ready[0]

    def take(self) -> Row:
        """Remove and return the group that `peek` gave."""
        return self._ready.popleft()

    def put_back(self, row: Row) -> None:
        """Let a group wait again, in front."""
        self._again.appendleft((row.group, row.pixels))

    def forget_features(self) -> None:
        """Give back the memory of encoded pictures; they are encoded again."""
        for row in reversed(self._ready):
            self.put_back(row)
        self._ready.clear()

    def _load(self) -> None:
        size = min(self.encoder_batch, FIRST_BATCH) if self._is_new else self.encoder_batch
        self._is_new = False
        batch = [self._again.popleft() for _ in range(min(len(self._again), size))]
        try:
            for group, pixels in itertools.islice(self._coming, min(size - len(batch), self._n_coming)):
                self._n_coming -= 1
                if isinstance(pixels, PictureError):
                    self.failed += [Failed(branch, *pixels) for branch in group.branches]
                else:
                    batch.append((group, pixels))
            features = iter(self._encode([pixels for _, row in batch for pixels in row]))
            rows = [Row(group, pixels, self._trunk_embeds(group.trunk_ids, features)) for group, pixels in batch]
        except torch.OutOfMemoryError:
            self._again.extendleft(reversed(batch))
            self.forget_features()
            raise
        for row in rows:
            self._refuse_long(row)
        self._ready += [row for row in rows if row.group.branches]

    @torch.no_grad()
    def _encode(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Return one (patches, D) tensor per picture."""
        if not pixels:
            return []
        model, size = self._session.model, self.encoder_batch
        tiles = [picture if picture.ndim == 4 else picture[None] for picture in pixels]
        counts = [len(part) for part in tiles]
        stacked = torch.cat([send(part, model.device) for part in tiles])
        missing = -len(stacked) % size if self._is_padded else 0
        if missing:
            stacked = torch.cat([stacked, stacked.new_zeros(missing, *stacked.shape[1:])])
        features = torch.cat([model.encode_images(part) for part in stacked.split(size)])[: sum(counts)]
        return [part.flatten(0, 1) for part in features.split(counts)]

    @torch.no_grad()
    def _trunk_embeds(self, ids: Sequence[int], features: Iterator[Tensor]) -> Tensor:
        embed, device = self._session.model.get_input_embeddings(), self._session.model.device
        text = [token for token in ids if token != IMAGE_TOKEN_INDEX]
        text_embeds = embed(send(torch.tensor(text, dtype=torch.long), device))
        pieces, start = [text_embeds[:0]], 0
        for is_image, run in itertools.groupby(ids, key=lambda token: token == IMAGE_TOKEN_INDEX):
            length = len(list(run))
            if is_image:
                pieces += [next(features).to(text_embeds.dtype) for _ in range(length)]
            else:
                pieces.append(text_embeds[start : start + length])
                start += length
        return torch.cat(pieces)

    def _refuse_long(self, row: Row) -> None:
        """Take those questions out of a group that don't fit the context."""
        before = self._stem_length + row.trunk_length
        for branch in list(row.group.branches):
            try:
                self._session.check_length(before + len(branch.ids), 0 if branch.ask.targets else self._room)
            except PromptError as error:
                row.group.branches.remove(branch)
                self.failed.append(Failed(branch, error.code, str(error)))
