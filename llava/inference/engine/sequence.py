"""Request, sequence, prefix group and batch of the engine.

Only the scheduler and its waiting queue change sequences and prefix groups; model runner and KV cache read them.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class Request(NamedTuple):
    """One prompt to be answered, or with `targets` a given answer to be scored.

    Attributes:
        key: names the request for the caller.
        input_ids: prompt with `IMAGE_TOKEN_INDEX` per image, followed by all targets but the last.
        images: file names, in the order of the placeholders.
        targets: token ids to score; the logits of the last `len(targets)` positions predict them. Empty = generate.
        choice: number of the given answer among its question's choices.
        request_id: JSON value that with the seed decides the draws at a temperature above 0.
    """

    key: Hashable
    input_ids: list[int]
    images: tuple[str, ...] = ()
    targets: tuple[int, ...] = ()
    choice: int = 0
    request_id: Any = None

    @property
    def n_logits(self) -> int:
        """Last positions of the prompt whose logits are needed."""
        return max(1, len(self.targets))


class RequestError(NamedTuple):
    """Code and message of a request that can't be answered, as they appear in the answers file."""

    code: str
    message: str


@dataclass(eq=False)
class Sequence:
    """A request while it is decoded, and its answer as far as it is known.

    Attributes:
        request: the prompt.
        suffix_ids: ids of the prompt after system and image prefix.
        token_ids: answer so far, as far as it has reached the host.
        logprobs: natural logarithm of the probability of each answer token, or of each target.
        runner_up: the likeliest other first token and its logprob.
        in_flight: answer tokens that are queued on the device and have not reached the host.
        max_tokens: longest answer; set when the images of the prefix group are encoded.
        column: number among the sequences of its slot, from 1; marks the sequence's keys in the KV cache.
        is_finished: no further step computes it.
        error: why it can't be answered.
    """

    request: Request
    suffix_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    runner_up: tuple[int, float] | None = None
    in_flight: int = 0
    max_tokens: int = 0
    column: int = 0
    is_finished: bool = False
    error: RequestError | None = None

    @property
    def prefill_ids(self) -> list[int]:
        """Ids that a prefill step computes after the image prefix: suffix, and after a preemption the answer so far."""
        return self.suffix_ids + self.token_ids

    @property
    def n_scheduled(self) -> int:
        """Answer tokens on the host and in flight."""
        return len(self.token_ids) + self.in_flight

    @property
    def needs_token(self) -> bool:
        """Whether another decode step may be needed, after those in flight."""
        return not self.request.targets and len(self.token_ids) + self.in_flight < self.max_tokens


@dataclass(eq=False)
class PrefixGroup:
    """Sequences that share an image prefix, and the slot of the KV cache that holds them.

    A slot is laid out as `[system prefix | image prefix | suffixes | answer tokens as they come]`.

    Attributes:
        images: file names.
        prefix_ids: ids of the image prefix, after the system prefix, with placeholders.
        sequences: unfinished ones.
        pixels: on the CPU, one tensor per image; kept to encode the images again after a preemption.
        prefix_embeds: (S, D) embeddings of the image prefix on the device; None while the images are not encoded.
        slot: number of the slot; set, like the attributes below, when the group is scheduled for a prefill step.
        start: position id of the first token of each suffix.
        length: first free position of the slot.
        holds_slot: False before a prefill step, and once the last tokens of all sequences are in flight.
    """

    images: tuple[str, ...]
    prefix_ids: list[int]
    sequences: list[Sequence]
    pixels: list[Tensor] = field(default_factory=list)
    prefix_embeds: Tensor | None = None
    slot: int = -1
    start: int = 0
    length: int = 0
    holds_slot: bool = False

    @property
    def prefix_length(self) -> int:
        """Positions of the image prefix, once its images are encoded."""
        return len(self.prefix_embeds)

    @property
    def suffix_length(self) -> int:
        """Positions of all suffixes together, with the answers so far."""
        return sum(len(sequence.suffix_ids) + len(sequence.token_ids) for sequence in self.sequences)

    def drop_images(self) -> None:
        """Free pixels and embeddings."""
        self.pixels, self.prefix_embeds = [], None


class Batch(NamedTuple):
    """One launch: a prefill step of prefix groups, or without groups a decode step.

    Attributes:
        members: group and sequence of each token that is computed, in the order of the logits.
        groups: of a prefill step; each has a slot.
        prefix_length: positions that the image prefixes of a prefill step are padded to.
        length: positions that the slots of a prefill step are padded to.
        inputs: of a decode step: position id, slot, offset in the slot and column of each sequence's next input token.
        capture_now: as in `CudaGraphs`.
    """

    members: list[tuple[PrefixGroup, Sequence]]
    groups: abc.Sequence[PrefixGroup] = ()
    prefix_length: int = 0
    length: int = 0
    inputs: abc.Sequence[tuple[int, int, int, int]] = ()
    capture_now: bool = False
