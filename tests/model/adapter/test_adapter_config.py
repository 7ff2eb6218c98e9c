"""`adapter_config.json` is read as peft reads it."""

from __future__ import annotations

import json
import math

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from llava.model.adapter.adapter_config import is_targeted, rank_of, read_adapter_settings, scale_of

LEAVES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
NAMES = [
    f"{prefix}layers.{layer}.{leaf}"
    for prefix in ("model.", "language_model.model.", "model.language_model.")
    for layer in (0, 1, 11)
    for leaf in LEAVES
] + ["lm_head", "model.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj", "multi_modal_projector.linear_1"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*vision_tower.*"},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": r"^(?!.*(?:vision_tower|multi_modal_projector)).*(?:q_proj|down_proj).*"},
        {"target_modules": r"^(model\.language_model(?=\.).*\.(q_proj|up_proj))$"},
        {"target_modules": ["model.layers.1.mlp.up_proj", "language_model.model.layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 11},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj", "linear_1"], "modules_to_save": ["multi_modal_projector"]},
    ],
)
def test_the_same_layers_are_targeted_as_by_peft(settings):
    config = peft.LoraConfig(**settings)
    expected = [name for name in NAMES if check_target_module_exists(config, name)]
    assert [name for name in NAMES if is_targeted(settings, name)] == expected
    assert 0 < len(expected) < len(NAMES)


def test_all_linear_means_all_but_the_head():
    settings = {"target_modules": "all-linear"}
    assert [name for name in NAMES if not is_targeted(settings, name)] == ["lm_head"]


class Two(nn.Module):
    """Two layers whose names patterns tell apart."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(2)])


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"up": 2}, "alpha_pattern": {"up": 6}},
        {"rank_pattern": {"layers.1.down": 2}, "alpha_pattern": {"^layers.0.up": 3, "up": 5}},
        {"rank_pattern": {r"layers\.\d": 2}, "alpha_pattern": {"layers.0": 7}},
        {"rank_pattern": {r"layers\.[01]\.(up|down)": 3}},
    ],
)
def test_ranks_and_scales_are_those_of_peft(patterns, root):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], use_rslora=root, **patterns)
    model = peft.get_peft_model(Two(), config)
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": root, **patterns}
    for layer in range(2):
        for leaf in ("up", "down"):
            module = model.base_model.model.layers[layer][leaf]
            rank = rank_of(settings, f"layers.{layer}.{leaf}")
            assert rank == module.lora_A["default"].weight.shape[0]
            assert math.isclose(scale_of(settings, f"layers.{layer}.{leaf}", rank), module.scaling["default"])


def test_no_patterns_at_all():
    assert rank_of({"r": 4}, "a") == 4
    assert scale_of({"lora_alpha": 6.0, "r": 4, "alpha_pattern": None}, "a", 4) == 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_alpha": None},
            r"adapter_config.json: lora_alpha is None; write the number that the adapter was trained",
        ),
        ({"r": "8"}, r"adapter_config.json: r is '8'; write the number that the adapter was trained with there$"),
        ({"r": 0}, r"adapter_config.json: r is 0; write the number"),
        (
            {"peft_type": "LOKR"},
            r"adapter_config.json: peft_type 'LOKR' is not supported; merge this adapter with peft$",
        ),
        ({"target_modules": "(q_proj"}, r"target_modules '\(q_proj' is not a regular expression \(.*\); fetch it"),
        ({"alpha_pattern": {"[": 2}}, r"alpha_pattern '\[' is not a regular expression"),
    ],
)
def test_unusable_settings(tmp_path, changes, message):
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **changes}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        read_adapter_settings(tmp_path)


def test_what_peft_writes_is_read(tmp_path):
    peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=["up"]).save_pretrained(tmp_path)
    assert read_adapter_settings(tmp_path)["r"] == 3
