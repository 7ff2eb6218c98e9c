"""`config.json` keeps the original's keys through every reader and writer."""

from __future__ import annotations

import json

import pytest

from llava.files.json_files import read_settings
from llava.model.configuration import LlavaConfig, context_length, load_config, save_config


def write(directory, **settings):
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def test_reads_the_originals_file(goldens):
    config = load_config(goldens / "llava-v1.5-golden")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 2, 32000)
    assert (config.mm_projector_type, config.mm_vision_select_layer, config.mm_hidden_size) == ("mlp2x_gelu", -2, 32)
    assert config.mm_vision_tower == "clip-vit-tiny-patch14-56"
    assert config.image_aspect_ratio == "pad"
    assert config.tokenizer_model_max_length == 256
    assert config.conversation_template is None
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert str(config.dtype) in ("float32", "torch.float32")


def test_round_trip(goldens, tmp_path):
    config = load_config(goldens / "llava-v1.5-golden")
    config.conversation_template, config.base_model_fingerprint = "vicuna_v1", "abc"
    save_config(config, tmp_path)
    again = load_config(tmp_path)
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    written = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((goldens / "llava-v1.5-golden" / "config.json").read_text())
    assert written["architectures"] == ["LlavaLlamaForCausalLM"]
    assert (written["model_type"], written["torch_dtype"], written["rope_theta"]) == ("llava_llama", "float32", 1e4)
    changed = {"transformers_version", "_name_or_path"}
    assert {key: written.get(key) for key in original if key not in changed} == {
        key: value for key, value in original.items() if key not in changed
    }


def test_another_rope_base_survives(tmp_path):
    (tmp_path / "first").mkdir()
    config = load_config(write(tmp_path / "first", model_type="llava_llama", rope_theta=5e5, hidden_size=16))
    save_config(config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 5e5
    assert load_config(tmp_path).rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("kind", ["llava", "llava_llama", "llama"])
def test_names_of_the_architecture(tmp_path, kind):
    assert load_config(write(tmp_path, model_type=kind)).model_type == "llava_llama"


def test_every_key_of_ours_is_declared():
    config = LlavaConfig()
    assert config.mm_projector_type == "linear"
    assert (config.mm_vision_select_layer, config.mm_vision_select_feature) == (-2, "patch")
    assert config.mm_vision_config is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config.json is not valid JSON \(Expecting property name"),
        ("[1]", r"config.json is not a JSON object; fetch the file again$"),
        (
            '{"model_type": "mistral"}',
            r"config.json: model_type 'mistral' is not expected here; use a LLaVA-1.5 checkpoint",
        ),
        (
            '{"model_type": "llava_mistral"}',
            r"'llava_mistral' is not expected here; .* \(this is LLaVA-1.6 with Mistral's language model",
        ),
        ('{"model_type": "clip_vision_model"}', r"\(this is a vision tower; pass it as --vision-tower\)$"),
        (
            '{"model_type": "llava", "mm_patch_merge_type": "spatial_unpad"}',
            r"config.json: mm_patch_merge_type 'spatial_unpad' is LLaVA-1.6's \(LLaVA-NeXT\), which arranges image",
        ),
        (
            '{"model_type": "llava", "vision_config": {}}',
            r"config.json: the llava-hf layout is not expected here; use a LLaV",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing; a model directory needs it"):
        load_config(tmp_path)


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON \('utf-8' codec"):
        read_settings(tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["llava", "llama", "llava_llama"])
def test_from_pretrained_takes_released_configs_as_ours(tmp_path, transformers_log, kind):
    config = LlavaConfig.from_pretrained(write(tmp_path, model_type=kind, hidden_size=16, vocab_size=77))
    assert (type(config), config.model_type, config.vocab_size) == (LlavaConfig, "llava_llama", 77)
    assert transformers_log == []


def test_from_pretrained_names_other_model_types(tmp_path, transformers_log):
    LlavaConfig.from_pretrained(write(tmp_path, model_type="mistral"))
    assert "model of type `mistral` to instantiate a model of type `llava_llama`" in transformers_log.pop()


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("found", "written", "length"),
    [
        (None, None, 4096),
        ({"type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}, 16384),  # Vicuna-16k
        ({"type": "dynamic", "factor": 2}, {"type": "dynamic", "factor": 2.0}, 8192),
        ({"rope_type": "linear", "factor": 1.5}, {"type": "linear", "factor": 1.5}, 6144),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
            8192,
        ),
        ({"rope_type": "llama3", "factor": 8.0, **LLAMA3}, {"rope_type": "llama3", "factor": 8.0, **LLAMA3}, 4096),
        ({"rope_type": "longrope", **LONGROPE}, {"rope_type": "longrope", **LONGROPE}, 4096),
    ],
)
def test_rotary_scaling_is_written_for_older_and_newer_transformers(tmp_path, found, written, length):
    (tmp_path / "first").mkdir()
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4096}
    place = write(tmp_path / "first", model_type="llava", rope_theta=10000.0, rope_scaling=found, **sizes)
    config = load_config(place)
    save_config(config, tmp_path)
    settings = read_settings(tmp_path / "config.json")
    assert settings["rope_scaling"] == written
    assert settings["rope_parameters"] == {"rope_type": "default", **config.rope_parameters}
    again = load_config(tmp_path)
    assert again.rope_parameters == config.rope_parameters
    config.save_pretrained(tmp_path / "by_transformers")  # as a model's does, and as peft and trainers do
    settings = json.loads((tmp_path / "by_transformers" / "config.json").read_text())
    assert (settings["rope_scaling"], settings["rope_theta"]) == (written, 10000.0)
    assert load_config(tmp_path / "by_transformers").rope_parameters == config.rope_parameters
    assert (context_length(config), context_length(again)) == (length, length)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rope_scaling": {"type": "linear"}},
            r"config.json: rope_scaling has type 'linear' and factor None; known types are linear, dynamic, .* with a",
        ),
        (
            {"rope_scaling": {"type": "su", "factor": 2.0}},
            r"config.json: rope_scaling has type 'su' and factor 2.0; kn",
        ),
        ({"rope_scaling": "linear"}, r"config.json holds a value of the wrong kind \(.*'rope_parameters'.*\); correct"),
        (
            {"mm_vision_select_layer": "-2"},
            r"config.json: mm_vision_select_layer is '-2'; correct it, or fetch the fil",
        ),
        ({"quantization_config": "int8"}, r"config.json: quantization_config is 'int8'; correct it, or fetch the file"),
        ({"hidden_act": "swoosh"}, r"config.json: hidden_act is 'swoosh'; correct it, or fetch the file again$"),
        ({"hidden_size": "16"}, r"config.json holds a value of the wrong kind \(.*'hidden_size' .*\); correct it, or"),
    ],
)
def test_values_that_make_no_model(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, model_type="llava", **settings))
