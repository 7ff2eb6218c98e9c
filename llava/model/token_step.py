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
from typing import NamedTuple

import torch
from torch import Tensor, nn
from triton.errors import TritonError

from llava.model.flat_llama import FlatLlama
from llava.model.token_kernels import attend_part, join_parts, multiply_gated_rows, multiply_rows

FAILURES = (RuntimeError, OSError, subprocess.SubprocessError, TritonError)
"""What a step raises where its kernels can't be compiled."""


class Tile(NamedTuple):
    """What a program of a product computes: rows, so many columns at a time, with so many warps."""

    rows: int
    step: int
    warps: int


TILE = Tile(4, 1024, 4)
GATED_TILE = Tile(2, 1024, 4)
"""Of each of two weights."""
PART = 64
"""Positions of the cache that a program of the attention looks at."""
_PARTS_AT_ONCE = 32
_ATTENTION_WARPS = 4


class FusedStep:
    """The body of a LLaVA for a single token.

    Args:
        llama: on CUDA; `has_fused_form(llama)`.
        early: start a kernel's programs before the kernel in front has ended; needs compute capability 9.0.
    """

    def __init__(self, llama: FlatLlama, *, early: bool = False) -> None:
        self._llama, self._early = llama, early
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
        llama, early = self._llama, self._early
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
            multiply(hidden, inputs, projected, norm=layer.input_layernorm, early=early)
            self.attend(entries, projected, keys, values, found, attended)
            multiply(attended, [attention.o_proj], hidden, added=hidden, early=early)
            multiply_gated(hidden, mlp.gate_proj, mlp.up_proj, active, norm=layer.post_attention_layernorm, early=early)
            multiply(active, [mlp.down_proj], hidden, added=hidden, early=early)
        logits = hidden.new_empty(1, len(llama.head.weight))
        multiply(hidden, [llama.head], logits, norm=llama.norm, early=early)
        return logits

    def attend(
        self, entries: Tensor, projected: Tensor, keys: Tensor, values: Tensor, found: Tensor, attended: Tensor
    ) -> None:
        """Put key and value of a token into a layer's cache and write what its query finds there.

        Args:
            entries: (2,) int64, token and its place.
            projected: query, key and value, one behind the other.
            keys: (1, C, K, d).
            values: (1, C, K, d).
            found: (P, H, d + 2) fp32, for sums, highest scores and weights of parts.
            attended: (H d,), the result.
        """
        n_parts, heads, width = found.shape[0], found.shape[1], keys.shape[3]
        sizes = {"HEADS": heads, "WIDTH": width, "PART": PART, "num_warps": _ATTENTION_WARPS, **_launched(self._early)}
        tables = self._llama.cosine, self._llama.sine
        attend_part[(heads, n_parts)](
            entries, projected, *tables, keys, values, found, width**-0.5, KEY_HEADS=self._key_heads, **sizes
        )
        join_parts[(heads,)](entries, found, attended, AT_ONCE=_PARTS_AT_ONCE, **sizes)


def has_fused_form(llama: FlatLlama) -> bool:
    """Return whether the kernels compute what the modules do: plain weights without bias, of the usual kinds."""
    for layer in llama.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        if not (all(map(_is_plain, linears)) and mlp.config.hidden_act == "silu"):
            return False
        width = attention.head_dim
        if width < 16 or width & (width - 1) or any(len(linear.weight) % TILE.rows for linear in linears):
            return False
    return _is_plain(llama.head)


def _is_plain(linear: nn.Module) -> bool:
    weight = linear.weight if type(linear) is nn.Linear else None
    return weight is not None and linear.bias is None and weight.is_contiguous()


def _launched(early: bool) -> dict[str, bool]:
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def multiply(
    value: Tensor,
    linears: Sequence[nn.Linear],
    result: Tensor,
    *,
    norm: nn.Module | None = None,
    added: Tensor | None = None,
    tile: Tile = TILE,
    early: bool = False,
) -> None:
    """Write the products of one to three weights with a vector, one behind the other.

    Args:
        value: D numbers.
        linears: weights (N, D).
        result: all N numbers.
        norm: RMSNorm of the vector before.
        added: N numbers, of a single weight; may be `result`.
        tile: divides the rows of each weight but a single one.
        early: as in `FusedStep`.
    """
    weights = [linear.weight for linear in linears]
    first, second, third = (weights + weights[-1:] * 2)[:3]
    rows = [len(weight) for weight in weights] + [0, 0]
    multiply_rows[(-(-sum(rows) // tile.rows),)](
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
        ROWS=tile.rows,
        STEP=tile.step,
        num_warps=tile.warps,
        **_launched(early),
    )


def multiply_gated(
    value: Tensor,
    gate: nn.Linear,
    up: nn.Linear,
    result: Tensor,
    *,
    norm: nn.Module,
    tile: Tile = GATED_TILE,
    early: bool = False,
) -> None:
    """Write silu(gate x) * (up x), x being the RMSNorm of a vector; arguments as in `multiply`."""
    multiply_gated_rows[(len(gate.weight) // tile.rows,)](
        value,
        norm.weight,
        gate.weight,
        up.weight,
        result,
        norm.variance_epsilon,
        WIDTH=gate.weight.shape[1],
        ROWS=tile.rows,
        STEP=tile.step,
        num_warps=tile.warps,
        **_launched(early),
    )
