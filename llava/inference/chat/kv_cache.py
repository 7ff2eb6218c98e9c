"""KV cache of one conversation, and its decode step.

`GrowingKVCache` runs the LLM's layers over storage with fixed addresses; on CUDA a decode step is one CUDA graph, of
fused Triton kernels where Triton is installed. `TransformersKVCache` runs transformers' `forward`, for models that
`RaggedLlama` does not cover.

Letters as in `llava/model/__init__.py`; `capacity` is the positions that there is room for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache

from llava.inference.engine.cuda_graphs import CudaGraphs, StepShape
from llava.inference.engine.kv_layout import round_up
from llava.inference.engine.ragged_llama import (
    RaggedLlama,
    TokenPlaces,
    additive_mask,
    can_be_captured,
    causal_attention,
    masked_attention,
    supports_ragged,
)
from llava.model.capabilities import capabilities_of
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.quantization import has_4bit_weights

logger = logging.getLogger(__name__)

USED_MULTIPLE = 512  # positions that a decode step's attention is rounded up to, so that few shapes occur; masked
_CAPACITY_MULTIPLE = 128  # positions
_PROBE_TOKENS = 66  # tokens that fused kernels are checked on: one attention split, and the beginning of a second
MAX_LOGIT_DISTANCE = 0.25  # relative, of fused kernels' logits from the layers'; of unrelated logits it is 1.4

Storage: TypeAlias = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (1, capacity, Hkv, d)."""
DecodeStep: TypeAlias = Callable[[Tensor, Sequence[tuple[Tensor, Tensor]]], Tensor]
"""Appends a token: (entries (2,), storage) -> logits (1, W); entries are the token id and its position."""


class ChatKVCache(Protocol):
    """KV cache of one conversation; logits that it returns are valid until the next call.

    Attributes:
        length: positions in use; what an interrupted call left after them is overwritten.
    """

    length: int

    def prefill(self, embeds: Tensor, room: int = 0) -> Tensor:
        """Append positions and return the logits after the last, (S, D) -> (1, W).

        Args:
            embeds: (S, D).
            room: positions that will follow, as far as is known.
        """

    def decode(self, token: Tensor) -> Tensor:
        """Append a token, (1,) int64 on the device, and return the logits after it, (1, W)."""

    def truncate(self, length: int) -> None:
        """Drop the positions from `length` on."""


class KVCacheFactory:
    """Creates a model's KV caches, which share its compiled kernels and RoPE tables.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: LlavaLlamaForCausalLM) -> None:
        self.model = model
        self._shared: tuple[RaggedLlama, bool, DecodeStep | None] | None = None

    def create(self) -> ChatKVCache:
        """Return an empty KV cache, the fastest that the model allows."""
        if not supports_ragged(self.model):
            return TransformersKVCache(self.model)
        is_capturable = can_be_captured(self.model)
        if self._shared is None or self._shared[1] != is_capturable:  # an adapter was attached, which kernels leave out
            llama = RaggedLlama(self.model)
            self._shared = llama, is_capturable, load_fused_step(llama) if is_capturable else None
        llama, _, fused_step = self._shared
        # LLM.int8's layers wait for the device to count outliers, which a CUDA graph can't capture.
        is_graphed = is_capturable or has_4bit_weights(self.model.get_model().layers)
        is_graphed = is_graphed and capabilities_of(llama.device).has_cuda_graphs
        return GrowingKVCache(llama, is_graphed=is_graphed, fused_step=fused_step)


def load_fused_step(llama: RaggedLlama) -> DecodeStep | None:
    """Return the decode step in Triton kernels; None where the device runs none or, logged, if they fail a check.

    They are checked to compile and to agree with the layers.
    """
    if not capabilities_of(llama.device).has_triton:
        return None
    from llava.inference.chat import decode_step

    if not decode_step.has_fused_form(llama):
        return None
    fused_step = decode_step.FusedDecodeStep(llama)
    try:
        distance = logit_distance(llama, fused_step)
    except torch.OutOfMemoryError:
        raise
    except decode_step.COMPILE_ERRORS as error:
        logger.warning("Triton can't compile the decode kernels, so decoding is slower: %s", error)
        return None
    if not distance <= MAX_LOGIT_DISTANCE:
        logger.warning(
            "the Triton decode kernels disagree with the layers (relative distance of the logits %.2f), so they are "
            "not used and decoding is slower",
            distance,
        )
        return None
    return fused_step


@torch.no_grad()
def logit_distance(llama: RaggedLlama, step: DecodeStep) -> float:
    """Return the distance of a decode step's logits from the layers', relative to these; may be NaN."""
    logits = []
    for cache in (GrowingKVCache(llama), GrowingKVCache(llama, fused_step=step)):
        tokens = torch.arange(_PROBE_TOKENS, device=llama.device) % 3 + 1
        cache.prefill(llama.embed(tokens[:-4]))
        logits.append(torch.cat([cache.decode(token).float() for token in tokens[-4:].split(1)]))  # (4, W)
    expected, found = logits
    return float((found - expected).norm() / expected.norm())


class GrowingKVCache:
    """Contiguous KV cache of batch size 1 that doubles when it is full.

    Args:
        llama: the LLM's layers.
        is_graphed: capture decode steps as CUDA graphs.
        fused_step: the decode step in Triton kernels; None = the layers' own modules.
    """

    def __init__(self, llama: RaggedLlama, *, is_graphed: bool = False, fused_step: DecodeStep | None = None) -> None:
        self.length = 0
        self._llama, self._is_graphed, self._fused_step = llama, is_graphed, fused_step
        self._layers: Storage = [self._allocate(0)] * llama.n_layers
        self._graphs: CudaGraphs | None = None

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self._layers[-1][0].shape[1]  # layers grow in order, so the last one is never ahead

    def truncate(self, length: int) -> None:
        """Drop the positions from `length` on."""
        self.length = min(self.length, length)

    @torch.no_grad()
    def prefill(self, embeds: Tensor, room: int = 0) -> Tensor:
        """Append positions and return the logits after the last, (S, D) -> (1, W); see `ChatKVCache.prefill`."""
        llama, start = self._llama, self.length
        stop = start + len(embeds)
        if stop + room > self.capacity:
            self._grow(stop + room)
        positions = torch.arange(start, stop, device=llama.device)

        def attend(layer: int, query: Tensor) -> Tensor:
            keys, values = (part[:, :stop] for part in self._layers[layer])
            query = query[-1:] if layer == llama.n_layers - 1 else query
            return causal_attention(query[None], keys, values)

        places = TokenPlaces(positions, torch.zeros_like(positions), positions)
        last = torch.tensor([len(embeds) - 1], device=llama.device)
        logits = llama.forward(embeds, places, self._layers, attend, last)
        self.length = stop
        return logits

    @torch.no_grad()
    def decode(self, token: Tensor) -> Tensor:
        """Append a token and return the logits after it, (1, W); see `ChatKVCache.decode`."""
        if self.length == self.capacity:
            self._grow(self.length + 1)
        used = self.capacity if self._fused_step else min(self.capacity, round_up(self.length + 1, USED_MULTIPLE))
        shape = StepShape(n_sequences=1, n_slots=1, n_columns=1, length=used)
        with torch.cuda.device_of(token):
            entries = torch.cat([token, torch.full_like(token, self.length)])
            if self._is_graphed:
                self._graphs = self._graphs or CudaGraphs(capture_at=2)
                logits = self._graphs(self._decode, entries, shape)
            else:
                logits = self._decode(entries, shape)
        self.length += 1
        return logits

    def _decode(self, entries: Tensor, shape: StepShape) -> Tensor:
        """Compute a decode step, (2,) -> (1, W); entries are the token id and its position."""
        if self._fused_step:
            return self._fused_step(entries, self._layers)
        llama = self._llama
        token, position = entries.split(1)
        bias = additive_mask(torch.arange(shape.length, device=llama.device) <= position, llama.dtype)[None, None, None]

        def attend(layer: int, query: Tensor) -> Tensor:
            keys, values = (part[:, : shape.length] for part in self._layers[layer])
            return masked_attention(query[None], keys, values, bias)  # (1, H d)

        places = TokenPlaces(position, torch.zeros_like(position), position)
        return llama.forward(llama.embed(token), places, self._layers, attend, torch.zeros_like(position))

    def _grow(self, needed: int) -> None:
        """Make room for `needed` positions; after an interruption the layers grown so far are larger than the rest."""
        limit = len(self._llama.cosine)
        capacity = max(needed, min(limit, max(round_up(needed, _CAPACITY_MULTIPLE), 2 * self.capacity)))
        self._graphs = None  # they hold the addresses of the old storage
        for number, layer in enumerate(self._layers):
            grown = self._allocate(capacity)
            for part, larger in zip(layer, grown, strict=True):
                larger[:, : self.length] = part[:, : self.length]
            self._layers[number] = grown

    def _allocate(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Return zeroed keys and values of a layer, (1, capacity, Hkv, d): masked values are multiplied by 0."""
        shape, llama = (1, capacity, *self._llama.key_shape), self._llama
        return tuple(torch.zeros(shape, dtype=llama.dtype, device=llama.device) for _ in range(2))


class TransformersKVCache:
    """KV cache in transformers' `DynamicCache`.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: LlavaLlamaForCausalLM) -> None:
        self.length = 0
        self._model = model
        self._cache = DynamicCache()

    def truncate(self, length: int) -> None:
        """Drop the positions from `length` on."""
        self.length = min(self.length, length)
        layers = self._cache.layers
        if all(layer.get_seq_length() == self.length for layer in layers):
            return
        self._cache = DynamicCache()
        if self.length:  # after an interruption some layers may hold more positions than others
            for number, layer in enumerate(layers):
                kept = (part[:, :, : self.length] for part in (layer.keys, layer.values))
                self._cache.update(*kept, number)

    @torch.no_grad()
    def prefill(self, embeds: Tensor, room: int = 0) -> Tensor:
        """Append positions and return the logits after the last, (S, D) -> (1, W); `room` has no effect."""
        output = self._model(inputs_embeds=embeds[None], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self.length += len(embeds)
        return output.logits[0]

    def decode(self, token: Tensor) -> Tensor:
        """Append a token, (1,) int64 on the device, and return the logits after it, (1, W)."""
        return self.prefill(self._model.get_input_embeddings()(token))
