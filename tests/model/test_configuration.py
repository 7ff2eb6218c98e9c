"""`config.json` keeps the original's keys, whoever reads or writes it."""

from __future__ import annotations

import json

import pytest

from llava.files import read_settings
from llava.model.configuration import LlavaConfig, load_config, save_config


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
    changed = {"transformers_version", "_name_or_path", "rope_scaling"}
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
        ("{", r"config.json is no valid JSON \(Expecting property name"),
        ("[1]", r"config.json is no JSON object; fetch the file again$"),
        (
            '{"model_type": "mistral"}',
            r"config.json: model_type 'mistral' is not expected here; use a LLaVA-1.5 checkpoint",
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
    with pytest.raises(ValueError, match=r"config.json is no valid JSON \('utf-8' codec"):
        read_settings(tmp_path / "config.json")
