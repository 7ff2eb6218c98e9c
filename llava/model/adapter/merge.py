"""Merge LoRA adapters into the weights they were trained on: W + scale * B A.

Source: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rank-stabilised scale), Liu et al. 2024 (DoRA).
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from llava.model.adapter.lora import Adapter
from llava.model.checkpoint.hf_layout import VOCABULARY, cut_vocabulary
from llava.model.checkpoint.lazy_tensors import LazyTensor, LazyTensors

_BLOCK_ROWS = 256  # of a weight, merged at a time; in fp32 they fit into the CPU's cache
_CHECKED_ROWS = 1024  # of a weight, compared at a time
_SUMMATION = 1e-5  # of the largest value in those rows: fp32 sums depend on the order of their terms


def add_adapter(base: LazyTensors, adapter: Adapter) -> LazyTensors:
    """Return the base's tensors with the adapter added in fp32 and cast once, to the dtype of the base's tensor.

    Raises:
        ValueError: if the base lacks a tensor that the adapter changes or has it in another shape.
    """
    adapter = fit_to_base(adapter, base)
    replaced = base.overlaid(adapter.replaced.entries)
    sums = {}
    for name, (down, up) in adapter.pairs.items():
        entry, dtype = replaced.entries[name], base.entries[name].dtype
        read = functools.partial(
            merge_weight, entry, down, up, adapter.magnitudes.get(name), adapter.scale(name), dtype
        )
        sums[name] = LazyTensor(entry.shape, dtype, read, f"{entry.source} + {down.source}")
    return replaced.overlaid(sums)


def fit_to_base(adapter: Adapter, base: LazyTensors) -> Adapter:
    """Compare names and shapes; return the adapter with as many rows of embedding and head as the base has.

    The llava-hf layout adds rows for `<image>` and for round numbers, which nothing reads here; they are left out.

    Raises:
        ValueError: if the base lacks a tensor that the adapter changes or has it in another shape.
    """
    if adapter.is_of_hf and VOCABULARY[0] in base:
        rows = base.entries[VOCABULARY[0]].shape[0]
        pairs = {
            name: (down, cut_vocabulary(LazyTensors({name: up}), rows).entries[name])
            for name, (down, up) in adapter.pairs.items()
        }
        adapter = dataclasses.replace(adapter, pairs=pairs, replaced=cut_vocabulary(adapter.replaced, rows))
    added = {name for name in adapter.replaced if "mm_projector" in name}  # a base may have no projector yet
    unknown = sorted((adapter.pairs.keys() | adapter.replaced.keys()) - base.keys() - added)
    if unknown:
        raise ValueError(f"the base has no {unknown[0]}, which the adapter changes; name the base it was trained on")
    shapes = {name: (up.shape[0], down.shape[1]) for name, (down, up) in adapter.pairs.items()}
    shapes |= {name: tuple(entry.shape) for name, entry in adapter.replaced.entries.items() if name in base}
    for name, shape in shapes.items():
        if tuple(base.entries[name].shape) != shape:
            raise ValueError(f"{name} is {tuple(base.entries[name].shape)} in the base, but {shape} in the adapter")
    return adapter


def merge_weight(
    base: LazyTensor, down: LazyTensor, up: LazyTensor, magnitude: LazyTensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    """Return W + scale B A, for DoRA with its rows scaled to their lengths, computed in fp32 and cast once."""
    weight, outer, inner = base.read(), up.read(), down.read().float()
    lengths = None if magnitude is None else magnitude.read().float()
    merged = torch.empty(weight.shape, dtype=dtype)
    block = torch.empty(min(_BLOCK_ROWS, len(weight)), weight.shape[1])
    for start in range(0, len(weight), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        sums = block[: len(weight[rows])].copy_(weight[rows])
        sums.addmm_(outer[rows].float(), inner, alpha=scale)
        if lengths is not None:
            sums *= (lengths[rows] / torch.linalg.norm(sums, dim=1)).unsqueeze(1)
        merged[rows] = sums
    return merged


def check_merged(base: LazyTensors, adapter: Adapter | None, merged: LazyTensors) -> None:
    """Compare merged weights with base and adapter tensor by tensor, a block of rows in memory at a time.

    Args:
        base: with the tensors that were trained without an adapter, as `open_checkpoint(with_adapter=False)` opens it.
        adapter: None = there are no products to add, as for a projector.
        merged: as written, in any dtype.

    Raises:
        ValueError: if a value differs from base + scale B A by more than rounding; the tensor is named.
    """
    pairs = {} if adapter is None else fit_to_base(adapter, base).pairs
    for name, entry in merged.entries.items():
        weight, found = base[name], entry.read()
        if name not in pairs:
            is_same = torch.equal(found, weight.to(found.dtype))
        else:
            down, up = (half.read().float() for half in pairs[name])
            lengths = adapter.magnitudes[name].read().float() if name in adapter.magnitudes else None
            is_same = _is_sum(found, weight, down, up, lengths, adapter.scale(name))
        if not is_same:
            raise ValueError(f"{name} in {entry.source} is not base + adapter: the merge went wrong; don't use it")


def _is_sum(found: Tensor, weight: Tensor, down: Tensor, up: Tensor, lengths: Tensor | None, scale: float) -> bool:
    """Tell whether `found` is W + scale B A, rounded to its dtype once; for DoRA with rows of these lengths."""
    for start in range(0, len(weight), _CHECKED_ROWS):
        rows = slice(start, start + _CHECKED_ROWS)
        expected = torch.addmm(weight[rows].float(), up[rows], down, alpha=scale)
        if lengths is not None:
            expected *= (lengths[rows] / expected.norm(dim=1))[:, None]
        rounding = torch.finfo(found.dtype).eps / 2
        summation = _SUMMATION * expected.abs().max().item()
        if not torch.allclose(found[rows].float(), expected, rtol=rounding, atol=summation):
            return False
    return True
