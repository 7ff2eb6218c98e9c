"""Rotary position embeddings of queries and keys that come joined with their values, and their gradients joined again.

Letters: `R` rows, `S` positions, `H` heads of the tensor in question, `W` width of a head.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

MOST_HEADS = 16
"""Heads that a program of the kernel handles at most."""


def signed(sin: Tensor) -> Tensor:
    """Return transformers' sines (..., W) with a negative first half, so that halves of values are only swapped."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat([-first, second], dim=-1)


def turn(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return values (..., W) turned by the angles of tables that fit them; `sin` is `signed`.

    Halves are swapped by a flip, which compiled code reads by an index alone.
    """
    swapped = values.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return values * cos + swapped * sin


def rotate(values: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return (R, H, S, W) turned by their positions, of which cosines and signed sines are (R, S, W)."""
    return turn(values, *(table.unsqueeze(1) for table in rotary))


def split_heads(values: Tensor, heads: int) -> Tensor:
    """(R, S, H x W) -> (R, H, S, W)."""
    return values.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotated_heads(
    joined: Tensor, rotary: tuple[Tensor, Tensor], heads: int, key_value_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys, turned by their positions, and values, (R, H, S, W) each.

    The gradient of `joined` is written in one pass. What inductor made of autograd's took 0.58 ms a layer for
    LLaVA-1.5-7B's heads and 7,936 positions on an H100 (PyTorch 2.11), this takes 0.17 ms for 9,856
    (`benchmarks/train_speed.py --profile`).

    Args:
        joined: (R, S, (heads + 2 key_value_heads) x W), as linear layers joined give them.
        rotary: cosines and signed sines (R, S, W), whose halves are alike.
        heads: of the queries.
        key_value_heads: of keys and of values.
    """
    return _RotatedHeads.apply(joined, *rotary, heads, key_value_heads)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, joined: Tensor, cos: Tensor, sin: Tensor, heads: int, key_value_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        width = cos.shape[-1]
        query, key, value = joined.split([heads * width, key_value_heads * width, key_value_heads * width], dim=-1)
        query, key = split_heads(query, heads), split_heads(key, key_value_heads)
        return rotate(query, (cos, sin)), rotate(key, (cos, sin)), split_heads(value, key_value_heads)

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None, None, None, None]:
        return joined_gradient(query, key, value, *ctx.saved_tensors), None, None, None, None


@torch.library.custom_op("llava::joined_gradient", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def joined_gradient(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of `rotated_heads`' first argument.

    Args:
        query: gradient of the queries, (R, H, S, W).
        key: of the keys.
        value: of the values.
        cos: (R, S, W).
        sin: likewise, `signed`.
    """
    parts = [query, key, value]
    kernel = _kernel() if query.is_cuda and len({part.dtype for part in parts}) == 1 else None
    rows, heads, positions, width = query.shape
    joined = query.new_empty(rows, positions, (heads + key.shape[1] + value.shape[1]) * width)
    if kernel is None or (width & (width - 1)):
        back = (cos, -sin)
        turned = [rotate(query, back), rotate(key, back), value]
        return torch.cat([part.transpose(1, 2).flatten(2) for part in turned], dim=-1)
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in parts]
    block = math.gcd(heads, key.shape[1], MOST_HEADS)
    strides = [stride for part in parts for stride in part.stride()[:3]]
    grid = (rows * positions, joined.shape[-1] // (width * block))
    tables = (cos.contiguous(), sin.contiguous())
    kernel[grid](
        *parts, *tables, joined, *strides, positions, heads, key.shape[1], HALF=width // 2, BLOCK=block, num_warps=4
    )
    return joined


@joined_gradient.register_fake
def _joined_gradient_shape(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows, heads, positions, width = query.shape
    return query.new_empty(rows, positions, (heads + key.shape[1] + value.shape[1]) * width)


@functools.cache
def _kernel() -> Any:
    """Return Triton's kernel; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from llava.model.rotary_kernel import join_gradients

    return join_gradients
