"""Sampler that batches training records of one modality and similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

MEGABATCH = 50
"""Batches among which records are sorted or distributed together, as in transformers' `LengthGroupedSampler`."""


def group_by_length(
    indices: Sequence[int], lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Shuffle `indices` into batches of similar length.

    Shuffled megabatches are sorted by length and cut into batches, which come in random order; the last one may be
    smaller. Source: transformers' `LengthGroupedSampler`.
    """
    shuffled = [indices[position] for position in torch.randperm(len(indices), generator=generator).tolist()]
    size = MEGABATCH * batch_size
    batches = []
    for start in range(0, len(shuffled), size):
        ordered = sorted(shuffled[start : start + size], key=lambda index: lengths[index], reverse=True)
        batches += [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]
    return [batches[position] for position in torch.randperm(len(batches), generator=generator).tolist()]


def group_by_modality(
    lengths: Sequence[int], has_image: Sequence[bool], batch_size: int, generator: torch.Generator
) -> list[int]:
    """Return an order of all records in which a batch is of one modality and of similar lengths.

    Only the very last batch may mix records with and without images, from what is left over of both.

    Args:
        lengths: positions of each record.
        has_image: whether each record has an image; any mix, one kind alone included.
        batch_size: records of an optimizer step: per device, times devices, times accumulation steps.
        generator: of the randomness.
    """
    whole, rest = [], []
    for kind in (True, False):
        rows = [index for index, flag in enumerate(has_image) if flag is kind]
        for batch in group_by_length(rows, lengths, batch_size, generator):
            (whole if len(batch) == batch_size else rest).append(batch)
    order = torch.randperm(len(whole), generator=generator).tolist()
    return [index for batch in [*(whole[position] for position in order), *rest] for index in batch]


class ModalityLengthSampler(Sampler[int]):
    """Records in the order of `group_by_modality`; seed and epoch decide it.

    Args:
        lengths, has_image, batch_size: see `group_by_modality`.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], has_image: Sequence[bool], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.has_image = has_image
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; the trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(group_by_modality(self.lengths, self.has_image, self.batch_size, generator))
