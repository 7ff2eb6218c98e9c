"""Names, config and vocabulary survive the way to the llava-hf layout and back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers

from llava.model.checkpoint.hf_layout import (
    config_from_hf,
    config_to_hf,
    cut_vocabulary,
    hf_name,
    open_hf_weights,
    original_name,
    pad_vocabulary,
    rows_with_room,
)
from llava.model.checkpoint.lazy_tensors import LazyTensors
from llava.model.checkpoint.read_tensors import open_weights
from llava.model.configuration import LlavaConfig, config_settings, load_config
from llava.model.vision_tower import VIT_L_14_336

FULL = "llava-v1.5-golden"
TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("multi_modal_projector.linear_1.bias", "model.mm_projector.0.bias"),
        ("model.multi_modal_projector.linear_2.weight", "model.mm_projector.2.weight"),
        ("vision_tower.vision_model.pre_layrnorm.bias", f"{TOWER}pre_layrnorm.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", f"{TOWER}pre_layrnorm.bias"),
        ("model.vision_tower.encoder.layers.1.mlp.fc1.bias", f"{TOWER}encoder.layers.1.mlp.fc1.bias"),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", None),
        (f"{TOWER}pre_layrnorm.bias", f"{TOWER}pre_layrnorm.bias"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_names_of_every_age(theirs, ours):
    assert original_name(theirs) == ours


def test_names_there_and_back(goldens):
    names = list(open_weights(goldens / FULL))
    assert [original_name(hf_name(name)) for name in names] == names
    assert len({hf_name(name) for name in names}) == len(names)


def test_a_name_without_place():
    with pytest.raises(ValueError, match=r"^image_newline has no place in the llava-hf layout; only LLaVA-1.5 with an"):
        hf_name("image_newline")


TOKENS = {"image_token_id": 32000, "pad_token_id": 0, "vocab_size": 32064}


def complete(config):
    config.mm_vision_config = config.mm_vision_config or dict(VIT_L_14_336)
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch", "image_aspect_ratio": None},
        {"conversation_template": "llava_llama_2", "base_model_name_or_path": "a/b", "base_model_fingerprint": "f"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"},
    ],
)
def test_configs_there_and_back(goldens, changes):
    config = complete(load_config(goldens / FULL))
    config = LlavaConfig.from_dict({**config.to_dict(), **changes})
    settings = json.loads(json.dumps(config_to_hf(config, **TOKENS)))
    assert config_settings(config_from_hf(settings, "x")) == config_settings(config)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048},
    ],
)
def test_rotary_scaling_is_written_for_older_and_newer_transformers(goldens, scaling):
    config = complete(
        LlavaConfig.from_dict({**load_config(goldens / FULL).to_dict(), "rope_parameters": dict(scaling)})
    )
    settings = json.loads(json.dumps(config_to_hf(config, **TOKENS)))
    text = settings["text_config"]
    assert (text["rope_scaling"], text["rope_theta"]) == (scaling, 10000.0)
    assert text["rope_parameters"]["rope_type"] == scaling.get("type") or scaling["rope_type"]
    theirs = transformers.LlavaConfig.from_dict(copy.deepcopy(settings)).text_config.rope_parameters
    assert theirs["factor"] == scaling["factor"]
    assert config_from_hf(settings, "x").rope_parameters["factor"] == scaling["factor"]
    assert "rope_scaling" not in settings["llava"]


def test_transformers_reads_the_config(goldens):
    config = complete(load_config(goldens / FULL))
    theirs = transformers.LlavaConfig.from_dict(config_to_hf(config, **TOKENS))
    assert (theirs.image_token_index, theirs.vision_feature_layer, theirs.image_seq_length) == (32000, -2, 576)
    assert (theirs.text_config.vocab_size, theirs.text_config.hidden_size) == (32064, 16)
    assert theirs.text_config.rms_norm_eps == config.rms_norm_eps
    assert theirs.text_config.max_position_embeddings == config.max_position_embeddings
    assert {key: getattr(theirs.vision_config, key) for key in VIT_L_14_336} == VIT_L_14_336


def test_the_hubs_short_config_has_transformers_defaults():
    """llava-hf/llava-1.5-7b-hf leaves most sizes out."""
    settings = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    config = config_from_hf(settings, "x")
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (4096, 32, 11008)
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (32064, 4096, 1e-5)
    assert config.mm_vision_config == VIT_L_14_336
    assert (config.mm_projector_type, config.mm_vision_select_layer) == ("mlp2x_gelu", -2)
    assert str(config.dtype).endswith("float16")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "llava_next"}, "model_type is 'llava_next'"),
        ({"text_config": {"model_type": "mistral"}}, "text_config.model_type is 'mistral'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config.model_type is 'siglip_vision_model'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]"),
        ({"vision_feature_select_strategy": "some"}, "vision_feature_select_strategy is 'some'"),
    ],
)
def test_other_models_are_refused(changes, reason):
    settings = {"model_type": "llava", "text_config": {}, "vision_config": {}, **changes}
    message = f"^x/config.json: {reason}, so this is not LLaVA-1.5; use the library it was made for$"
    with pytest.raises(ValueError, match=message):
        config_from_hf(settings, "x/config.json")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mm_vision_config": None}, "it has no vision tower"),
        ({"mm_projector_type": "linear"}, "its projector is 'linear', not mlp2x_gelu"),
        ({"image_aspect_ratio": "anyres"}, r"its images are cut into tiles \('anyres'\)"),
        ({"mm_use_im_start_end": True}, "it marks images by <im_start> and <im_end>"),
    ],
)
def test_models_without_place_in_the_layout(changes, reason):
    options = {"mm_vision_config": dict(VIT_L_14_336), "mm_projector_type": "mlp2x_gelu", **changes}
    message = f"^the llava-hf layout can't hold this model: {reason}; use --layout original$"
    with pytest.raises(ValueError, match=message):
        config_to_hf(LlavaConfig(**options), **TOKENS)


@pytest.mark.parametrize(
    ("rows", "ids", "expected"),
    [(32000, (32000, 0), 32064), (32000, (32000, 32001), 32064), (32064, (32000, 32001), 32064), (5, (3, 4), 5)],
)
def test_room_in_the_vocabulary(rows, ids, expected):
    assert rows_with_room(rows, *ids) == expected


def test_added_rows_are_the_mean_and_are_cut_off_again():
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(10, 4, generator=generator, dtype=torch.float16)
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    }
    padded = pad_vocabulary(LazyTensors.of(weights), 12)
    assert padded["model.norm.weight"].shape == (10, 4)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert padded.entries[name].shape == padded[name].shape == (12, 4)
        assert torch.equal(padded[name][:10], weights[name])
        mean = weights[name].double().mean(0)
        assert torch.equal(padded[name][10], padded[name][11])
        torch.testing.assert_close(padded[name][10].double(), mean, atol=1e-3, rtol=1e-3)
        assert torch.equal(cut_vocabulary(padded, 10)[name], weights[name])
    assert cut_vocabulary(padded, 12).entries == padded.entries


def test_a_mean_row_of_the_head_never_wins():
    head = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1))
    padded = pad_vocabulary(LazyTensors.of({"lm_head.weight": head}), 1064)["lm_head.weight"]
    hidden = torch.randn(500, 8, generator=torch.Generator().manual_seed(2))
    assert (hidden @ padded.T).argmax(1).max() < 1000


def test_a_directory_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        open_hf_weights(tmp_path)
