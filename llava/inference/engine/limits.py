"""Sizes of a batch run: how much is computed, queued, encoded and planned at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SHORT_ANSWERS = 4  # tokens; answers with this limit are expected to reach it, so that free slots are known ahead
_MAX_SLOTS = {"cuda": 160, "cpu": 8, "mps": 16}
_PREFILL_TOKENS = {"cuda": 16_384, "cpu": 2_048, "mps": 4_096}
_STEPS_IN_FLIGHT = {"cuda": 1}  # beside a CPU it gains nothing


@dataclass(frozen=True)
class Limits:
    """Sizes of a run; `Limits.suiting` has those that suit a device.

    Attributes:
        max_slots: most slots of the KV cache.
        prefill_tokens: most tokens per prefill step; saturates the linear layers.
        steps_in_flight: batches queued ahead of the one whose tokens are waited for.
        max_sequences: most running sequences; None = what fits.
        group_size: most sequences of a prefix group; further requests about its images compute the prefix again.
        answer_tokens: positions that a slot keeps for answers at first; doubled when answers need more.
        encoder_batch: images that go through the vision tower together.
        first_groups: prefix groups encoded before the first prefill step; few, so that the device starts early.
        planned_groups: prefix groups planned ahead; several times the slots, which depend on the waiting groups.
        window: questions tokenised together; some 70 ms of host time, hidden behind a GPU's queued batch.
        threaded_groups: first groups, whose images are read by threads while processes start.
    """

    max_slots: int
    prefill_tokens: int
    steps_in_flight: int = 0
    max_sequences: int | None = None
    group_size: int = 32
    answer_tokens: int = 128
    encoder_batch: int = 24
    first_groups: int = 8
    planned_groups: int = 512
    window: int = 1_024
    threaded_groups: int = 64

    @classmethod
    def suiting(cls, device: torch.device, max_new_tokens: int) -> Limits:
        """Return the limits that suit a device and a longest answer, in tokens."""
        kind = device.type if device.type in _MAX_SLOTS else "cpu"
        steps = _STEPS_IN_FLIGHT.get(kind, 0) * (SHORT_ANSWERS - 1 if max_new_tokens <= SHORT_ANSWERS else 1)
        return cls(_MAX_SLOTS[kind], _PREFILL_TOKENS[kind], steps)
