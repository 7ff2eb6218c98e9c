"""Frozen linear layers of one input with their LoRA adapters, as one operation with its own backward pass.

The adapters' products and the layers' own are added where they lie, by the matrix products themselves: no pass over all
positions and widths is left that only adds or puts matrices together, neither forward nor backward. To
`torch.compile` the operation is one node.

The product that comes second reads what the first has written. A small one waits for that, a large one computes
meanwhile; `benchmarks/linear_speed.py` times both orders.

Letters: `N` positions, whatever their dimensions; `I` width of the input; `O` widths of all outputs together; `r` ranks
of all adapters together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "llava::adapted_linear",
    mutates_args=(),
    schema="(Tensor inputs, Tensor? dropped, Tensor low, Tensor weight, Tensor downs, Tensor[] ups, int[] starts) -> "
    "Tensor",
)
def adapted_linear(
    inputs: Tensor,
    dropped: Tensor | None,
    low: Tensor,
    weight: Tensor,
    downs: Tensor,
    ups: Sequence[Tensor],
    starts: Sequence[int],
) -> Tensor:
    """Return `inputs weight^T`, (N, O), with `low_i up_i^T` added to the columns of each layer that has an adapter.

    Gradients go to `inputs`, `dropped`, `downs` and `ups`, through `low` too; `weight` is frozen.

    Args:
        inputs: (N, I).
        dropped: (N, I), inputs of the adapters where dropout makes them others; None = the same.
        low: (N, r), `dropped downs^T`.
        weight: (O, I), the layers' one below the other.
        downs: (r, I), the adapters' `A` one below the other.
        ups: of each adapter, (outputs of the layer, its rank), `B` times its factor.
        starts: the first column of each adapter's layer.
    """
    return _sum_of_products(inputs, weight.t(), low, [up.t() for up in ups], starts, low_first=True)


@torch.library.custom_op(
    "llava::adapted_linear_input_gradient",
    mutates_args=(),
    schema="(Tensor gradient, Tensor low_gradient, Tensor weight, Tensor downs) -> Tensor",
)
def input_gradient(gradient: Tensor, low_gradient: Tensor, weight: Tensor, downs: Tensor) -> Tensor:
    """Return `gradient weight + low_gradient downs`, (N, I).

    Args:
        gradient: (N, O), of the outputs.
        low_gradient: (N, r).
        weight: (O, I).
        downs: (r, I).
    """
    low_first = len(weight) <= weight.shape[1]  # measured at LLaVA-1.5-7B's sizes: else the other order is no slower
    return _sum_of_products(gradient, weight, low_gradient, [downs], [0], low_first=low_first)


def _sum_of_products(
    left: Tensor, right: Tensor, low: Tensor, factors: Sequence[Tensor], starts: Sequence[int], *, low_first: bool
) -> Tensor:
    flat = left.reshape(-1, left.shape[-1])
    parts = low.reshape(-1, low.shape[-1]).split([len(factor) for factor in factors], dim=1)
    width = right.shape[1]
    if not low_first:
        result = flat @ right
    elif sum(factor.shape[1] for factor in factors) == width:
        result = flat.new_empty(len(flat), width)
    else:
        result = flat.new_zeros(len(flat), width)
    for part, factor, start in zip(parts, factors, starts, strict=True):
        columns = result[:, start : start + factor.shape[1]]
        if low_first:
            torch.mm(part, factor, out=columns)
        else:
            columns.addmm_(part, factor)
    if low_first:
        result.addmm_(flat, right)
    return result.view(*left.shape[:-1], width)


@adapted_linear.register_fake
def _adapted_linear_shape(inputs: Tensor, dropped: Tensor | None, low: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


@input_gradient.register_fake
def _input_gradient_shape(gradient: Tensor, low_gradient: Tensor, weight: Tensor, downs: Tensor) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], weight.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, dropped, low, weight, downs, ups, starts = inputs
    ctx.starts = starts
    ctx.save_for_backward(values if dropped is None else None, dropped, low, weight, downs, *ups)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    inputs, dropped, low, weight, downs, *ups = ctx.saved_tensors
    flat = gradient.reshape(-1, gradient.shape[-1])
    parts = [flat[:, start : start + len(up)] for start, up in zip(ctx.starts, ups, strict=True)]
    lows = low.reshape(-1, low.shape[-1]).split([up.shape[1] for up in ups], dim=1)
    up_gradients = [part.t() @ inner for part, inner in zip(parts, lows, strict=True)]
    low_gradient = torch.cat([part @ up for part, up in zip(parts, ups, strict=True)], dim=1)
    source = inputs if dropped is None else dropped
    down_gradient = low_gradient.t() @ source.reshape(-1, source.shape[-1])
    if dropped is None:
        to_inputs = input_gradient(gradient, low_gradient, weight, downs) if ctx.needs_input_grad[0] else None
        return to_inputs, None, None, None, down_gradient, up_gradients, None
    to_inputs = (flat @ weight).view_as(dropped) if ctx.needs_input_grad[0] else None
    to_dropped = (low_gradient @ downs).view_as(dropped) if ctx.needs_input_grad[1] else None
    return to_inputs, to_dropped, None, None, down_gradient, up_gradients, None


adapted_linear.register_autograd(_backward, setup_context=_setup_context)
