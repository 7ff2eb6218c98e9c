"""Triton's kernels of `llava/model/token_step.py`; the letters are explained there.

`EARLY`: the programs may be there before the kernel in front has ended, and wait for that; so may those of the next.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def multiply_rows(
    value: tl.tensor,
    gain: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    added: tl.tensor,
    result: tl.tensor,
    epsilon: float,
    N_FIRST: tl.constexpr,
    N_SECOND: tl.constexpr,
    N_THIRD: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_NORMED: tl.constexpr,
    IS_ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Write ROWS products of a row of one to three weights, one behind the other, with `value`."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    start = tl.program_id(0) * ROWS
    weight, row = first, start
    if N_SECOND > 0:
        if start >= N_FIRST + N_SECOND:
            weight, row = third, start - N_FIRST - N_SECOND
        elif start >= N_FIRST:
            weight, row = second, start - N_FIRST
    rows = tl.arange(0, ROWS)
    is_row = start + rows < N_FIRST + N_SECOND + N_THIRD
    if (N_FIRST + N_SECOND + N_THIRD) % ROWS == 0:
        lines = weight + (row + rows)[:, None] * WIDTH
    else:  # of a single weight: the last row again
        lines = weight + tl.minimum(row + rows, N_FIRST - 1)[:, None] * WIDTH
    total = tl.zeros((ROWS, STEP), tl.float32)
    squares = tl.zeros((STEP,), tl.float32)
    for column in tl.range(0, WIDTH, STEP, loop_unroll_factor=4):
        columns = column + tl.arange(0, STEP)
        is_inside = columns < WIDTH
        read = tl.load(lines + columns[None, :], mask=is_inside[None, :], other=0.0).to(tl.float32)
        entry = tl.load(value + columns, mask=is_inside, other=0.0).to(tl.float32)
        if IS_NORMED:
            squares += entry * entry
            entry *= tl.load(gain + columns, mask=is_inside, other=0.0).to(tl.float32)
        total += read * entry[None, :]
    product = tl.sum(total, axis=1)
    if IS_NORMED:
        product *= tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + epsilon)
    if IS_ADDED:
        product += tl.load(added + start + rows, mask=is_row, other=0.0).to(tl.float32)
    tl.store(result + start + rows, product.to(result.dtype.element_ty), mask=is_row)


@triton.jit
def multiply_gated_rows(
    value: tl.tensor,
    gain: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    result: tl.tensor,
    epsilon: float,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Write ROWS products of the gate, activated, times those of `up`, of the norm of `value`."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    start = tl.program_id(0) * ROWS
    rows = tl.arange(0, ROWS)
    offsets = (start + rows)[:, None] * WIDTH
    gated = tl.zeros((ROWS, STEP), tl.float32)
    raised = tl.zeros((ROWS, STEP), tl.float32)
    squares = tl.zeros((STEP,), tl.float32)
    for column in tl.range(0, WIDTH, STEP, loop_unroll_factor=4):
        columns = column + tl.arange(0, STEP)
        is_inside = columns < WIDTH
        mask = is_inside[None, :]
        entry = tl.load(value + columns, mask=is_inside, other=0.0).to(tl.float32)
        squares += entry * entry
        entry *= tl.load(gain + columns, mask=is_inside, other=0.0).to(tl.float32)
        gated += tl.load(gate + offsets + columns[None, :], mask=mask, other=0.0).to(tl.float32) * entry[None, :]
        raised += tl.load(up + offsets + columns[None, :], mask=mask, other=0.0).to(tl.float32) * entry[None, :]
    factor = tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + epsilon)
    opened = tl.sum(gated, axis=1) * factor
    product = opened * tl.sigmoid(opened) * tl.sum(raised, axis=1) * factor
    tl.store(result + start + rows, product.to(result.dtype.element_ty))


@triton.jit
def attend_part(
    entries: tl.tensor,
    projected: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    found: tl.tensor,
    scale: float,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Note what a head's query finds in a part of the cache, into which the part that holds the place puts the key."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    HALF: tl.constexpr = WIDTH // 2
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    head, part = tl.program_id(0), tl.program_id(1)
    place = tl.load(entries + 1).to(tl.int32)
    if part * PART > place:
        return
    half, whole = tl.arange(0, HALF), tl.arange(0, WIDTH)
    turn = place * WIDTH + half
    cos, sin = tl.load(cosine + turn).to(tl.float32), tl.load(sine + turn).to(tl.float32)
    kind = keys.dtype.element_ty
    query = projected + head * WIDTH
    left, right = tl.load(query + half).to(tl.float32), tl.load(query + HALF + half).to(tl.float32)
    query_left = (left * cos - right * sin).to(kind).to(tl.float32)
    query_right = (right * cos + left * sin).to(kind).to(tl.float32)
    key = projected + (HEADS + head // GROUP) * WIDTH
    left, right = tl.load(key + half).to(tl.float32), tl.load(key + HALF + half).to(tl.float32)
    key_left, key_right = (left * cos - right * sin).to(kind), (right * cos + left * sin).to(kind)
    value = tl.load(projected + (HEADS + KEY_HEADS + head // GROUP) * WIDTH + whole)
    column = head // GROUP * WIDTH
    if (place // PART == part) & (head % GROUP == 0):
        line = place * KEY_HEADS * WIDTH + column
        tl.store(keys + line + half, key_left)
        tl.store(keys + line + HALF + half, key_right)
        tl.store(values + line + whole, value)
    # What was just stored is not read again here: it is put in where it belongs.
    places = part * PART + tl.arange(0, PART)
    is_before, is_here = (places < place)[:, None], (places == place)[:, None]
    lines = (places * KEY_HEADS * WIDTH + column)[:, None]
    read_left = tl.load(keys + lines + half[None, :], mask=is_before, other=0.0)
    read_right = tl.load(keys + lines + HALF + half[None, :], mask=is_before, other=0.0)
    read = tl.load(values + lines + whole[None, :], mask=is_before, other=0.0)
    read_left = tl.where(is_here, key_left[None, :], read_left).to(tl.float32)
    read_right = tl.where(is_here, key_right[None, :], read_right).to(tl.float32)
    read = tl.where(is_here, value[None, :], read).to(tl.float32)
    scores = tl.sum(read_left * query_left[None, :], axis=1) + tl.sum(read_right * query_right[None, :], axis=1)
    scores = tl.where(places <= place, scores * scale, float("-inf"))
    highest = tl.max(scores, axis=0)
    shares = tl.exp(scores - highest)
    target = found + (part * HEADS + head) * (WIDTH + 2)
    tl.store(target + whole, tl.sum(shares[:, None] * read, axis=0))
    tl.store(target + WIDTH, highest)
    tl.store(target + WIDTH + 1, tl.sum(shares, axis=0))


@triton.jit
def join_parts(
    entries: tl.tensor,
    found: tl.tensor,
    attended: tl.tensor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    AT_ONCE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Write what a head's query finds in all parts."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    n_parts = tl.load(entries + 1).to(tl.int32) // PART + 1
    whole = tl.arange(0, WIDTH)
    highest, weight = float("-inf"), 0.0
    total = tl.zeros((WIDTH,), tl.float32)
    first = 0
    while first < n_parts:
        parts = first + tl.arange(0, AT_ONCE)
        is_part = parts < n_parts
        lines = found + (parts * HEADS + head) * (WIDTH + 2)
        tops = tl.load(lines + WIDTH, mask=is_part, other=float("-inf"))
        top = tl.maximum(highest, tl.max(tops, axis=0))
        shares, kept = tl.exp(tops - top), tl.exp(highest - top)
        weight = weight * kept + tl.sum(shares * tl.load(lines + WIDTH + 1, mask=is_part, other=0.0), axis=0)
        read = tl.load(lines[:, None] + whole[None, :], mask=is_part[:, None], other=0.0)
        total = total * kept + tl.sum(shares[:, None] * read, axis=0)
        highest = top
        first += AT_ONCE
    tl.store(attended + head * WIDTH + whole, (total / weight).to(attended.dtype.element_ty))
