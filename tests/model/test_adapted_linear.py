"""Joined layers with adapters are the layers one by one: values, gradients, dropout, autocast, compilation."""

from __future__ import annotations

import functools

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from llava.model.adapted_linear import adapted_linear
from llava.model.fused_layers import Adapter, Joined, linear

WIDTHS, RANKS, INPUT, SCALE = (5, 6, 3), (2, None, 1), 4, 0.7
"""The layer in the middle has no adapter."""


def make(dropout=0.0, dtype=torch.float64, width=INPUT):
    """Inputs, frozen weights, and `A` and `B` of the adapters one after the other."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    adapters = []
    for output, rank in zip(WIDTHS, RANKS, strict=True):
        pair = rank and (draw(rank, width).requires_grad_(), draw(output, rank).requires_grad_())
        adapters.append(Adapter(*pair, SCALE, dropout) if pair else None)
    return draw(2, 7, width).requires_grad_(), Joined(draw(sum(WIDTHS), width), WIDTHS, tuple(adapters))


def learned(joined):
    return [tensor for adapter in joined.adapters if adapter for tensor in (adapter.down, adapter.up)]


def one_by_one(inputs, joined, training):
    weights = joined.weight.split(joined.widths)
    dropped = nn.functional.dropout(inputs, next(a.dropout for a in joined.adapters if a), training)
    outputs = []
    for weight, adapter in zip(weights, joined.adapters, strict=True):
        output = inputs @ weight.t()
        if adapter is not None:
            output = output + (dropped @ adapter.down.t()) @ adapter.up.t() * adapter.scale
        outputs.append(output)
    return tuple(outputs)


def gradients(compute, inputs, joined):
    torch.manual_seed(1)
    outputs = torch.cat(compute(inputs, joined, True), dim=-1)
    upstream = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad((outputs * upstream.to(outputs.dtype)).sum(), [inputs, *learned(joined)])
    return outputs, *found


def compare(compute, inputs, joined, **tolerance):
    found, expected = gradients(compute, inputs, joined), gradients(one_by_one, inputs, joined)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("width", [INPUT, 2 * sum(WIDTHS)], ids=["wide outputs", "wide inputs"])
def test_values_and_gradients_are_those_of_layers_one_by_one(dropout, width):
    compare(linear, *make(dropout, width=width), rtol=1e-10, atol=1e-12)


def test_gradients_are_the_differences_of_values():
    inputs, joined = make()

    def compute(inputs, *pairs):
        one, other = Adapter(*pairs[:2], SCALE, 0.0), Adapter(*pairs[2:], SCALE, 0.0)
        return linear(inputs, joined._replace(adapters=(one, None, other)), True)

    assert torch.autograd.gradcheck(compute, (inputs, *learned(joined)))


def test_what_is_dropped_gives_no_gradient_to_the_adapters_input():
    inputs, joined = make(dropout=0.5)
    joined = joined._replace(weight=torch.zeros_like(joined.weight))
    torch.manual_seed(1)
    kept = nn.functional.dropout(torch.ones_like(inputs), 0.5) != 0
    torch.manual_seed(1)
    outputs = torch.cat(linear(inputs, joined, True), dim=-1)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), inputs)
    assert torch.equal(gradient != 0, kept)
    assert 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize("has_dropout", [False, True])
def test_the_operation_is_what_pytorch_expects_of_one(has_dropout):
    inputs, joined = make()
    dropped = inputs.detach().clone().requires_grad_() if has_dropout else None
    adapters = [adapter for adapter in joined.adapters if adapter]
    downs = torch.cat([adapter.down for adapter in adapters]).detach().requires_grad_()
    low = (inputs @ downs.t()).detach()
    torch.library.opcheck(
        adapted_linear, (inputs, dropped, low, joined.weight, downs, [adapter.up for adapter in adapters], [0, 11])
    )


def test_inputs_that_do_not_learn_have_no_gradient():
    inputs, joined = make()
    outputs = torch.cat(linear(inputs.detach(), joined, True), dim=-1)
    found = torch.autograd.grad(outputs.sum(), learned(joined))
    expected = torch.autograd.grad(torch.cat(one_by_one(inputs, joined, True), dim=-1).sum(), learned(joined))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_masters_in_fp32_learn_in_fp32_from_products_in_half_precision():
    inputs, joined = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = torch.cat(linear(inputs, joined, True), dim=-1)
        expected = torch.cat(one_by_one(inputs, joined, True), dim=-1)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, expected.to(torch.bfloat16), rtol=2e-2, atol=2e-2)
    assert {gradient.dtype for gradient in torch.autograd.grad(outputs.sum(), learned(joined))} == {torch.float32}


def test_no_pass_over_all_outputs_only_adds_or_joins():
    """The gradients of the parts are joined once, as they come from outside."""
    inputs, joined = make()
    seen = {"forward": [], "backward": []}

    def record(name, graph, _):
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.numel() == 2 * 7 * sum(WIDTHS):
                seen[name].append(str(node.target))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=functools.partial(record, "forward"), bw_compiler=functools.partial(record, "backward")
    )
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend=backend)
    sum(part.square().sum() for part in compiled(inputs, joined, True)).backward()
    changing = {name: [target for target in targets if "view" not in target] for name, targets in seen.items()}
    assert changing == {"forward": ["llava.adapted_linear.default"], "backward": ["aten.cat.default"]}


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_compiled_with_checkpointing_gives_the_same(dropout):
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, dynamic=False)

    def recomputed(inputs, joined, training):
        return checkpoint(compiled, inputs, joined, training, use_reentrant=False)

    with torch._inductor.config.patch(fallback_random=True):
        compare(recomputed, *make(dropout), rtol=1e-10, atol=1e-12)
