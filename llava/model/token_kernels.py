"""One token through Llama's layers in six kernels a layer, for a token is nothing but reading all weights once.

Each product with a weight reads it in order and takes along what stands before and after it: the norm of its input
(whose factor is a number, so it may come last), the gate's activation, the sum with what went in. Attention of the one
query is divided along the cache, which the key of the token enters on the way. Sums are in fp32. Needs Triton; nothing
is imported from here unless it is there.

Letters: `D` width, `N` rows of a weight, `H` heads, `K` key heads, `d` width of a head, `C` positions of the cache, `P`
parts of them, `W` vocabulary.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.errors import TritonError

from llava.model.flat_llama import FlatLlama

ROWS, GATED_ROWS, STEP, WARPS = 4, 2, 1024, 4
"""A program of a product: rows, the same of two weights at once, columns at a time, warps."""
PART = 64
"""Positions of the cache that a program of the attention looks at."""
_PARTS_AT_ONCE = 32


class FusedStep:
    """The body of a LLaVA for a single token.

    Args:
        llama: on CUDA; `has_fused_form(llama)`.
    """

    def __init__(self, llama: FlatLlama) -> None:
        self._llama = llama
        attention = llama.layers[0].self_attn
        self._heads, self._key_heads = (
            len(layer.weight) // attention.head_dim for layer in (attention.q_proj, attention.k_proj)
        )

    def __call__(self, entries: Tensor, cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Append a token to a cache of one row, and return the logits behind it, (1, W).

        Args:
            entries: (2,) int64, token and its place.
            cache: keys and values of each layer, (1, C, K, d).
        """
        llama = self._llama
        hidden = llama.embed(entries[:1])  # (1, D), of this call, so it may be changed
        width = llama.layers[0].self_attn.head_dim
        projected = hidden.new_empty((self._heads + 2 * self._key_heads) * width)
        attended = hidden.new_empty(self._heads * width)
        active = hidden.new_empty(len(llama.layers[0].mlp.gate_proj.weight))
        n_parts = -(-cache[0][0].shape[1] // PART)
        found = hidden.new_empty(n_parts, self._heads, width + 2, dtype=torch.float32)
        for layer, (keys, values) in zip(llama.layers, cache, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            inputs = attention.q_proj, attention.k_proj, attention.v_proj
            multiply(hidden, inputs, projected, norm=layer.input_layernorm)
            self._attend(entries, projected, keys, values, found, attended)
            multiply(attended, [attention.o_proj], hidden, added=hidden)
            multiply_gated(hidden, mlp.gate_proj, mlp.up_proj, active, norm=layer.post_attention_layernorm)
            multiply(active, [mlp.down_proj], hidden, added=hidden)
        logits = hidden.new_empty(1, len(llama.head.weight))
        multiply(hidden, [llama.head], logits, norm=llama.norm)
        return logits

    def _attend(
        self, entries: Tensor, projected: Tensor, keys: Tensor, values: Tensor, found: Tensor, attended: Tensor
    ) -> None:
        n_parts, heads, width = found.shape[0], found.shape[1], keys.shape[3]
        sizes = {"HEADS": heads, "WIDTH": width, "PART": PART, "num_warps": WARPS}
        tables = self._llama.cosine, self._llama.sine
        _attend_part[(heads, n_parts)](
            entries, projected, *tables, keys, values, found, width**-0.5, KEY_HEADS=self._key_heads, **sizes
        )
        _join_parts[(heads,)](entries, found, attended, AT_ONCE=_PARTS_AT_ONCE, **sizes)


def has_fused_form(llama: FlatLlama) -> bool:
    """Return whether the kernels compute what the modules do: plain weights without bias, of the usual kinds."""
    for layer in llama.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        if not (all(map(_is_plain, linears)) and mlp.config.hidden_act == "silu"):
            return False
        width = attention.head_dim
        if width < 16 or width & (width - 1) or any(len(linear.weight) % ROWS for linear in linears):
            return False
    return _is_plain(llama.head)


def find_problem(llama: FlatLlama) -> Exception | None:
    """Return what keeps Triton from compiling for this device and dtype, found out by trying; None if it works."""
    options = {"device": llama.device, "dtype": llama.dtype}
    try:
        with torch.cuda.device(llama.device):
            multiply(
                torch.ones(16, **options), [nn.Linear(16, ROWS, bias=False, **options)], torch.empty(ROWS, **options)
            )
    except (RuntimeError, OSError, subprocess.SubprocessError, TritonError) as error:
        return error
    return None


def _is_plain(linear: nn.Module) -> bool:
    weight = linear.weight if type(linear) is nn.Linear else None
    return weight is not None and linear.bias is None and weight.is_contiguous()


def multiply(
    value: Tensor,
    linears: Sequence[nn.Linear],
    result: Tensor,
    *,
    norm: nn.Module | None = None,
    added: Tensor | None = None,
) -> None:
    """Write the products of one to three weights with a vector, one behind the other.

    Args:
        value: D numbers.
        linears: weights (N, D).
        result: all N numbers.
        norm: RMSNorm of the vector before.
        added: N numbers, of a single weight; may be `result`.
    """
    weights = [linear.weight for linear in linears]
    first, second, third = (weights + weights[-1:] * 2)[:3]
    rows = [len(weight) for weight in weights] + [0, 0]
    _multiply[(-(-sum(rows) // ROWS),)](
        value,
        value if norm is None else norm.weight,
        first,
        second,
        third,
        result if added is None else added,
        result,
        0.0 if norm is None else norm.variance_epsilon,
        N_FIRST=rows[0],
        N_SECOND=rows[1],
        N_THIRD=rows[2],
        WIDTH=first.shape[1],
        IS_NORMED=norm is not None,
        IS_ADDED=added is not None,
        ROWS=ROWS,
        STEP=STEP,
        num_warps=WARPS,
    )


def multiply_gated(value: Tensor, gate: nn.Linear, up: nn.Linear, result: Tensor, *, norm: nn.Module) -> None:
    """Write silu(gate x) * (up x), x being the RMSNorm of a vector; arguments as in `multiply`."""
    _multiply_gated[(len(gate.weight) // GATED_ROWS,)](
        value,
        norm.weight,
        gate.weight,
        up.weight,
        result,
        norm.variance_epsilon,
        WIDTH=gate.weight.shape[1],
        ROWS=GATED_ROWS,
        STEP=STEP,
        num_warps=WARPS,
    )


@triton.jit
def _multiply(
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
) -> None:
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
def _multiply_gated(
    value: tl.tensor,
    gain: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    result: tl.tensor,
    epsilon: float,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
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
def _attend_part(
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
) -> None:
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
def _join_parts(
    entries: tl.tensor,
    found: tl.tensor,
    attended: tl.tensor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
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
