"""Triton kernel of `llava/model/attention/rope.py`: the gradient of concatenated q, k and v."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_qkv_gradient(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    qkv: tl.tensor,
    query_row: int,
    query_head: int,
    query_position: int,
    key_row: int,
    key_head: int,
    key_position: int,
    value_row: int,
    value_head: int,
    value_position: int,
    positions: int,
    heads: int,
    key_value_heads: int,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write BLOCK heads of one position: queries and keys rotated back, values unchanged."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    row, position = token // positions, token % positions
    blocks = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, HALF)[None, :]
    if first < heads:
        source = query + row * query_row + position * query_position + (first + blocks) * query_head
    elif first < heads + key_value_heads:
        source = key + row * key_row + position * key_position + (first - heads + blocks) * key_head
    else:
        value_first = first - heads - key_value_heads
        source = value + row * value_row + position * value_position + (value_first + blocks) * value_head
    lower = tl.load(source + columns)
    upper = tl.load(source + HALF + columns)
    target = qkv + (token * (heads + 2 * key_value_heads) + first + blocks) * 2 * HALF + columns
    if first < heads + key_value_heads:
        table = token * 2 * HALF + columns
        cosine = tl.load(cos + table).to(tl.float32)
        sine = tl.load(sin + HALF + table).to(tl.float32)
        lower_32, upper_32 = lower.to(tl.float32), upper.to(tl.float32)
        tl.store(target, (lower_32 * cosine + upper_32 * sine).to(lower.dtype))
        tl.store(target + HALF, (upper_32 * cosine - lower_32 * sine).to(lower.dtype))
    else:
        tl.store(target, lower)
        tl.store(target + HALF, upper)
