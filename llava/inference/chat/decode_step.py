"""Batch-1 decode step of a LLaVA: six Triton kernels per layer, bound by the bandwidth at which weights are read.

Each matrix-vector product reads its weight in order and fuses its neighbours: the RMSNorm of its input, the gate's
activation, the residual sum. Attention splits the KV cache (flash-decoding) and writes the token's key on the way. Sums
are in fp32. Needs Triton: import this module only where it is installed.

Letters as in `llava/model/__init__.py`; a weight is (out, D), `capacity` is the positions that a KV cache has room for.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from triton.errors import TritonError

from llava.inference.chat.decode_triton import (
    combine_splits_kernel,
    gated_matvec_kernel,
    matvec_kernel,
    split_attention_kernel,
)
from llava.inference.engine.ragged_llama import RaggedLlama
from llava.model.fp8.linear import Fp8Linear

COMPILE_ERRORS = (RuntimeError, OSError, subprocess.SubprocessError, TritonError)
"""Errors of a decode step whose kernels can't be compiled."""


class Tile(NamedTuple):
    """Work of one program of a matrix-vector product: rows, columns per loop iteration, and warps."""

    rows: int
    columns: int
    warps: int


TILE = Tile(4, 1024, 4)
GATED_TILE = Tile(2, 1024, 4)
"""Rows of each of the two weights."""
SPLIT = 64
"""Positions of the KV cache per attention program."""
_SPLITS_AT_ONCE = 32
_ATTENTION_WARPS = 4


class FusedDecodeStep:
    """Decode step of one sequence through the LLM's layers.

    Args:
        llama: on CUDA; `has_fused_form(llama)`.
    """

    def __init__(self, llama: RaggedLlama) -> None:
        self._llama = llama
        attention = llama.layers[0].self_attn
        self._heads, self._kv_heads = (
            len(layer.weight) // attention.head_dim for layer in (attention.q_proj, attention.k_proj)
        )

    def __call__(self, entries: Tensor, cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Append a token to a KV cache of batch size 1, and return the logits after it, (1, W).

        Args:
            entries: (2,) int64, token id and its position.
            cache: keys and values of each layer, (1, capacity, Hkv, d).
        """
        llama = self._llama
        hidden = llama.embed(entries[:1])  # (1, D), a new tensor, so it may be overwritten
        width = llama.layers[0].self_attn.head_dim
        qkv = hidden.new_empty((self._heads + 2 * self._kv_heads) * width)
        attended = hidden.new_empty(self._heads * width)
        gated = hidden.new_empty(len(llama.layers[0].mlp.gate_proj.weight))
        n_splits = -(-cache[0][0].shape[1] // SPLIT)
        partial = hidden.new_empty(n_splits, self._heads, width + 2, dtype=torch.float32)
        for layer, (keys, values) in zip(llama.layers, cache, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            matvec(hidden, [attention.q_proj, attention.k_proj, attention.v_proj], qkv, norm=layer.input_layernorm)
            self.attend(entries, qkv, keys, values, partial, attended)
            matvec(attended, [attention.o_proj], hidden, residual=hidden)
            gated_matvec(hidden, mlp.gate_proj, mlp.up_proj, gated, norm=layer.post_attention_layernorm)
            matvec(gated, [mlp.down_proj], hidden, residual=hidden)
        logits = hidden.new_empty(1, len(llama.head.weight))
        matvec(hidden, [llama.head], logits, norm=llama.norm)
        return logits

    def attend(
        self, entries: Tensor, qkv: Tensor, keys: Tensor, values: Tensor, partial: Tensor, attended: Tensor
    ) -> None:
        """Write a token's key and value into a layer's KV cache, and its attention output into `attended`.

        Args:
            entries: (2,) int64, token id and its position.
            qkv: query, key and value before RoPE, concatenated, ((H + 2 Hkv) d,).
            keys: (1, capacity, Hkv, d).
            values: (1, capacity, Hkv, d).
            partial: (splits, H, d + 2) fp32, scratch memory for each split's sum of values, highest score and weight.
            attended: (H d,), the output.
        """
        n_splits, heads, width = partial.shape[0], partial.shape[1], keys.shape[3]
        sizes = {"HEADS": heads, "HEAD_WIDTH": width, "SPLIT": SPLIT, "num_warps": _ATTENTION_WARPS}
        rope = self._llama.cosine, self._llama.sine
        split_attention_kernel[(heads, n_splits)](
            entries, qkv, *rope, keys, values, partial, width**-0.5, KV_HEADS=self._kv_heads, **sizes
        )
        combine_splits_kernel[(heads,)](entries, partial, attended, AT_ONCE=_SPLITS_AT_ONCE, **sizes)


def has_fused_form(llama: RaggedLlama) -> bool:
    """Return whether the kernels compute what the modules do: plain or FP8 weights without bias, SiLU, suitable widths.

    Of FP8 weights the kernels multiply inputs as they are, which the modules quantise.
    """
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
    if type(linear) is Fp8Linear:
        return linear.weight.is_contiguous()
    return type(linear) is nn.Linear and linear.bias is None and linear.weight.is_contiguous()


def _values(linear: nn.Linear | Fp8Linear) -> Tensor:
    return linear.values if isinstance(linear, Fp8Linear) else linear.weight


def matvec(
    vector: Tensor,
    linears: Sequence[nn.Linear | Fp8Linear],
    output: Tensor,
    *,
    norm: nn.Module | None = None,
    residual: Tensor | None = None,
    tile: Tile = TILE,
) -> None:
    """Write the concatenated products of one to three weights with a vector.

    Args:
        vector: (D,).
        linears: weights (out, D), all plain or all FP8.
        output: (sum of out,).
        norm: RMSNorm applied to the vector first.
        residual: (out,), added to the product of a single weight; may be `output`.
        tile: its rows divide the rows of each weight, unless there is only one.
    """
    weights = [_values(linear) for linear in linears]
    first, second, third = (weights + weights[-1:] * 2)[:3]
    scales = [getattr(linear, "scales", linear.weight) for linear in linears]  # without scales not read
    first_scales, second_scales, third_scales = (scales + scales[-1:] * 2)[:3]
    rows = [len(weight) for weight in weights] + [0, 0]
    matvec_kernel[(-(-sum(rows) // tile.rows),)](
        vector,
        vector if norm is None else norm.weight,
        first,
        second,
        third,
        first_scales,
        second_scales,
        third_scales,
        output if residual is None else residual,
        output,
        0.0 if norm is None else norm.variance_epsilon,
        N_FIRST=rows[0],
        N_SECOND=rows[1],
        N_THIRD=rows[2],
        WIDTH=first.shape[1],
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_SCALES=isinstance(linears[0], Fp8Linear),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
    )


def gated_matvec(
    vector: Tensor,
    gate: nn.Linear | Fp8Linear,
    up: nn.Linear | Fp8Linear,
    output: Tensor,
    *,
    norm: nn.Module,
    tile: Tile = GATED_TILE,
) -> None:
    """Write silu(gate x) * (up x), where x is the RMSNorm of a vector; arguments as in `matvec`."""
    gated_matvec_kernel[(len(gate.weight) // tile.rows,)](
        vector,
        norm.weight,
        _values(gate),
        _values(up),
        getattr(gate, "scales", gate.weight),
        getattr(up, "scales", up.weight),
        output,
        norm.variance_epsilon,
        WIDTH=gate.weight.shape[1],
        HAS_SCALES=isinstance(gate, Fp8Linear),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
