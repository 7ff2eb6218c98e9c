"""Fused linear layers with LoRA: frozen weights of one input and their adapters as one operation with its own backward.

The adapters' low-rank products are written into the output, and the frozen layers' product is added to them in place by
the matrix product itself: no kernel only adds or concatenates, neither forward nor backward. To `torch.compile` the
operation is one node. Frozen weights in FP8 are multiplied first, and the low-rank products added in place.

Shapes name their dimensions: `positions` (any leading dimensions), `in` and `out` (widths of the input and of all
layers' outputs together), `rank` (of all adapters together).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.model.fp8.linear import quantize_rows, scaled_product


class Fp8Weight(NamedTuple):
    """A frozen weight in FP8, once for each direction, since a scale must not stand inside a sum.

    Attributes:
        values: (out, in) e4m3, for the outputs.
        scales: (out, 1) fp32.
        transposed: (in, out) e4m3, for the gradient of the inputs.
        transposed_scales: (in, 1) fp32.
    """

    values: Tensor
    scales: Tensor
    transposed: Tensor
    transposed_scales: Tensor

    @classmethod
    def quantize(cls, weight: Tensor) -> Fp8Weight:
        """Return a weight (out, in) in FP8."""
        return cls(*quantize_rows(weight), *quantize_rows(weight.t().contiguous()))

    def rows(self, start: int, stop: int) -> Fp8Weight:
        """Return a part of the outputs."""
        part = slice(start, stop)
        return Fp8Weight(self.values[part], self.scales[part], self.transposed[:, part], self.transposed_scales)


@torch.library.custom_op(
    "llava::lora_linear",
    mutates_args=(),
    schema="(Tensor inputs, Tensor? dropped, Tensor low, Tensor[] weight, Tensor a, Tensor[] b, int[] starts)"
    " -> Tensor",
)
def lora_linear(
    inputs: Tensor,
    dropped: Tensor | None,
    low: Tensor,
    weight: Sequence[Tensor],
    a: Tensor,
    b: Sequence[Tensor],
    starts: Sequence[int],
) -> Tensor:
    """Return `inputs weight^T`, (positions, out), plus `low_i b_i^T` in the columns of each layer with an adapter.

    Gradients go to `inputs`, `dropped`, `a` and `b`, through `low` too; `weight` is frozen.

    Args:
        inputs: (positions, in).
        dropped: (positions, in), the adapters' inputs after dropout; None = without dropout.
        low: (positions, rank), `dropped a^T`.
        weight: (out, in), the layers' weights concatenated; or, for FP8, the quantised inputs (positions, in), their
            scales (positions, 1), and the parts of an `Fp8Weight`.
        a: (rank, in), the adapters' `A` concatenated.
        b: of each adapter (out of its layer, its rank), `B` times the LoRA scale.
        starts: first output column of each adapter's layer.
    """
    factors = [factor.t() for factor in b]
    if len(weight) == 1:
        return _sum_of_products(inputs, weight[0].t(), low, factors, starts)
    product = scaled_product(*weight[:4], inputs.dtype)
    return _add_products(product, low, factors, starts).view(*inputs.shape[:-1], -1)


@torch.library.custom_op(
    "llava::lora_linear_input_gradient",
    mutates_args=(),
    schema="(Tensor gradient, Tensor low_gradient, Tensor[] weight, Tensor a) -> Tensor",
)
def input_gradient(gradient: Tensor, low_gradient: Tensor, weight: Sequence[Tensor], a: Tensor) -> Tensor:
    """Return `gradient weight + low_gradient a`, (positions, in).

    Args:
        gradient: (positions, out), of the outputs.
        low_gradient: (positions, rank).
        weight: (out, in); or, for FP8, the quantised gradient (positions, out), its scales (positions, 1), and the
            transposed parts of an `Fp8Weight`.
        a: (rank, in).
    """
    if len(weight) == 1:
        return _sum_of_products(gradient, weight[0], low_gradient, [a], [0])
    product = scaled_product(*weight, gradient.dtype)
    return _add_products(product, low_gradient, [a], [0]).view(*gradient.shape[:-1], -1)


def _sum_of_products(
    left: Tensor, right: Tensor, low: Tensor, factors: Sequence[Tensor], starts: Sequence[int]
) -> Tensor:
    """Return `left right`, plus a part of `low` times each factor in the columns from its start on."""
    flat, width = left.reshape(-1, left.shape[-1]), right.shape[1]
    parts = _divide(low, factors)
    covers_all = sum(factor.shape[1] for factor in factors) == width
    result = (flat.new_empty if covers_all else flat.new_zeros)(len(flat), width)
    for part, factor, start in zip(parts, factors, starts, strict=True):
        torch.mm(part, factor, out=result[:, start : start + factor.shape[1]])
    return result.addmm_(flat, right).view(*left.shape[:-1], width)


def _add_products(product: Tensor, low: Tensor, factors: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    """Add to a product a part of `low` times each factor in the columns from its start on, in place."""
    for part, factor, start in zip(_divide(low, factors), factors, starts, strict=True):
        product[:, start : start + factor.shape[1]].addmm_(part, factor)
    return product


def _divide(low: Tensor, factors: Sequence[Tensor]) -> Sequence[Tensor]:
    return low.reshape(-1, low.shape[-1]).split([len(factor) for factor in factors], dim=1)


@lora_linear.register_fake
def _lora_linear_shape(
    inputs: Tensor, dropped: Tensor | None, low: Tensor, weight: Sequence[Tensor], *_: Any
) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], weight[0 if len(weight) == 1 else 2].shape[0])


@input_gradient.register_fake
def _input_gradient_shape(gradient: Tensor, low_gradient: Tensor, weight: Sequence[Tensor], a: Tensor) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], a.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, dropped, low, weight, a, b, starts = inputs
    ctx.starts, ctx.weights = starts, len(weight)
    frozen = weight if len(weight) == 1 else weight[4:]
    ctx.save_for_backward(values if dropped is None else None, dropped, low, a, *frozen, *b)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    inputs, dropped, low, a, *others = ctx.saved_tensors
    n_frozen = 1 if ctx.weights == 1 else 2
    weight, b = others[:n_frozen], others[n_frozen:]
    flat = gradient.reshape(-1, gradient.shape[-1])
    if n_frozen == 2:
        weight = [*quantize_rows(flat), *weight]
    to_weight = [None] * ctx.weights
    parts = [flat[:, start : start + len(factor)] for start, factor in zip(ctx.starts, b, strict=True)]
    lows = low.reshape(-1, low.shape[-1]).split([factor.shape[1] for factor in b], dim=1)
    to_b = [part.t() @ inner for part, inner in zip(parts, lows, strict=True)]
    to_low = torch.cat([part @ factor for part, factor in zip(parts, b, strict=True)], dim=1)  # (positions, rank)
    adapter_inputs = inputs if dropped is None else dropped
    to_a = to_low.t() @ adapter_inputs.reshape(-1, adapter_inputs.shape[-1])
    if dropped is None:
        to_inputs = input_gradient(gradient, to_low, weight, a) if ctx.needs_input_grad[0] else None
        return to_inputs, None, None, to_weight, to_a, to_b, None
    to_inputs = None
    if ctx.needs_input_grad[0]:
        product = flat @ weight[0] if n_frozen == 1 else scaled_product(*weight, flat.dtype)
        to_inputs = product.view_as(dropped)
    to_dropped = (to_low @ a).view_as(dropped) if ctx.needs_input_grad[1] else None
    return to_inputs, to_dropped, None, to_weight, to_a, to_b, None


lora_linear.register_autograd(_backward, setup_context=_setup_context)
