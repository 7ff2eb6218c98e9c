"""LoRA adapters, trainable parameters and the optimizer's parameter groups."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from llava.train.lora import add_lora, choose_trainable, continue_lora, linear_names, parameter_groups

LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
PROJECTOR = [f"model.mm_projector.{leaf}" for leaf in ("0.bias", "0.weight", "2.bias", "2.weight")]


def lora_names(layers=2):
    parts = [("self_attn", name) for name in LINEARS if name[0] in "kqvo"]
    parts += [("mlp", name) for name in LINEARS if name not in [part[1] for part in parts]]
    return [
        f"base_model.model.model.layers.{layer}.{block}.{name}.lora_{side}.default.weight"
        for layer in range(layers)
        for block, name in parts
        for side in "AB"
    ]


@pytest.fixture
def model(tiny_model):
    return tiny_model()


def with_lora(model, **changes):
    options = {"rank": 2, "alpha": 4, "dropout": 0.0, "bias": "none", "base_name": "the/base", **changes}
    return add_lora(model, **options)


def test_names_of_the_llms_linear_layers(model):
    assert linear_names(model) == LINEARS


def test_only_the_llms_linear_layers_get_adapters(model):
    wrapped = with_lora(model)
    names = sorted(name for name, _ in wrapped.named_parameters() if "lora_" in name)
    assert names == sorted(lora_names())
    settings = wrapped.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.base_model_name_or_path) == (2, 4, "the/base")
    assert sorted(settings.target_modules) == LINEARS


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("projector", [True, False])
def test_lora_and_projector_are_trainable(model, projector, bias):
    wrapped = with_lora(model, bias=bias)
    names = choose_trainable(wrapped, lora=True, projector=projector, backbone=False)
    expected = lora_names() + [f"base_model.model.{name}" for name in PROJECTOR if projector]
    assert sorted(names) == sorted(expected)
    assert sorted(names) == sorted(name for name, parameter in wrapped.named_parameters() if parameter.requires_grad)


def test_the_llms_own_weights_are_frozen_under_lora(model):
    names = choose_trainable(with_lora(model), lora=True, projector=False, backbone=True)
    assert sorted(names) == sorted(lora_names())


def test_projector_alone(model):
    assert sorted(choose_trainable(model, lora=False, projector=True, backbone=False)) == PROJECTOR


@pytest.mark.parametrize("projector", [True, False])
def test_everything_but_the_tower(model, projector):
    names = choose_trainable(model, lora=False, projector=projector, backbone=True)
    assert sorted(names) == sorted(
        name
        for name, _ in model.named_parameters()
        if "vision_tower" not in name and (projector or "mm_projector" not in name)
    )
    assert "lm_head.weight" in names
    assert "model.embed_tokens.weight" in names


def test_trainable_parameters_take_their_dtype(model):
    model.to(torch.bfloat16)
    names = choose_trainable(model, lora=False, projector=True, backbone=False, dtype=torch.float32)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtypes[name] for name in names} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in names} == {torch.bfloat16}


def test_no_trainable_parameter(model):
    message = r"^no parameter is trainable; pass --lora_enable True, or fewer --freeze_... flags$"
    with pytest.raises(ValueError, match=message):
        choose_trainable(model, lora=False, projector=False, backbone=False)


def group_names(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (sorted(names[id(parameter)] for parameter in group["params"]), group["weight_decay"], group.get("lr"))
        for group in groups
    ]


def test_groups_with_the_projectors_own_rate(model):
    choose_trainable(model, lora=False, projector=True, backbone=True)
    decayed = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    groups = group_names(model, parameter_groups(model, decayed, weight_decay=0.1, projector_lr=2e-5))
    apart = sorted([names, decay] for names, decay, rate in groups if rate == 2e-5)
    assert apart == [
        [["model.mm_projector.0.bias", "model.mm_projector.2.bias"], 0.0],
        [["model.mm_projector.0.weight", "model.mm_projector.2.weight"], 0.1],
    ]
    others = [(names, decay) for names, decay, rate in groups if rate is None]
    assert sorted(decay for _, decay in others) == [0.0, 0.1]
    assert sorted(name for names, _, _ in groups for name in names) == sorted(
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    )


def test_one_group_without_a_rate_for_the_projector(model):
    choose_trainable(model, lora=False, projector=True, backbone=False)
    groups = group_names(model, parameter_groups(model, [], weight_decay=0.1, projector_lr=None))
    assert groups == [(PROJECTOR, 0.0, None)]


def test_an_adapter_can_be_trained_further(goldens, tmp_path):
    """Our own directory: peft's files with the names peft gives them."""
    from llava.model.builder import load_pretrained_model

    base = load_pretrained_model(str(goldens / "llava-v1.5-golden"), None, "x", device="cpu")[1]
    first = with_lora(base, base_name=str(goldens / "llava-v1.5-golden"))
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    first.save_pretrained(tmp_path)
    state = {name: parameter.clone() for name, parameter in first.named_parameters() if "lora_" in name}
    again = load_pretrained_model(str(goldens / "llava-v1.5-golden"), None, "x", device="cpu")[1]
    wrapped = continue_lora(again, str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    names = choose_trainable(wrapped, lora=True, projector=False, backbone=False)
    assert sorted(names) == sorted(state) == sorted(lora_names())
    for name, parameter in wrapped.named_parameters():
        if name in state:
            assert torch.equal(parameter, state[name])


def test_tower_stays_out_whatever_its_layers_are_called(model):
    tower_linears = [
        name for name, module in model.named_modules() if "vision" in name and isinstance(module, nn.Linear)
    ]
    assert any(name.endswith("q_proj") for name in tower_linears)
    wrapped = with_lora(model)
    assert not [name for name, _ in wrapped.named_parameters() if "vision_tower" in name and "lora_" in name]


def test_the_tower_is_trainable_except_its_unused_norm(model):
    names = choose_trainable(model, lora=False, projector=False, backbone=False, tower=True)
    tower = [name for name, _ in model.named_parameters() if "vision_tower" in name]
    assert sorted(names) == sorted(name for name in tower if "post_layernorm" not in name)
    assert len(tower) - len(names) == 2


def test_a_trainable_tower_has_one_dtype(model):
    """Its last norm runs too, so it must fit the rest, though it doesn't learn."""
    model.to(torch.bfloat16)
    choose_trainable(model, lora=False, projector=True, backbone=False, tower=True, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.get_vision_tower().parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype is torch.bfloat16


def test_every_trainable_parameter_gets_a_gradient(model):
    """The whole model with its tower; under DDP a trainable parameter without gradient would block the other ranks."""
    names = choose_trainable(model, lora=False, projector=True, backbone=True, tower=True)
    ids = torch.tensor([[1, -200, 5, 6]])
    images = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=torch.where(ids < 0, -100, ids), images=images).loss.backward()
    assert sorted(name for name, parameter in model.named_parameters() if parameter.grad is not None) == sorted(names)


def test_groups_of_three_rates(model):
    choose_trainable(model, lora=False, projector=True, backbone=True, tower=True)
    groups = parameter_groups(model, [], weight_decay=0.1, projector_lr=1e-5, tower_lr=2e-6)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(parameter)]: group.get("lr") for group in groups for parameter in group["params"]}
    assert {rate for name, rate in rates.items() if "vision_tower" in name} == {2e-6}
    assert {rate for name, rate in rates.items() if "mm_projector" in name} == {1e-5}
    assert {rate for name, rate in rates.items() if "layers" in name and "vision" not in name} == {None}


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 4 / 2), (True, 4 / 2**0.5)])
def test_the_scale_of_the_products(model, use_rslora, scale):
    layer = with_lora(model, use_rslora=use_rslora).base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(scale)


def test_chosen_layers_alone(model):
    wrapped = with_lora(model, targets=["q_proj", "down_proj"])
    found = {name.split(".")[-4] for name, _ in wrapped.named_parameters() if "lora_" in name}
    assert found == {"q_proj", "down_proj"}


def test_unknown_target_modules(model):
    message = r"^--lora_target_modules Wq: choose among down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj$"
    with pytest.raises(ValueError, match=message):
        with_lora(model, targets=["q_proj", "Wq"])


def test_pefts_own_save_takes_a_released_base_as_it_is(model, tmp_path):
    """It reads the base's config; `transformers_log` would tell of a warning."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "vocab_size": model.config.vocab_size}))
    with_lora(model, base_name=str(tmp_path)).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
