"""Fused layers: when they can stand in, what they drop, where weights lie; `test_pack.py` has their gradients."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from llava.model.fused_layers import Adapter, FusedLayers, Joined, linear, read_all, run_layer, why_not_fused
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


def learning_base(model):
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
        (dora, "the adapters are no plain LoRA in 16 bit"),
        (biases, "the layers have biases, learn themselves or are quantised"),
        (learning_base, "the layers have biases, learn themselves or are quantised"),
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
    wanted = torch.tensor([1, 4])
    return plain[0, wanted], FusedLayers(model, compiled=False)(embeds, mask, positions, wanted, mask[:, :, wanted])


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
def test_weights_keep_their_names_and_values_in_joined_storage(tiny_model):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in adapted(model).state_dict().items()}
    attention = model.model.layers[0].self_attn
    fused = FusedLayers(model, compiled=False)
    after = model.state_dict()
    assert all(torch.equal(after[name.removeprefix("base_model.model.")], before[name]) for name in before)
    joined = fused.weights[0].qkv.weight
    assert joined.shape == (48, 16)
    addresses = {
        module.base_layer.weight.untyped_storage().data_ptr() for module in (attention.q_proj, attention.v_proj)
    }
    assert addresses == {joined.untyped_storage().data_ptr()}


def test_layers_of_one_input_drop_the_same_and_only_in_training():
    down, up = torch.ones(1, 400), torch.ones(1, 1)
    adapter = Adapter(down, up, scale=0.5, dropout=0.5)  # powers of two, so that sums are exact
    joined = Joined(torch.zeros(2, 400), (1, 1), (adapter, adapter))
    inputs = torch.ones(1, 400)
    torch.manual_seed(0)
    one, two = linear(inputs, joined, training=True)
    assert torch.equal(one, two)
    assert 0.5 * 400 * 0.8 < one.item() < 0.5 * 400 * 1.2  # scaled up by what is dropped
    assert one.item() != 200
    assert [value.item() for value in linear(inputs, joined, training=False)] == [200, 200]


def test_the_expectation_under_dropout_is_the_result_without():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 8, generator=generator), torch.randn(3, 2, generator=generator)
    inputs = torch.randn(1, 8, generator=generator).expand(20000, 8)
    joined = Joined(torch.zeros(3, 8), (3,), (Adapter(down, up, 1.0, 0.5),))
    torch.manual_seed(0)
    (dropped,) = linear(inputs, joined, training=True)
    (whole,) = linear(inputs[:1], joined, training=False)
    torch.testing.assert_close(dropped.mean(0), whole[0], rtol=0, atol=0.1)


def test_all_layers_but_the_last_share_one_compilation_in_all_steps(tiny_model):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny_model(num_hidden_layers=4)
    adapted(model)
    fused = FusedLayers(model, compiled=False)
    torch._dynamo.reset()
    fused.run, fused.read = (
        torch.compile(function, dynamic=False, backend=count, fullgraph=True) for function in (run_layer, read_all)
    )
    embeds, mask = torch.randn(1, 5, 16, requires_grad=True), torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    for count_wanted in (1, 2):
        wanted = torch.arange(count_wanted)
        fused(embeds * count_wanted, mask, torch.arange(5)[None] + count_wanted, wanted, mask[:, :, wanted])
    assert len(graphs) == 2
