"""Triton kernels of a batch-1 decode step: matrix-vector products with fused neighbours, and split-KV attention.

`decode_step.py` launches them. Letters as in `llava/model/__init__.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matvec_kernel(
    vector: tl.tensor,
    norm_weight: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    first_scales: tl.tensor,
    second_scales: tl.tensor,
    third_scales: tl.tensor,
    residual: tl.tensor,
    output: tl.tensor,
    epsilon: float,
    N_FIRST: tl.constexpr,
    N_SECOND: tl.constexpr,
    N_THIRD: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write ROWS outputs of one to three concatenated weights times `vector`; a program reads rows of one weight."""
    start = tl.program_id(0) * ROWS
    weight, scales, row = first, first_scales, start
    if N_SECOND > 0:
        if start >= N_FIRST + N_SECOND:
            weight, scales, row = third, third_scales, start - N_FIRST - N_SECOND
        elif start >= N_FIRST:
            weight, scales, row = second, second_scales, start - N_FIRST
    rows = tl.arange(0, ROWS)
    is_row = start + rows < N_FIRST + N_SECOND + N_THIRD
    if (N_FIRST + N_SECOND + N_THIRD) % ROWS == 0:
        lines = weight + (row + rows)[:, None] * WIDTH
    else:  # only with a single weight: out-of-range rows read its last row and are not stored
        lines = weight + tl.minimum(row + rows, N_FIRST - 1)[:, None] * WIDTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for column in tl.range(0, WIDTH, COLUMNS, loop_unroll_factor=4):
        columns = column + tl.arange(0, COLUMNS)
        is_inside = columns < WIDTH
        block = tl.load(lines + columns[None, :], mask=is_inside[None, :], other=0.0).to(tl.float32)
        entry = tl.load(vector + columns, mask=is_inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += entry * entry
            entry *= tl.load(norm_weight + columns, mask=is_inside, other=0.0).to(tl.float32)
        total += block * entry[None, :]
    product = tl.sum(total, axis=1)
    if HAS_SCALES:
        product *= tl.load(scales + row + rows, mask=is_row, other=0.0)
    if HAS_NORM:  # RMSNorm's factor is a scalar, so it can be applied last
        product *= tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + epsilon)
    if HAS_RESIDUAL:
        product += tl.load(residual + start + rows, mask=is_row, other=0.0).to(tl.float32)
    tl.store(output + start + rows, product.to(output.dtype.element_ty), mask=is_row)


@triton.jit
def gated_matvec_kernel(
    vector: tl.tensor,
    norm_weight: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    gate_scales: tl.tensor,
    up_scales: tl.tensor,
    output: tl.tensor,
    epsilon: float,
    WIDTH: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write ROWS values of silu(gate x) * (up x), where x is the RMSNorm of `vector`."""
    start = tl.program_id(0) * ROWS
    rows = tl.arange(0, ROWS)
    offsets = (start + rows)[:, None] * WIDTH
    gate_total = tl.zeros((ROWS, COLUMNS), tl.float32)
    up_total = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for column in tl.range(0, WIDTH, COLUMNS, loop_unroll_factor=4):
        columns = column + tl.arange(0, COLUMNS)
        is_inside = columns < WIDTH
        mask = is_inside[None, :]
        entry = tl.load(vector + columns, mask=is_inside, other=0.0).to(tl.float32)
        squares += entry * entry
        entry *= tl.load(norm_weight + columns, mask=is_inside, other=0.0).to(tl.float32)
        gate_total += tl.load(gate + offsets + columns[None, :], mask=mask, other=0.0).to(tl.float32) * entry[None, :]
        up_total += tl.load(up + offsets + columns[None, :], mask=mask, other=0.0).to(tl.float32) * entry[None, :]
    factor = tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + epsilon)
    gated = tl.sum(gate_total, axis=1) * factor
    raised = tl.sum(up_total, axis=1) * factor
    if HAS_SCALES:
        gated *= tl.load(gate_scales + start + rows)
        raised *= tl.load(up_scales + start + rows)
    product = gated * tl.sigmoid(gated) * raised
    tl.store(output + start + rows, product.to(output.dtype.element_ty))


@triton.jit
def split_attention_kernel(
    entries: tl.tensor,
    qkv: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    partial: tl.tensor,
    scale: float,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Attend to SPLIT positions of the KV cache: apply RoPE, write the token's key and value, store a partial softmax.

    `partial` receives per split and head the weighted sum of values, the highest score, and the sum of the weights.
    """
    HALF: tl.constexpr = HEAD_WIDTH // 2
    GROUP: tl.constexpr = HEADS // KV_HEADS
    head, split = tl.program_id(0), tl.program_id(1)
    position = tl.load(entries + 1).to(tl.int32)
    if split * SPLIT > position:
        return
    half, whole = tl.arange(0, HALF), tl.arange(0, HEAD_WIDTH)
    angle = position * HEAD_WIDTH + half
    cos, sin = tl.load(cosine + angle).to(tl.float32), tl.load(sine + angle).to(tl.float32)
    dtype = keys.dtype.element_ty
    query = qkv + head * HEAD_WIDTH
    left, right = tl.load(query + half).to(tl.float32), tl.load(query + HALF + half).to(tl.float32)
    query_left = (left * cos - right * sin).to(dtype).to(tl.float32)
    query_right = (right * cos + left * sin).to(dtype).to(tl.float32)
    key = qkv + (HEADS + head // GROUP) * HEAD_WIDTH
    left, right = tl.load(key + half).to(tl.float32), tl.load(key + HALF + half).to(tl.float32)
    key_left, key_right = (left * cos - right * sin).to(dtype), (right * cos + left * sin).to(dtype)
    value = tl.load(qkv + (HEADS + KV_HEADS + head // GROUP) * HEAD_WIDTH + whole)
    column = head // GROUP * HEAD_WIDTH
    if (position // SPLIT == split) & (head % GROUP == 0):
        line = position * KV_HEADS * HEAD_WIDTH + column
        tl.store(keys + line + half, key_left)
        tl.store(keys + line + HALF + half, key_right)
        tl.store(values + line + whole, value)
    # The token's key and value are inserted from registers: the stores above may not be visible to other programs yet.
    positions = split * SPLIT + tl.arange(0, SPLIT)
    is_before, is_here = (positions < position)[:, None], (positions == position)[:, None]
    lines = (positions * KV_HEADS * HEAD_WIDTH + column)[:, None]
    keys_left = tl.load(keys + lines + half[None, :], mask=is_before, other=0.0)
    keys_right = tl.load(keys + lines + HALF + half[None, :], mask=is_before, other=0.0)
    cached = tl.load(values + lines + whole[None, :], mask=is_before, other=0.0)
    keys_left = tl.where(is_here, key_left[None, :], keys_left).to(tl.float32)
    keys_right = tl.where(is_here, key_right[None, :], keys_right).to(tl.float32)
    cached = tl.where(is_here, value[None, :], cached).to(tl.float32)
    scores = tl.sum(keys_left * query_left[None, :], axis=1) + tl.sum(keys_right * query_right[None, :], axis=1)
    scores = tl.where(positions <= position, scores * scale, float("-inf"))
    highest = tl.max(scores, axis=0)
    weights = tl.exp(scores - highest)
    target = partial + (split * HEADS + head) * (HEAD_WIDTH + 2)
    tl.store(target + whole, tl.sum(weights[:, None] * cached, axis=0))
    tl.store(target + HEAD_WIDTH, highest)
    tl.store(target + HEAD_WIDTH + 1, tl.sum(weights, axis=0))


@triton.jit
def combine_splits_kernel(
    entries: tl.tensor,
    partial: tl.tensor,
    attended: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Combine a head's partial softmaxes, AT_ONCE splits at a time, into its attention output."""
    head = tl.program_id(0)
    n_splits = tl.load(entries + 1).to(tl.int32) // SPLIT + 1
    whole = tl.arange(0, HEAD_WIDTH)
    highest, weight = float("-inf"), 0.0
    total = tl.zeros((HEAD_WIDTH,), tl.float32)
    first = 0
    while first < n_splits:
        splits = first + tl.arange(0, AT_ONCE)
        is_split = splits < n_splits
        lines = partial + (splits * HEADS + head) * (HEAD_WIDTH + 2)
        tops = tl.load(lines + HEAD_WIDTH, mask=is_split, other=float("-inf"))
        top = tl.maximum(highest, tl.max(tops, axis=0))
        factors, kept = tl.exp(tops - top), tl.exp(highest - top)
        weight = weight * kept + tl.sum(factors * tl.load(lines + HEAD_WIDTH + 1, mask=is_split, other=0.0), axis=0)
        sums = tl.load(lines[:, None] + whole[None, :], mask=is_split[:, None], other=0.0)
        total = total * kept + tl.sum(factors[:, None] * sums, axis=0)
        highest = top
        first += AT_ONCE
    tl.store(attended + head * HEAD_WIDTH + whole, (total / weight).to(attended.dtype.element_ty))
