"""What a dialogue's positions leave behind, keys and values, and the logits of its next token.

`RowCache` computes through the flat layers, into storage that stays where it is; on CUDA a token is then one graph.
`LibraryCache` computes through transformers' forward, for models that the flat layers don't cover.

Letters: `S` positions that are read, `C` positions there is room for, `W` vocabulary; `D`, `K`, `d` as in
`llava/model/flat_llama.py`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from llava.inference.step_graphs import StepGraphs, StepShape
from llava.inference.tree_cache import round_up
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

MULTIPLE = 512
"""Attention of a step covers the positions in use rounded up to it, so that few shapes occur; others are masked."""
_ROOM_MULTIPLE = 128


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


def open_cache(model: LlavaLlamaForCausalLM) -> DialogueCache:
    """Return an empty cache, the fastest that suits the model.

    Args:
        model: in eval mode.
    """
    if not is_flat(model):
        return LibraryCache(model)
    return RowCache(FlatLlama(model), graphed=model.device.type == "cuda" and has_plain_weights(model))


class RowCache:
    """One row of keys and values that grows by doubling.

    Args:
        llama: computes them.
        graphed: record the steps as CUDA graphs.
    """

    def __init__(self, llama: FlatLlama, *, graphed: bool = False) -> None:
        self.length = 0
        self._llama, self._graphed = llama, graphed
        self._layers: list[tuple[Tensor, Tensor]] = [self._storage(0)] * llama.n_layers
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
        entries = torch.cat([token, torch.full_like(token, self.length)])
        used = min(self.capacity, round_up(self.length + 1, MULTIPLE))
        if self._graphed:
            logits = self._recorded()(self._compute_step, entries, StepShape(1, 1, 1, used))
        else:
            logits = self._compute_step(entries, StepShape(1, 1, 1, used))
        self.length += 1
        return logits

    def _compute_step(self, entries: Tensor, shape: StepShape) -> Tensor:
        """Return the logits behind a token, (2,) -> (1, W); entries are the token and its place."""
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
