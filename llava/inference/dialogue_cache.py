"""What a dialogue's positions leave behind, keys and values, and the logits of its next token.

`RowCache` computes through the flat layers, into storage that stays where it is; on CUDA a token is then one graph, and
of few kernels where Triton is there.
`LibraryCache` computes through transformers' forward, for models that the flat layers don't cover.

Letters: `S` positions that are read, `C` positions there is room for, `W` vocabulary; `D`, `K`, `d` as in
`llava/model/flat_llama.py`.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache

from llava.inference.step_graphs import StepGraphs, StepShape
from llava.inference.tree_rows import round_up
from llava.model.flat_llama import (
    FlatLlama,
    Places,
    additive,
    attend_causal,
    attend_dense,
    has_plain_weights,
    is_flat,
)
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.quantization import has_4bit_weights

logger = logging.getLogger(__name__)

MULTIPLE = 512
"""Attention of a step covers the positions in use rounded up to it, so that few shapes occur; others are masked."""
_ROOM_MULTIPLE = 128
_TRIED = 66
"""Tokens by which kernels are compared with the layers: a part of their attention, and the beginning of a second."""
TOLERATED = 0.25
"""Relative distance of kernels' logits from the layers'; of logits that have nothing to do with them it is 1.4."""

Storage: TypeAlias = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (1, C, K, d)."""
Step: TypeAlias = Callable[[Tensor, Sequence[tuple[Tensor, Tensor]]], Tensor]
"""Appends a token: (entries (2,), storage) -> logits (1, W); entries are the token and its place."""


class DialogueCache(Protocol):
    """Positions of one dialogue.

    Attributes:
        length: positions that count; what an interrupted call left behind them is written over.
    """

    length: int

    def read(self, embeds: Tensor, room: int = 0) -> Tensor:
        """Append positions and return the logits behind the last, (S, D) -> (1, W).

        Args:
            embeds: (S, D).
            room: positions that will follow, as far as is known.
        """

    def step(self, token: Tensor) -> Tensor:
        """Append a token, (1,) int64 on the device, and return the logits behind it, (1, W), until the next call."""

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on."""


class DialogueCaches:
    """Opens caches of a model; what they share, kernels and tables, is made with the first.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: LlavaLlamaForCausalLM) -> None:
        self.model = model
        self._shared: tuple[FlatLlama, bool, Step | None] | None = None

    def open(self) -> DialogueCache:
        """Return an empty cache, the fastest that suits the model."""
        if not is_flat(self.model):
            return LibraryCache(self.model)
        is_plain = has_plain_weights(self.model)
        if self._shared is None or self._shared[1] != is_plain:  # adapters may have come, which kernels leave out
            llama = FlatLlama(self.model)
            is_fused = is_plain and llama.device.type == "cuda"
            self._shared = llama, is_plain, load_kernels(llama) if is_fused else None
        llama, _, fused = self._shared
        # In 8 bit the layers wait for the device, to see how many outliers there are.
        graphed = llama.device.type == "cuda" and (is_plain or has_4bit_weights(self.model.get_model().layers))
        return RowCache(llama, graphed=graphed, fused=fused)


def load_kernels(llama: FlatLlama) -> Step | None:
    """Return the step in few kernels, if it can be had and does what the layers do; what stands in the way is logged.

    Args:
        llama: on CUDA.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    from llava.model import token_step

    if not token_step.has_fused_form(llama):
        return None
    fused = token_step.FusedStep(llama)
    try:
        difference = distance_from_layers(llama, fused)
    except torch.OutOfMemoryError:
        raise
    except token_step.FAILURES as error:
        logger.warning("Triton can't compile kernels here, so that tokens come more slowly: %s", error)
        return None
    if not difference <= TOLERATED:
        logger.warning(
            "kernels compute something else than the layers here (relative distance %.2f), so that they are not used "
            "and tokens come more slowly",
            difference,
        )
        return None
    return fused


@torch.no_grad()
def distance_from_layers(llama: FlatLlama, step: Step) -> float:
    """Return how far the logits behind a few tokens are from those of the layers, relative to these; maybe NaN."""
    logits = []
    for cache in (RowCache(llama), RowCache(llama, fused=step)):
        tokens = torch.arange(_TRIED, device=llama.device) % 3 + 1
        cache.read(llama.embed(tokens[:-4]))
        logits.append(torch.cat([cache.step(token).float() for token in tokens[-4:].split(1)]))  # (4, W)
    expected, found = logits
    return float((found - expected).norm() / expected.norm())


class RowCache:
    """One row of keys and values that grows by doubling.

    Args:
        llama: computes them.
        graphed: record the steps as CUDA graphs.
        fused: computes a step; None = the layers themselves.
    """

    def __init__(self, llama: FlatLlama, *, graphed: bool = False, fused: Step | None = None) -> None:
        self.length = 0
        self._llama, self._graphed, self._fused = llama, graphed, fused
        self._layers: Storage = [self._storage(0)] * llama.n_layers
        self._graphs: StepGraphs | None = None

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._layers[-1][0].shape[1]  # the last that grows

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on."""
        self.length = min(self.length, length)

    @torch.no_grad()
    def read(self, embeds: Tensor, room: int = 0) -> Tensor:
        """Append positions and return the logits behind the last, (S, D) -> (1, W).

        Args:
            embeds: (S, D).
            room: positions that will follow, as far as is known.
        """
        llama, start = self._llama, self.length
        stop = start + len(embeds)
        if stop + room > self.capacity:
            self._grow(stop + room)
        positions = torch.arange(start, stop, device=llama.device)

        def attend(layer: int, query: Tensor) -> Tensor:
            keys, values = (part[:, :stop] for part in self._layers[layer])
            query = query[-1:] if layer == llama.n_layers - 1 else query
            return attend_causal(query[None], keys, values)

        places = Places(positions, torch.zeros_like(positions), positions)
        last = torch.tensor([len(embeds) - 1], device=llama.device)
        logits = llama.fill_and_read(embeds, places, self._layers, attend, last)
        self.length = stop
        return logits

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Append a token, (1,) int64 on the device, and return the logits behind it, (1, W), until the next call."""
        if self.length == self.capacity:
            self._grow(self.length + 1)
        used = self.capacity if self._fused else min(self.capacity, round_up(self.length + 1, MULTIPLE))
        shape = StepShape(n_answers=1, n_rows=1, n_columns=1, used=used)
        with torch.cuda.device_of(token):
            entries = torch.cat([token, torch.full_like(token, self.length)])
            logits = (self._recorded() if self._graphed else _call)(self._compute_step, entries, shape)
        self.length += 1
        return logits

    def _compute_step(self, entries: Tensor, shape: StepShape) -> Tensor:
        """Return the logits behind a token, (2,) -> (1, W); entries are the token and its place."""
        if self._fused:
            return self._fused(entries, self._layers)
        llama = self._llama
        token, place = entries.split(1)
        bias = additive(torch.arange(shape.used, device=llama.device) <= place, llama.dtype)[None, None, None]

        def attend(layer: int, query: Tensor) -> Tensor:
            keys, values = (part[:, : shape.used] for part in self._layers[layer])
            return attend_dense(query[None], keys, values, bias)  # (1, H d)

        places = Places(place, torch.zeros_like(place), place)
        return llama.fill_and_read(llama.embed(token), places, self._layers, attend, torch.zeros_like(place))

    def _recorded(self) -> StepGraphs:
        if self._graphs is None:
            self._graphs = StepGraphs(recorded_from=2)
        return self._graphs

    def _grow(self, needed: int) -> None:
        """Make room for `needed` positions; an interruption leaves layers of several sizes, the last the smallest."""
        limit = len(self._llama.cosine)
        capacity = max(needed, min(limit, max(round_up(needed, _ROOM_MULTIPLE), 2 * self.capacity)))
        self._graphs = None  # they point at the storage of now
        for number, layer in enumerate(self._layers):
            grown = self._storage(capacity)
            for part, larger in zip(layer, grown, strict=True):
                larger[:, : self.length] = part[:, : self.length]
            self._layers[number] = grown

    def _storage(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer, (1, C, K, d) each; zeros, because what a mask hides is multiplied by 0."""
        shape, llama = (1, capacity, *self._llama.key_shape), self._llama
        return tuple(torch.zeros(shape, dtype=llama.dtype, device=llama.device) for _ in range(2))


def _call(compute: Callable[[Tensor, StepShape], Tensor], entries: Tensor, shape: StepShape) -> Tensor:
    return compute(entries, shape)


class LibraryCache:
    """Keys and values in transformers' cache.

    Args:
        model: computes them.
    """

    def __init__(self, model: LlavaLlamaForCausalLM) -> None:
        self.length = 0
        self._model = model
        self._cache = DynamicCache()

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on."""
        self.length = min(self.length, length)
        layers = self._cache.layers
        if all(layer.get_seq_length() == self.length for layer in layers):
            return
        self._cache = DynamicCache()
        if self.length:  # an interruption may have left some layers ahead of others
            for number, layer in enumerate(layers):
                kept = (part[:, :, : self.length] for part in (layer.keys, layer.values))
                self._cache.update(*kept, number)

    @torch.no_grad()
    def read(self, embeds: Tensor, room: int = 0) -> Tensor:
        """Append positions and return the logits behind the last, (S, D) -> (1, W); `room` is of no use."""
        output = self._model(inputs_embeds=embeds[None], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self.length += len(embeds)
        return output.logits[0]

    def step(self, token: Tensor) -> Tensor:
        """Append a token, (1,) int64 on the device, and return the logits behind it, (1, W)."""
        return self.read(self._model.get_input_embeddings()(token))
