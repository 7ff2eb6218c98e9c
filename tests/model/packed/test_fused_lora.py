"""Fused LoRA layers: conditions, dropout, weight storage, compilations; `test_forward.py` has their gradients."""

from __future__ import annotations

import functools

import peft
import pytest
import torch
from torch import nn

from llava.model.packed.fused_lora import (
    FusedLinear,
    FusedLora,
    LoraFactors,
    project_keys_values,
    run_layer,
    split_linear,
    why_not_fused,
)
from llava.train.lora import add_lora, choose_trainable


def adapted(model, **changes):
    options = {"rank": 3, "alpha": 6, "dropout": 0.0, "bias": "none", "base_name": "tiny"}
    wrapped = add_lora(model, **(options | changes))
    choose_trainable(wrapped, lora=True, projector=True, backbone=False)
    return wrapped


def no_adapters(model):
    return model


def another_activation(model):
    model.config.hidden_act = "gelu"
    return adapted(model)


def dora(model):
    settings = peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
    return peft.get_peft_model(model, settings)


def biases(model):
    model.model.layers[0].mlp.up_proj = nn.Linear(16, 24)
    return adapted(model)


def trained_base(model):
    wrapped = adapted(model)
    model.model.layers[1].mlp.up_proj.base_layer.weight.requires_grad_(True)
    return wrapped


def several_dropouts(model):
    wrapped = adapted(model, dropout=0.1)
    model.model.layers[1].mlp.up_proj.lora_dropout["default"].p = 0.2
    return wrapped


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_adapters, "there are no adapters"),
        (another_activation, "the activation is gelu"),
        (dora, "the adapters are not plain LoRA in 16 bit"),
        (biases, "the layers have biases, are trained themselves or are quantised"),
        (trained_base, "the layers have biases, are trained themselves or are quantised"),
        (several_dropouts, "the adapters have different dropout"),
        (adapted, None),
    ],
)
def test_when_layers_can_be_fused(tiny_model, change, reason):
    model = tiny_model()
    change(model)
    assert why_not_fused(model) == reason


def output(model, wrapped=None):
    embeds = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    positions = torch.arange(5)[None]
    plain = model.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
    queries = torch.tensor([1, 4])
    return plain[0, queries], FusedLora(model, compiled=False)(embeds, mask, positions, queries, mask[:, :, queries])


@torch.no_grad()
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "down_proj", "up_proj"], None])
@pytest.mark.parametrize("key_value_heads", [1, 2])
def test_some_layers_with_adapters_and_grouped_heads(tiny_model, targets, key_value_heads):
    model = tiny_model(num_key_value_heads=key_value_heads)
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets or "all-linear", exclude_modules=".*vision.*|.*mm_.*"
    )
    wrapped = peft.get_peft_model(model, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.3)
    plain, fused = output(model)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_weights_keep_their_names_and_values_in_fused_storage(tiny_model):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in adapted(model).state_dict().items()}
    attention = model.model.layers[0].self_attn
    fused = FusedLora(model, compiled=False)
    after = model.state_dict()
    assert all(torch.equal(after[name.removeprefix("base_model.model.")], before[name]) for name in before)
    storage = fused.weights[0].qkv.weight
    assert storage.shape == (48, 16)
    addresses = {
        module.base_layer.weight.untyped_storage().data_ptr() for module in (attention.q_proj, attention.v_proj)
    }
    assert addresses == {storage.untyped_storage().data_ptr()}


def test_layers_of_one_input_share_a_dropout_mask_in_training():
    down, up = torch.ones(1, 400), torch.ones(1, 1)
    adapter = LoraFactors(down, up, scale=0.5, dropout=0.5)  # powers of two, so that sums are exact
    layers = FusedLinear(torch.zeros(2, 400), (1, 1), (adapter, adapter))
    inputs = torch.ones(1, 400)
    torch.manual_seed(0)
    one, two = split_linear(inputs, layers, training=True)
    assert torch.equal(one, two)
    assert 0.5 * 400 * 0.8 < one.item() < 0.5 * 400 * 1.2  # scaled up by what is dropped
    assert one.item() != 200
    assert [value.item() for value in split_linear(inputs, layers, training=False)] == [200, 200]


def test_the_expectation_under_dropout_is_the_result_without():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 8, generator=generator), torch.randn(3, 2, generator=generator)
    inputs = torch.randn(1, 8, generator=generator).expand(20000, 8)
    layers = FusedLinear(torch.zeros(3, 8), (3,), (LoraFactors(down, up, 1.0, 0.5),))
    torch.manual_seed(0)
    (dropped,) = split_linear(inputs, layers, training=True)
    (whole,) = split_linear(inputs[:1], layers, training=False)
    torch.testing.assert_close(dropped.mean(0), whole[0], rtol=0, atol=0.1)


def test_all_layers_but_the_last_share_one_compilation_in_all_steps(tiny_model):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny_model(num_hidden_layers=4)
    adapted(model)
    fused = FusedLora(model, compiled=False)
    torch._dynamo.reset()
    compiled = functools.partial(torch.compile, dynamic=False, backend=count, fullgraph=True)
    fused.run, fused.project = compiled(run_layer), compiled(project_keys_values)
    embeds, mask = torch.randn(1, 5, 16, requires_grad=True), torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    for n_queries in (1, 2):
        queries = torch.arange(n_queries)
        fused(embeds * n_queries, mask, torch.arange(5)[None] + n_queries, queries, mask[:, :, queries])
    assert len(graphs) == 2
