"""LoRA over frozen weights in FP8: the products of dequantised factors, gradients, storage, training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llava.model.fp8.linear import Fp8Linear, quantize_rows
from llava.model.packed.fused_lora import FusedLinear, FusedLora, LoraFactors, split_linear, why_not_fused
from llava.model.packed.lora_linear import Fp8Weight
from llava.train.lora import add_lora, choose_trainable

WIDTHS, RANK, INPUT, SCALE = (32, 16, 48), 4, 64, 0.5


def dequantize(values, scales):
    return values.float() * scales


def make(dtype=torch.float32, dropout=0.0):
    """Inputs, the exact weight, layers in FP8; each with an adapter but the second."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    adapters = [
        LoraFactors(draw(RANK, INPUT).requires_grad_(), draw(width, RANK).requires_grad_(), SCALE, dropout)
        for width in WIDTHS
    ]
    weight = draw(sum(WIDTHS), INPUT)
    inputs = draw(2, 9, INPUT).to(dtype).requires_grad_()
    return inputs, weight, FusedLinear(Fp8Weight.quantize(weight), WIDTHS, (adapters[0], None, adapters[2]))


def factors(layers):
    return [tensor for adapter in layers.adapters if adapter for tensor in (adapter.a, adapter.b)]


class Product(torch.autograd.Function):
    """What FP8 computes, from dequantised factors in fp32."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.weight = weight
        rows = dequantize(*quantize_rows(inputs.flatten(0, 1)))
        return (rows @ dequantize(weight.values, weight.scales).t()).view(*inputs.shape[:2], -1)

    @staticmethod
    def backward(ctx, gradient):
        weight, rows = ctx.weight, dequantize(*quantize_rows(gradient.flatten(0, 1)))
        product = rows @ dequantize(weight.transposed, weight.transposed_scales).t()
        return product.view(*gradient.shape[:2], -1), None


def reference(product, inputs, layers):
    parts = list(product.split(layers.widths, dim=-1))
    for index, adapter in enumerate(layers.adapters):
        if adapter:
            parts[index] = parts[index] + (inputs @ adapter.a.t()) @ adapter.b.t() * adapter.scale
    return torch.cat(parts, dim=-1)


def gradients(outputs, inputs, layers):
    upstream = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
    return outputs, *torch.autograd.grad((outputs * upstream).sum(), [inputs, *factors(layers)])


def test_values_and_gradients_are_those_of_dequantised_factors():
    inputs, weight, layers = make()
    found = gradients(torch.cat(split_linear(inputs, layers, True), dim=-1), inputs, layers)
    expected = gradients(reference(Product.apply(inputs, layers.weight), inputs, layers), inputs, layers)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7 * float(other.abs().max()))
    exact = gradients(reference(inputs @ weight.t(), inputs, layers), inputs, layers)
    for one, other in zip(found, exact, strict=True):
        assert nn.functional.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.999


def test_gradients_with_dropout_and_compiled_are_those_without_compilation():
    inputs, _, layers = make(dropout=0.4)
    results = []
    for compute in (split_linear, torch.compile(split_linear, backend="aot_eager")):
        torch.manual_seed(1)
        results.append(gradients(torch.cat(compute(inputs, layers, True), dim=-1), inputs, layers))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_parts_of_a_weight_multiply_as_the_whole():
    inputs, _, layers = make()
    whole = split_linear(inputs, layers, False)
    first, rest = (split_linear(inputs, part, False) for part in layers.divide())
    for one, other in zip((*first, *rest), whole, strict=True):
        torch.testing.assert_close(one, other)


def adapted(model, **options):
    wrapped = add_lora(
        model,
        **{"rank": 3, "alpha": 6, "dropout": 0.0, "bias": "none", "base_name": "tiny", "targets": None, **options},
    )
    choose_trainable(wrapped, lora=True, projector=True, backbone=False)
    return wrapped


SIZES = {"hidden_size": 32, "intermediate_size": 48}


def test_the_models_own_layers_compute_with_the_same_memory(tiny_model):
    model = tiny_model(**SIZES)
    plain = copy.deepcopy(model)
    adapted(model)
    fused = FusedLora(model, compiled=False, fp8=True)
    layers = [layer for layer in model.modules() if isinstance(layer, Fp8Linear)]
    assert len(layers) == 7 * len(model.model.layers)
    qkv = fused.weights[0].qkv.weight
    query = model.model.layers[0].self_attn.q_proj.base_layer
    assert query.values.data_ptr() == qkv.values.data_ptr()
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    ids = torch.tensor([[1, 5, 9, 4]])
    found, expected = (each(ids).logits for each in (model, plain))
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1
    before = query.values.clone(), query.scales.clone()
    model.to(torch.bfloat16)  # as DeepSpeed does
    assert torch.equal(query.values.float(), before[0].float())
    assert torch.equal(query.scales, before[1])


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        (SIZES, {}, None),
        (SIZES, {"targets": ["q_proj", "v_proj"]}, "some layers have no adapter"),
        ({"hidden_size": 32, "intermediate_size": 40}, {}, "a layer turns 32 features into 40, no multiples of 16"),
    ],
)
def test_when_the_base_can_be_in_fp8(tiny_model, sizes, options, reason):
    model = tiny_model(**sizes)
    adapted(model, **options)
    assert why_not_fused(model, fp8=True) == reason
