"""Model runner of the batch engine: encodes images, runs prefill and decode steps, samples; it only reads sequences."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator

import torch
from torch import Tensor

from llava.inference.engine.device_to_host import HostCopy
from llava.inference.engine.kv_cache import KVCache, slot_bytes
from llava.inference.engine.ragged_llama import RaggedLlama
from llava.inference.engine.sequence import Batch, PrefixGroup
from llava.inference.sampler import Sampling, draw_key, score_tokens, select_tokens
from llava.model.devices import free_memory, send
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.splice import splice_row

SCORED_AT_ONCE = 1_024  # logits; bounds the memory of log-probabilities
_MEMORY_USED = {"cuda": 0.92, "cpu": 0.5, "mps": 0.6}  # share of the free memory


class ModelRunner:
    """Runs the batches of a scheduler on one device.

    Args:
        model: LLaVA in eval mode, for which `supports_ragged` holds.
        sampling: how tokens are chosen, without beams.
        system_prefix: ids that all prompts of the run start with.
        with_scores: also return log-probabilities, and the likeliest other token.
        compiled: as in `RaggedLlama`; image batches then have one size.
        graphed: capture decode steps as CUDA graphs.

    Attributes:
        sampling: as given, with a seed.
        system_length: positions of the system prefix.
    """

    def __init__(
        self,
        model: LlavaLlamaForCausalLM,
        sampling: Sampling,
        system_prefix: abc.Sequence[int],
        *,
        with_scores: bool = False,
        compiled: bool = False,
        graphed: bool = False,
    ) -> None:
        self.sampling, self.system_length = sampling.seeded(), len(system_prefix)
        self._model, self._system_prefix = model, list(system_prefix)
        self._with_scores, self._graphed = with_scores, graphed
        self._llama = RaggedLlama(model, compiled=compiled)
        self._kv_cache: KVCache | None = None

    @torch.no_grad()
    def run(self, batch: Batch) -> HostCopy:
        """Queue a prefill or decode step on the device.

        Returns:
            The copy of one value per sequence: its next token, and with scores the token's logprob, the likeliest other
            token and its logprob. Of scored requests, one logprob per target.
        """
        logits = self._kv_cache.prefill(batch) if batch.groups else self._kv_cache.decode(batch)
        if batch.members[0][1].request.targets:
            return HostCopy([_score_targets(batch, logits)])
        tokens = select_tokens(logits, self.sampling, self._draw_keys(batch))
        scores = score_tokens(logits, tokens) if self._with_scores else ()
        self._kv_cache.set_next_tokens(batch.members, tokens)
        return HostCopy([tokens, *scores])

    def _draw_keys(self, batch: Batch) -> list[int] | None:
        if self.sampling.temperature == 0:
            return None
        return [
            draw_key(self.sampling.seed, sequence.request.request_id, sequence.n_scheduled - 1)
            for _, sequence in batch.members
        ]

    @torch.no_grad()
    def embed_prefixes(self, groups: abc.Sequence[PrefixGroup], encoder_batch: int) -> list[Tensor]:
        """Encode the images of prefix groups and return their image prefixes' embeddings, (S, D) each.

        Args:
            groups: with their pixels.
            encoder_batch: most images, or tiles of images, that go through the vision tower together.
        """
        features = iter(self._encode([pixels for group in groups for pixels in group.pixels], encoder_batch))
        return [self._splice(group.prefix_ids, features) for group in groups]

    def _encode(self, pixels: abc.Sequence[Tensor], encoder_batch: int) -> list[Tensor]:
        """Return the features of each image, (P, D), tile after tile."""
        if not pixels:
            return []
        tiles = [image if image.ndim == 4 else image[None] for image in pixels]
        counts = [len(part) for part in tiles]
        stacked = torch.cat([send(part, self._model.device) for part in tiles])
        missing = -len(stacked) % encoder_batch if self._llama.compiled else 0
        if missing:
            stacked = torch.cat([stacked, stacked.new_zeros(missing, *stacked.shape[1:])])
        features = torch.cat([self._model.encode_images(part) for part in stacked.split(encoder_batch)])
        return [part.flatten(0, 1) for part in features[: sum(counts)].split(counts)]

    def _splice(self, prefix_ids: abc.Sequence[int], features: Iterator[Tensor]) -> Tensor:
        """Return the embeddings of an image prefix, (S, D); takes its images from the iterator."""
        ids = torch.tensor(prefix_ids, dtype=torch.int64)
        embed, device = self._model.get_input_embeddings(), self._model.device
        return splice_row(ids, ids, features, lambda text_ids: embed(send(text_ids, device)))[0]

    def fitting_slots(self, capacity: int, prefill_tokens: int) -> int:
        """Return how many slots of a capacity the free memory has room for, at least 1; call `free_kv_cache` first.

        Args:
            capacity: positions of a slot.
            prefill_tokens: of a prefill step, whose hidden states need memory too.
        """
        device, config = self._llama.device, self._model.config
        values = 3 * config.intermediate_size + 12 * config.hidden_size  # per position of a prefill step
        workspace = prefill_tokens * values * self._llama.dtype.itemsize + config.vocab_size * 2**14
        free = free_memory(device)
        if device.type == "cuda":  # the allocator reuses an earlier cache's memory, faster than mapping it again
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        available = free * _MEMORY_USED.get(device.type, _MEMORY_USED["cpu"]) - workspace
        return max(1, int(available // slot_bytes(self._llama, capacity)))

    @torch.no_grad()
    def allocate_kv_cache(self, n_slots: int, capacity: int) -> None:
        """Make a KV cache and prefill the system prefix; call `free_kv_cache` first.

        Raises:
            torch.OutOfMemoryError: if it doesn't fit the memory.
        """
        self._kv_cache = KVCache(self._llama, self._system_prefix, n_slots, capacity, graphed=self._graphed)
        if self._llama.device.type == "cuda":
            torch.cuda.empty_cache()  # graphs have their own memory pool and can't use the allocator's cached memory

    def free_kv_cache(self) -> None:
        """Drop the KV cache: its memory is needed for the next."""
        self._kv_cache = None

    @torch.no_grad()
    def compact(self, slots: abc.Sequence[int]) -> None:
        """Move these slots of the KV cache to the front, in order."""
        self._kv_cache.compact(slots)


def _score_targets(batch: Batch, logits: Tensor) -> Tensor:
    """Return the logprob of each target of each request, (targets,)."""
    targets = torch.tensor([token for _, sequence in batch.members for token in sequence.request.targets])
    parts = zip(logits.split(SCORED_AT_ONCE), targets.split(SCORED_AT_ONCE), strict=True)
    return torch.cat([score_tokens(part, send(tokens, logits.device))[0] for part, tokens in parts])
