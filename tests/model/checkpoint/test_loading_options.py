"""Options that the original's callers pass to `load_pretrained_model`: used, without effect, or a TypeError."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BitsAndBytesConfig

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint.loading_options import HARMLESS, read_options


def load(goldens, **options):
    return load_pretrained_model(str(goldens / "llava-v1.5-golden"), None, "x", device="cpu", **options)[1]


def read(load_8bit=False, load_4bit=False, use_flash=False, **options):
    return read_options(options, load_8bit=load_8bit, load_4bit=load_4bit, use_flash=use_flash)


def test_harmless_options_change_nothing(goldens, golden_model):
    values = dict.fromkeys(HARMLESS, True) | {"offload_folder": "offload"}
    assert "low_cpu_mem_usage" in values
    model = load(goldens, **values)
    assert torch.equal(model.lm_head.weight, golden_model[1].lm_head.weight)


def test_an_unknown_option_is_a_type_error_that_names_it(goldens):
    message = r"^load_pretrained_model\(\) got an unexpected keyword argument 'spam'; its further options are allow_"
    with pytest.raises(TypeError, match=message):
        load(goldens, spam=1)
    with pytest.raises(TypeError, match="'token'"):
        read(torch_dtype="float16", token="x")


@pytest.mark.parametrize(("name", "found"), [("sdpa", "sdpa"), ("eager", "eager"), (None, "sdpa")])
def test_attention(goldens, name, found):
    assert load(goldens, attn_implementation=name).config._attn_implementation == found


def test_flash_attention_that_is_not_installed(goldens, monkeypatch):
    with pytest.raises(ValueError, match=r"^attn_implementation is 'fast'; choose sdpa, eager, flash_attention_2$"):
        load(goldens, attn_implementation="fast")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for options in ({"attn_implementation": "flash_attention_2"}, {"use_flash_attention_2": True}, {"use_flash": True}):
        with pytest.raises(ImportError, match=r"^flash_attention_2 needs the package flash-attn; install it"):
            read(**options)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({}, 16),
        ({"load_8bit": True}, 8),
        ({"load_in_4bit": True, "load_in_8bit": False}, 4),
        ({"quantization_config": None}, 16),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, 8),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}, 4),
        ({"load_4bit": True, "quantization_config": {"load_in_4bit": True}}, 4),
    ],
)
def test_ways_to_ask_for_fewer_bits(options, bits):
    assert read(**options).bits == bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_8bit": True, "load_in_4bit": True}, r"^load_8bit, load_4bit, load_fp8 exclude each other; pass one$"),
        ({"quantization_config": {"quant_method": "awq"}}, r'^quantization_config is {"quant_method": "awq"}; only'),
        (
            {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")},
            r"^bnb_4bit_quant_type is 'fp4'; only 'nf4' is supported$",
        ),
    ],
)
def test_bits_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        read(**options)


def test_the_config_can_be_overwritten(goldens, tmp_path):
    (tmp_path / "custom.json").write_text(json.dumps({"image_aspect_ratio": "square", "model_type": "other"}))
    config = load(goldens, customized_config=tmp_path / "custom.json").config
    assert (config.image_aspect_ratio, config.model_type) == ("square", "llava_llama")
    config = load(goldens, overwrite_config={"image_aspect_ratio": "pad", "tokenizer_model_max_length": 99}).config
    assert (config.image_aspect_ratio, config.tokenizer_model_max_length) == ("pad", 99)


def test_revision_and_cache_are_handed_on(goldens, monkeypatch):
    from llava.model import builder

    requested = []

    def resolve(name, cache_dir, *, revision):
        requested.append((name, cache_dir, revision))
        return goldens / "llava-v1.5-golden"

    monkeypatch.setattr(builder, "resolve_directory", resolve)
    load_pretrained_model("someone/llava", None, "x", device="cpu", cache_dir="here", revision="v1")
    assert requested == [("someone/llava", "here", "v1")]


def test_the_tower_is_frozen_and_an_empty_base_is_none(goldens):
    model = load_pretrained_model(str(goldens / "llava-v1.5-golden"), "", "x", device="cpu")[1]
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning
    assert not [name for name in learning if "vision_tower" in name]
    assert not model.get_vision_tower()(torch.zeros(1, 3, 56, 56)).requires_grad
