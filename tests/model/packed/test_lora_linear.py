"""Fused linear layers with LoRA equal the layers one by one: values, gradients, dropout, autocast, compilation."""

from __future__ import annotations

import functools

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from llava.model.packed.fused_lora import FusedLinear, LoraFactors, split_linear
from llava.model.packed.lora_linear import lora_linear

WIDTHS, RANKS, INPUT, SCALE = (5, 6, 3), (2, None, 1), 4, 0.7
"""The layer in the middle has no adapter."""


def make(dropout=0.0, dtype=torch.float64):
    """Inputs, frozen weights, and `A` and `B` of the adapters one after the other."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    adapters = []
    for output, rank in zip(WIDTHS, RANKS, strict=True):
        pair = rank and (draw(rank, INPUT).requires_grad_(), draw(output, rank).requires_grad_())
        adapters.append(LoraFactors(*pair, SCALE, dropout) if pair else None)
    return draw(2, 7, INPUT).requires_grad_(), FusedLinear(draw(sum(WIDTHS), INPUT), WIDTHS, tuple(adapters))


def factors(layers):
    return [tensor for adapter in layers.adapters if adapter for tensor in (adapter.a, adapter.b)]


def one_by_one(inputs, layers, training):
    weights = layers.weight.split(layers.widths)
    dropped = nn.functional.dropout(inputs, next(a.dropout for a in layers.adapters if a), training)
    outputs = []
    for weight, adapter in zip(weights, layers.adapters, strict=True):
        output = inputs @ weight.t()
        if adapter is not None:
            output = output + (dropped @ adapter.a.t()) @ adapter.b.t() * adapter.scale
        outputs.append(output)
    return tuple(outputs)


def gradients(compute, inputs, layers):
    torch.manual_seed(1)
    outputs = torch.cat(compute(inputs, layers, True), dim=-1)
    upstream = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad((outputs * upstream.to(outputs.dtype)).sum(), [inputs, *factors(layers)])
    return outputs, *found


def compare(compute, inputs, layers, **tolerance):
    found, expected = gradients(compute, inputs, layers), gradients(one_by_one, inputs, layers)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_values_and_gradients_are_those_of_layers_one_by_one(dropout):
    compare(split_linear, *make(dropout), rtol=1e-10, atol=1e-12)


def test_gradients_are_the_differences_of_values():
    inputs, layers = make()

    def compute(inputs, *pairs):
        one, other = LoraFactors(*pairs[:2], SCALE, 0.0), LoraFactors(*pairs[2:], SCALE, 0.0)
        return split_linear(inputs, layers._replace(adapters=(one, None, other)), True)

    assert torch.autograd.gradcheck(compute, (inputs, *factors(layers)))


def test_what_is_dropped_gives_no_gradient_to_the_adapters_input():
    inputs, layers = make(dropout=0.5)
    layers = layers._replace(weight=torch.zeros_like(layers.weight))
    torch.manual_seed(1)
    kept = nn.functional.dropout(torch.ones_like(inputs), 0.5) != 0
    torch.manual_seed(1)
    outputs = torch.cat(split_linear(inputs, layers, True), dim=-1)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), inputs)
    assert torch.equal(gradient != 0, kept)
    assert 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize("has_dropout", [False, True])
def test_the_operation_is_what_pytorch_expects_of_one(has_dropout):
    inputs, layers = make()
    dropped = inputs.detach().clone().requires_grad_() if has_dropout else None
    adapters = [adapter for adapter in layers.adapters if adapter]
    a = torch.cat([adapter.a for adapter in adapters]).detach().requires_grad_()
    low = (inputs @ a.t()).detach()
    torch.library.opcheck(
        lora_linear, (inputs, dropped, low, [layers.weight], a, [adapter.b for adapter in adapters], [0, 11])
    )


def test_inputs_without_gradient():
    inputs, layers = make()
    outputs = torch.cat(split_linear(inputs.detach(), layers, True), dim=-1)
    found = torch.autograd.grad(outputs.sum(), factors(layers))
    expected = torch.autograd.grad(torch.cat(one_by_one(inputs, layers, True), dim=-1).sum(), factors(layers))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_fp32_weights_get_fp32_gradients_from_half_precision_products():
    inputs, layers = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = torch.cat(split_linear(inputs, layers, True), dim=-1)
        expected = torch.cat(one_by_one(inputs, layers, True), dim=-1)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, expected.to(torch.bfloat16), rtol=2e-2, atol=2e-2)
    assert {gradient.dtype for gradient in torch.autograd.grad(outputs.sum(), factors(layers))} == {torch.float32}


def test_no_kernel_over_all_outputs_only_adds_or_concatenates():
    """The gradients of the outputs are concatenated once, because they come from outside."""
    inputs, layers = make()
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
    compiled = torch.compile(split_linear, fullgraph=True, backend=backend)
    sum(part.square().sum() for part in compiled(inputs, layers, True)).backward()
    changing = {name: [target for target in targets if "view" not in target] for name, targets in seen.items()}
    assert changing == {"forward": ["llava.lora_linear.default"], "backward": ["aten.cat.default"]}


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_compiled_with_checkpointing_gives_the_same(dropout):
    torch._dynamo.reset()
    compiled = torch.compile(split_linear, fullgraph=True, dynamic=False)

    def recomputed(inputs, layers, training):
        return checkpoint(compiled, inputs, layers, training, use_reentrant=False)

    with torch._inductor.config.patch(fallback_random=True):
        compare(recomputed, *make(dropout), rtol=1e-10, atol=1e-12)
