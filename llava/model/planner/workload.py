"""Workload of training for the memory planner: the largest and the mean micro-batch, of packs or of padded rows.

Packs are those that training makes: `SharedPrefixSampler` orders the rows here as there, for real records or for a
given number of questions per image.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from llava.constants import MASK_BLOCK
from llava.data.packing import fill_rows, padded_length
from llava.data.prefix_sampler import SharedPrefixSampler, Sharing, batch_costs, find_sharing
from llava.data.records import EncodedRecord
from llava.model.memory import StepLoad

TABLE_QUESTIONS = 4.25
"""Questions per image of the VQA table."""
SYSTEM_PREFIX = 35
"""Text tokens before an image: start of the text, system prompt, role."""
SUFFIX = 18
"""Tokens of a question and its answer, mean of the VQA table."""
SUPERVISED = 3
"""Tokens of an answer of the VQA table, rounded up."""
_IMAGES = 1000  # of the synthetic data; enough for the largest batch of an epoch to be typical
_PREDICTED_MULTIPLE = 64  # of the positions whose logits are computed, see `pad_queries`


class MeanLoad(NamedTuple):
    """Positions without padding and images of the mean micro-batch."""

    positions: float
    images: float


@dataclasses.dataclass(frozen=True)
class PaddedRows:
    """Rows that are padded to the longest of a batch, as with `--share_image_prefix False`.

    Attributes:
        longest: positions of the longest row.
        is_padded: whether rows differ in length, so that attention takes a mask.
        mean: positions of the mean row.
    """

    longest: int
    is_padded: bool = True
    mean: float = 0.0

    def largest(self, batch: int, gpus: int = 1, budget: int | None = None) -> StepLoad:
        """Return the load of the largest micro-batch; logits are computed at all of its positions."""
        positions = batch * self.longest
        return StepLoad(positions, batch, positions, self.longest if self.is_padded else 0)

    def mean_load(self, batch: int, gpus: int = 1) -> MeanLoad:
        """Return the load of the mean micro-batch."""
        return MeanLoad(batch * (self.mean or self.longest), batch)


@dataclasses.dataclass(frozen=True, eq=False)
class Packs:
    """Rows that share image prefixes.

    Attributes:
        sharing: which rows share one.
        images: of each group.
        supervised: mean number of supervised tokens in a row.
        seed: of the order.
    """

    sharing: Sharing = dataclasses.field(repr=False)
    images: Sequence[int] = dataclasses.field(repr=False)
    supervised: float = SUPERVISED
    seed: int = 42
    _orders: dict[tuple[int, int], list[int]] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def of_records(cls, records: Sequence[EncodedRecord], lengths: Sequence[int], seed: int) -> Packs:
        """Return the packs of training data; `lengths` are the positions of each record."""
        sharing = find_sharing(records, lengths)
        images = [len(records[members[0]].images) for members in sharing.groups]
        supervised = sum(label >= 0 for record in records for label in record.labels) / len(records)
        return cls(sharing, images, supervised, seed)

    @classmethod
    def of_counts(
        cls, counts: Sequence[int], *, patches: int, suffix: int = SUFFIX, system_prefix: int = SYSTEM_PREFIX
    ) -> Packs:
        """Return packs of data with so many questions about each image.

        Args:
            counts: questions of each image.
            patches: positions of an image.
            suffix: positions of a question with its answer.
            system_prefix: positions before the image.
        """
        borders = list(itertools.accumulate(counts, initial=0))
        groups = [list(range(start, stop)) for start, stop in itertools.pairwise(borders)]
        prefix, is_shared = system_prefix + patches, [count > 1 for count in counts]
        suffixes = [
            suffix if shared else prefix + suffix
            for count, shared in zip(counts, is_shared, strict=True)
            for _ in range(count)
        ]
        prefixes = [prefix if shared else 0 for shared in is_shared]
        return cls(Sharing(groups, prefixes, suffixes, system_prefix), [1] * len(counts))

    @classmethod
    def of_mean(cls, questions_per_image: float, *, patches: int, suffix: int = SUFFIX) -> Packs:
        """Return packs of data with that mean number of questions per image, at least 1, spread geometrically.

        With the VQA table's mean these packs have its positions and images within 2 %, as the test says.
        """
        if questions_per_image <= 1:
            counts = [1] * _IMAGES
        else:
            scale = math.log1p(-1 / questions_per_image)
            counts = [1 + int(math.log1p(-(index + 0.5) / _IMAGES) / scale) for index in range(_IMAGES)]
        return cls.of_counts(counts, patches=patches, suffix=suffix)

    def sampler(self, batch: int, gpus: int = 1) -> SharedPrefixSampler | None:
        """Return the order of training's rows; None if no rows share a prefix, so that the trainer's own is taken."""
        return SharedPrefixSampler(self.sharing, batch, gpus, self.seed) if self.sharing.saves else None

    def order(self, batch: int, gpus: int = 1) -> list[int]:
        """Return the order of the first epoch's rows; consecutive `batch` ones are a micro-batch."""
        key = (batch, gpus)
        if key not in self._orders:
            sampler = self.sampler(batch, gpus)
            self._orders[key] = sampler.order() if sampler else list(range(len(self.sharing.suffixes)))
        return self._orders[key]

    def costs(self, batch: int, gpus: int = 1) -> list[int]:
        """Return the positions of each micro-batch of the first epoch, at most."""
        return batch_costs(self.order(batch, gpus), batch, self.sharing)

    def largest(self, batch: int, gpus: int = 1, budget: int | None = None) -> StepLoad:
        """Return the load of the first epoch's largest micro-batch.

        Args:
            batch: rows of a micro-batch.
            gpus: processes.
            budget: positions of a row of the pack, for dense masks; None = one row of whole blocks.
        """
        order, costs = self.order(batch, gpus), self.costs(batch, gpus)
        place = max(range(len(costs)), key=costs.__getitem__)
        rows = order[place * batch : (place + 1) * batch]
        images = max(self._images_of_batches(batch, gpus))
        predicted = padded_length(round(batch * self.supervised) + 1, _PREDICTED_MULTIPLE)
        if budget is None:
            return StepLoad(padded_length(costs[place], MASK_BLOCK), images, predicted)
        members: dict[int, list[int]] = {}
        for row in rows:
            members.setdefault(self._group_of[row], []).append(row)
        lengths = [
            self.sharing.prefixes[group] + sum(self.sharing.suffixes[row] for row in rows)
            for group, rows in members.items()
        ]
        filled = [sum(lengths[index] for index in row) for row in fill_rows(lengths, budget)]
        return StepLoad(len(filled) * max(filled), images, predicted, max(filled))

    def mean_load(self, batch: int, gpus: int = 1) -> MeanLoad:
        """Return the load of the first epoch's mean micro-batch."""
        batches = len(self.sharing.suffixes) / batch  # the last one may be smaller
        images = sum(self._images_of_batches(batch, gpus))
        return MeanLoad(sum(self.costs(batch, gpus)) / batches, images / batches)

    def questions_per_image(self, batch: int, gpus: int = 1) -> float:
        """Return the mean number of a micro-batch's rows for which an image is computed once."""
        return batch / statistics.mean(self._images_of_batches(batch, gpus))

    @functools.cached_property
    def _group_of(self) -> dict[int, int]:
        return {row: group for group, rows in enumerate(self.sharing.groups) for row in rows}

    def _images_of_batches(self, batch: int, gpus: int) -> list[int]:
        order = self.order(batch, gpus)
        batches = [order[start : start + batch] for start in range(0, len(order), batch)]
        return [sum(self.images[group] for group in {self._group_of[row] for row in rows}) for rows in batches]


Workload = Packs | PaddedRows
"""What is trained on."""
