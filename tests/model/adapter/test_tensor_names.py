"""Every name under which a tensor of an adapter is found in the wild leads to the same released name."""

from __future__ import annotations

import pytest

from llava.model.adapter.tensor_names import bare_name, hf_names, is_derived, is_hf_name, lora_tensor, plain_name

LAYER, TOWER = "model.layers.3.mlp.up_proj", "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1"


@pytest.mark.parametrize(
    "name",
    [
        f"base_model.model.{LAYER}.lora_A.weight",
        f"{LAYER}.lora_A.weight",
        f"base_model.model.{LAYER}.lora_A.default.weight",
        f"base_model.model.{LAYER}.lora_A.my-task.weight",
        f"module.base_model.model.{LAYER}.lora_A.weight",
        f"base_model.model.base_model.model.{LAYER}.lora_A.weight",
        f"_orig_mod.module.base_model.model.{LAYER}.lora_A.default.weight",
        "base_model.model.model.layers.3._checkpoint_wrapped_module.mlp.up_proj.lora_A.weight",
        "_fsdp_wrapped_module.base_model.model.model.layers.3._fsdp_wrapped_module.mlp.up_proj.lora_A.default.weight",
        f"model.{LAYER}.lora_A.weight",
        "base_model.model.layers.3.mlp.up_proj.lora_A.weight",  # of a LlamaModel
        "base_model.model.language_model.model.layers.3.mlp.up_proj.lora_A.weight",  # llava-hf before 4.52
        "base_model.model.model.language_model.layers.3.mlp.up_proj.lora_A.weight",  # since 4.52
        "base_model.model.language_model.layers.3.mlp.up_proj.lora_A.weight",
    ],
)
def test_a_layer_of_the_llm(name):
    found = lora_tensor(name)
    assert found.kind == "A"
    assert plain_name(f"{found.module}.weight") == f"{LAYER}.weight"
    assert is_hf_name(found.module) == ("language_model" in name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.lm_head.lora_B.weight", "lm_head.weight"),
        ("base_model.model.language_model.lm_head.lora_B.weight", "lm_head.weight"),
        ("base_model.model.multi_modal_projector.linear_1.lora_B.weight", "model.mm_projector.0.weight"),
        ("base_model.model.model.multi_modal_projector.linear_2.lora_B.weight", "model.mm_projector.2.weight"),
        ("base_model.model.model.mm_projector.2.lora_B.weight", "model.mm_projector.2.weight"),
        (f"base_model.model.{TOWER}.lora_B.weight", f"{TOWER}.weight"),
        ("base_model.model.vision_tower.vision_model.encoder.layers.1.mlp.fc1.lora_B.weight", f"{TOWER}.weight"),
        ("base_model.model.model.vision_tower.encoder.layers.1.mlp.fc1.lora_B.weight", f"{TOWER}.weight"),
        ("base_model.model.model.vision_tower.vision_tower.encoder.layers.1.mlp.fc1.lora_B.weight", f"{TOWER}.weight"),
    ],
)
def test_other_layers(name, expected):
    found = lora_tensor(name)
    assert (found.kind, plain_name(f"{found.module}.weight")) == ("B", expected)


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ("lora_embedding_A", "embedding_A"),
        ("lora_embedding_B.default", "embedding_B"),
        ("lora_magnitude_vector", "magnitude_vector"),
        ("lora_magnitude_vector.default", "magnitude_vector"),
        ("lora_magnitude_vector.default.weight", "magnitude_vector"),
        ("lora_magnitude_vector.weight", "magnitude_vector"),
    ],
)
def test_other_parts(end, kind):
    assert lora_tensor(f"base_model.model.model.embed_tokens.{end}") == ("model.embed_tokens", kind)


@pytest.mark.parametrize("name", ["a.lora_B.bias", "a.lora_A.default.bias", "a.lora_C.weight", "a.weight", "lora_A"])
def test_no_part_of_a_product(name):
    assert lora_tensor(name) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.lm_head.base_layer.weight", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.multi_modal_projector.modules_to_save.task.linear_1.bias", "model.mm_projector.0.bias"),
        ("base_model.model.language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("base_model.model.model.language_model.norm.weight", "model.norm.weight"),
        ("module.base_model.model.model.mm_projector.0.bias", "model.mm_projector.0.bias"),
    ],
)
def test_what_is_trained_whole(name, expected):
    assert plain_name(name) == expected


def test_names_in_both_ages_of_the_hf_layout():
    assert hf_names(f"{LAYER}.weight") == (
        "language_model.model.layers.3.mlp.up_proj.weight",
        "model.language_model.layers.3.mlp.up_proj.weight",
    )
    assert hf_names("lm_head.weight") == ("language_model.lm_head.weight", "lm_head.weight")
    assert hf_names("model.mm_projector.2.bias")[1] == "model.multi_modal_projector.linear_2.bias"
    assert hf_names("image_newline") == ()
    assert {plain_name(name) for name in hf_names(f"{TOWER}.weight")} == {f"{TOWER}.weight"}


def test_what_the_config_gives_is_no_part():
    assert is_derived("base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not is_derived(f"base_model.model.{LAYER}.weight")
    assert bare_name("a.module.b") == "a.b"
