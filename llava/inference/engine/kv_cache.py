"""KV cache of the batch engine, with a slot per prefix group; its prefill and decode steps.

The system prefix is computed once and copied into every slot. A slot's sequences share its prefixes; an answer token is
put at the end of its slot and marked with its sequence's column, which decides which queries attend to it.
"""

from __future__ import annotations

import functools
import itertools
from collections import abc

import torch
from torch import Tensor

from llava.constants import IMAGE_PREFIX
from llava.inference.engine.cuda_graphs import LENGTH_MULTIPLE, CudaGraphs, StepShape
from llava.inference.engine.kv_layout import EMPTY, layout_prefill, round_up
from llava.inference.engine.ragged_llama import (
    RaggedLlama,
    TokenPlaces,
    additive_mask,
    causal_attention,
    masked_attention,
)
from llava.inference.engine.sequence import Batch, PrefixGroup, Sequence
from llava.model.attention.sdpa_backends import without_cudnn
from llava.model.devices import send
from llava.model.packed.masks import suffix_decode_mask, suffix_prefill_mask


def slot_bytes(llama: RaggedLlama, capacity: int) -> int:
    """Return the size of a slot of `capacity` positions."""
    heads, width = llama.key_shape
    return 2 * llama.n_layers * capacity * heads * width * llama.dtype.itemsize


class KVCache:
    """Keys and values of all layers in slots of one capacity, and the prefill and decode steps that fill them.

    Args:
        llama: computes keys and values.
        system_prefix: ids of the run's system prefix; may be empty.
        n_slots: slots.
        capacity: positions of a slot, a multiple of `MULTIPLE`.
        graphed: capture decode steps as CUDA graphs.

    Raises:
        torch.OutOfMemoryError: if they don't fit the memory.
    """

    def __init__(
        self,
        llama: RaggedLlama,
        system_prefix: abc.Sequence[int],
        n_slots: int,
        capacity: int,
        *,
        graphed: bool = False,
    ) -> None:
        self.n_slots, self.capacity = n_slots, capacity
        self._llama = llama
        self._system_length = len(system_prefix)
        shape, device = (n_slots, capacity, *llama.key_shape), llama.device
        # Zeros: attention multiplies masked values by 0, and uninitialised memory may hold NaN.
        self._layers = [
            tuple(torch.zeros(shape, dtype=llama.dtype, device=device) for _ in range(2)) for _ in range(llama.n_layers)
        ]
        self._columns = torch.full((n_slots, capacity), EMPTY, dtype=torch.int16, device=device)
        self._columns[:, : self._system_length] = IMAGE_PREFIX
        self._next_tokens = torch.zeros(n_slots, capacity, dtype=torch.int64, device=device)  # by slot and column
        self._graphs = CudaGraphs() if graphed else None
        if system_prefix:
            self._prefill_system(system_prefix)

    def prefill(self, batch: Batch) -> Tensor:
        """Compute prefix groups into their slots; return the logits of the last `n_logits` positions of each suffix.

        Returns:
            (logits, W), in the order of the sequences.
        """
        groups, llama = batch.groups, self._llama
        suffix_start = self._system_length + batch.prefix_length
        layout = layout_prefill(groups, self._system_length, batch.prefix_length, batch.length)
        columns = send(layout.columns, llama.device)  # (slots, length) int16
        slots = _as_slice([group.slot for group in groups], llama.device)
        self._columns[slots] = EMPTY
        self._columns[slots, : batch.length] = columns
        kept, kept_in_suffixes = map(torch.clone, send(layout.kept, llama.device))
        is_causal = all(len(group.sequences) == 1 and group.prefix_length == batch.prefix_length for group in groups)
        bias = None if is_causal else additive_mask(suffix_prefill_mask(columns, suffix_start), llama.dtype)
        places = TokenPlaces(*map(torch.clone, send(layout.places, llama.device)))
        embeds = self._embed(groups, layout.suffix_ids, batch.prefix_length)
        attend = functools.partial(self._attend_prefill, batch, slots, bias, kept_in_suffixes)
        with without_cudnn():  # each prefill step has another shape
            return llama.forward(embeds, places, self._layers, attend, kept)

    def _attend_prefill(
        self, batch: Batch, slots: slice | Tensor, bias: Tensor | None, kept: Tensor, layer: int, query: Tensor
    ) -> Tensor:
        """Return attention of image prefixes and suffixes, in the last layer of the kept positions alone.

        Args:
            batch: the prefill step.
            slots: of its groups.
            bias: (slots, 1, suffix positions, length), which keys each suffix position attends to; None = every slot
                holds one sequence and no padding before its suffix, so that attention is causal.
            kept: (logits,) int64, suffix positions whose logits are needed.
            layer: number of the layer.
            query: (tokens, H, d).
        """
        n_slots, prefix_length = len(batch.groups), batch.prefix_length
        keys, values = (part[slots, : batch.length] for part in self._layers[layer])
        query = query.unflatten(0, (n_slots, -1))
        is_last = layer == self._llama.n_layers - 1
        if bias is not None:
            suffixes = masked_attention(query[:, prefix_length:], keys, values, bias)
            if is_last or not prefix_length:
                return suffixes[kept] if is_last else suffixes
        elif is_last:
            return causal_attention(query[:, prefix_length:], keys, values)[kept]
        end = batch.length if bias is None else self._system_length + prefix_length
        n_queries = end - self._system_length
        attended = causal_attention(query[:, :n_queries], keys[:, :end], values[:, :end])
        if bias is None:
            return attended
        attended = attended.unflatten(0, (n_slots, n_queries))
        return torch.cat((attended, suffixes.unflatten(0, (n_slots, -1))), dim=1).flatten(0, 1)

    def set_next_tokens(self, members: abc.Sequence[tuple[PrefixGroup, Sequence]], tokens: Tensor) -> None:
        """Store each sequence's next input token, (sequences,), without a copy to the host."""
        entries = torch.tensor([(group.slot, sequence.column - 1) for group, sequence in members])
        slots, columns = send(entries.T.contiguous(), self._llama.device)
        self._next_tokens[slots, columns] = tokens

    def decode(self, batch: Batch) -> Tensor:
        """Append the stored next token of each sequence, and return the logits after it, (sequences, W).

        Slots without a sequence in the batch may be overwritten.
        """
        inputs = batch.inputs
        _, slots, offsets, columns = zip(*inputs, strict=True)
        shape = StepShape(len(inputs), n_slots=1 + max(slots), n_columns=max(columns), length=1 + max(offsets))
        if self._graphs or self._llama.compiled:
            shape = shape.padded(self.n_slots)
        length = min(self.capacity, round_up(shape.length))
        if self._graphs and self.capacity - length < LENGTH_MULTIPLE:
            length = self.capacity  # a shape less to capture
        shape = shape._replace(length=length)
        order = [*slots] if _reads_in_order(shape) else [*range(len(inputs))]
        if _reads_in_order(shape):
            # Slots without a sequence take a token too, at an offset of their own that a prefill step will overwrite.
            idle = {slot: (0, slot, shape.length - 1, 1) for slot in range(shape.n_slots)}
            inputs = [*(idle | {entry[1]: entry for entry in inputs}).values()]
            shape = shape._replace(n_sequences=shape.n_slots)
        inputs = inputs + inputs[:1] * (shape.n_sequences - len(inputs))  # computed again and ignored
        sent = send(torch.tensor(inputs).T.contiguous(), self._llama.device)  # (4, sequences)
        if self._graphs is None:
            logits = self._compute_decode(sent, shape)
        else:
            logits = self._graphs(self._compute_decode, sent, shape, capture_now=batch.capture_now)
        if order == [*range(len(order))]:
            return logits[: len(order)]
        return logits[send(torch.tensor(order), logits.device)]

    def _compute_decode(self, inputs: Tensor, shape: StepShape) -> Tensor:
        """Return the logits of a decode step, (4, sequences) -> (sequences, W); inputs as in `Batch`."""
        positions, slots, offsets, columns = map(torch.clone, inputs)
        tokens = self._next_tokens[slots, columns - 1]
        n_slots, n_columns, length = shape.n_slots, shape.n_columns, shape.length
        self._columns[slots, offsets] = columns.to(self._columns.dtype)
        bias = additive_mask(suffix_decode_mask(self._columns[:n_slots, :length], n_columns), self._llama.dtype)

        def attend(layer: int, query: Tensor) -> Tensor:
            keys, values = (part[:n_slots, :length] for part in self._layers[layer])
            if _reads_in_order(shape):
                return masked_attention(query[:, None], keys, values, bias)
            grid = query.new_zeros(n_slots, n_columns, *query.shape[1:])
            grid[slots, columns - 1] = query
            return masked_attention(grid, keys, values, bias)[slots * n_columns + columns - 1]

        everything = torch.arange(len(tokens), device=tokens.device)
        embeds = self._llama.embed(tokens)
        return self._llama.forward(embeds, TokenPlaces(positions, slots, offsets), self._layers, attend, everything)

    def compact(self, slots: abc.Sequence[int]) -> None:
        """Move these slots to the front, in order, so that a decode step has less to read."""
        sent = send(torch.tensor(slots), self._llama.device)
        for part in (*itertools.chain(*self._layers), self._columns, self._next_tokens):
            part[: len(slots)] = part[sent]

    def _prefill_system(self, system_prefix: abc.Sequence[int]) -> None:
        llama, length = self._llama, len(system_prefix)
        positions = torch.arange(length, device=llama.device)

        def attend(layer: int, query: Tensor) -> Tensor:
            for part in self._layers[layer]:
                part[1:, :length] = part[:1, :length]
            keys, values = (part[:1, :length] for part in self._layers[layer])
            attended = causal_attention(query[None], keys, values)
            return attended[-1:] if layer == llama.n_layers - 1 else attended

        embeds = llama.embed(torch.tensor(system_prefix, device=llama.device))
        places = TokenPlaces(positions, torch.zeros_like(positions), positions)
        with without_cudnn():
            llama.forward(embeds, places, self._layers, attend, positions[-1:], is_once=True)

    def _embed(self, groups: abc.Sequence[PrefixGroup], suffix_ids: Tensor, prefix_length: int) -> Tensor:
        """Return the embeddings group by group, image prefix and suffixes, (tokens, D)."""
        pieces = []
        embeds = self._llama.embed(send(suffix_ids, self._llama.device))  # (slots, suffix positions, D)
        for group, suffixes in zip(groups, embeds, strict=True):
            padding = group.prefix_embeds.new_zeros(prefix_length - group.prefix_length, embeds.shape[-1])
            pieces += [group.prefix_embeds, padding, suffixes]
        return torch.cat([piece for piece in pieces if len(piece)])


def _reads_in_order(shape: StepShape) -> bool:
    """Return whether a decode step has one query per slot, in the order of the slots, so that none has to be moved."""
    return shape.n_columns == 1 and shape.n_slots <= shape.n_sequences


def _as_slice(slots: abc.Sequence[int], device: torch.device) -> slice | Tensor:
    """Return neighbouring slots as a slice, which is read in place, others as indices."""
    if slots == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return send(torch.tensor(slots), device)
