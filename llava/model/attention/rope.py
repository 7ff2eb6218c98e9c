"""Rotary position embeddings (RoPE), and their fusion with the split of concatenated q, k and v into heads."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from llava.model.capabilities import capabilities_of

MAX_HEADS = 16
"""Heads of one Triton program."""


def signed_sin(sin: Tensor) -> Tensor:
    """Return transformers' sines (..., d) with a negated first half, so that RoPE only swaps halves of values."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat([-first, second], dim=-1)


def apply_rope(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return values (..., d) rotated by broadcastable tables of angles; `sin` is from `signed_sin`.

    Halves are swapped by a flip, which compiled code turns into an index.
    """
    swapped = values.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return values * cos + swapped * sin


def apply_rope_to_heads(values: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return (B, H, S, d) rotated by their positions, whose cosines and signed sines are (B, S, d)."""
    return apply_rope(values, *(table.unsqueeze(1) for table in rope))


def split_heads(values: Tensor, heads: int) -> Tensor:
    """(B, S, H x d) -> (B, H, S, d)."""
    return values.unflatten(-1, (heads, -1)).transpose(1, 2)


def split_rotated_heads(
    qkv: Tensor, rope: tuple[Tensor, Tensor], heads: int, key_value_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries (B, H, S, d), rotated keys (B, Hkv, S, d) and values (B, Hkv, S, d).

    The gradient of `qkv` is written by one kernel. Inductor's code for autograd's took 0.58 ms a layer for
    LLaVA-1.5-7B's heads and 7,936 positions on an H100 (PyTorch 2.11), this takes 0.17 ms for 9,856
    (`benchmarks/train_speed.py --profile`).

    Args:
        qkv: (B, S, (H + 2 Hkv) x d), the output of concatenated linear layers.
        rope: cosines and signed sines (B, S, d), whose halves are alike.
        heads: H.
        key_value_heads: Hkv.
    """
    return _SplitRotatedHeads.apply(qkv, *rope, heads, key_value_heads)


class _SplitRotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, key_value_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        width = cos.shape[-1]
        query, key, value = qkv.split([heads * width, key_value_heads * width, key_value_heads * width], dim=-1)
        query, key = split_heads(query, heads), split_heads(key, key_value_heads)
        rope = (cos, sin)
        return apply_rope_to_heads(query, rope), apply_rope_to_heads(key, rope), split_heads(value, key_value_heads)

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None, None, None, None]:
        return qkv_gradient(query, key, value, *ctx.saved_tensors), None, None, None, None


@torch.library.custom_op("llava::qkv_gradient", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def qkv_gradient(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of `split_rotated_heads`' first argument, (B, S, (H + 2 Hkv) x d).

    Args:
        query: gradient of the queries, (B, H, S, d).
        key: gradient of the keys, (B, Hkv, S, d).
        value: gradient of the values, (B, Hkv, S, d).
        cos: (B, S, d).
        sin: (B, S, d), from `signed_sin`.
    """
    parts = [query, key, value]
    kernel = _kernel(query.device) if len({part.dtype for part in parts}) == 1 else None
    rows, heads, positions, width = query.shape
    qkv = query.new_empty(rows, positions, (heads + key.shape[1] + value.shape[1]) * width)
    if kernel is None or (width & (width - 1)):
        inverse = (cos, -sin)
        rotated_back = [apply_rope_to_heads(query, inverse), apply_rope_to_heads(key, inverse), value]
        return torch.cat([part.transpose(1, 2).flatten(2) for part in rotated_back], dim=-1)
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in parts]
    block = math.gcd(heads, key.shape[1], MAX_HEADS)
    strides = [stride for part in parts for stride in part.stride()[:3]]
    grid = (rows * positions, qkv.shape[-1] // (width * block))
    tables = (cos.contiguous(), sin.contiguous())
    kernel[grid](
        *parts, *tables, qkv, *strides, positions, heads, key.shape[1], HALF=width // 2, BLOCK=block, num_warps=4
    )
    return qkv


@qkv_gradient.register_fake
def _qkv_gradient_shape(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows, heads, positions, width = query.shape
    return query.new_empty(rows, positions, (heads + key.shape[1] + value.shape[1]) * width)


@functools.cache
def _kernel(device: torch.device) -> Any:
    """Return the Triton kernel; None where the device runs none."""
    if not capabilities_of(device).has_triton:
        return None
    from llava.model.attention.rope_triton import write_qkv_gradient

    return write_qkv_gradient
