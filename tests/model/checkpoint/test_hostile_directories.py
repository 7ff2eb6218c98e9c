"""Numbers that no model has, wrong kinds and damaged files are refused by name before anything is built of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from llava.eval.run_llava import main
from llava.model.checkpoint import empty_model as empty
from llava.model.checkpoint.checkpoint import open_checkpoint

TINY = Path(__file__).resolve().parents[3] / "playground" / "llava-tiny"
CONFIG, PIXELS, TOKENS = "config.json", "preprocessor_config.json", "tokenizer_config.json"


@pytest.fixture
def tiny(tmp_path):
    return shutil.copytree(TINY, tmp_path / "tiny")


@pytest.fixture
def refused(tiny, goldens, monkeypatch, capsys):
    """Return the function () -> the one message of a run that ends before a model is built."""
    monkeypatch.setattr(empty, "LlavaLlamaForCausalLM", None)

    def run():
        words = ["--model-path", str(tiny), "--image-file", str(goldens / "images" / "tiny.png"), "--query", "What?"]
        assert main([*words, "--device", "cpu"]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0].removeprefix("error: ")

    return run


def put(path, raw, *keys):
    """Write a value, as it stands in JSON, under keys inside each other."""
    settings = json.loads(path.read_text()) if path.is_file() else {}
    holder = settings
    for key in keys[:-1]:
        holder = holder.setdefault(key, {})
    holder[keys[-1]] = "RAW"
    path.write_text(json.dumps(settings).replace('"RAW"', raw))


VISION, ROPE = "mm_vision_config", "rope_scaling"
CASES = [
    (CONFIG, "100000", ["num_hidden_layers"], "num_hidden_layers is 100000, not a whole number from 1 to 1000;"),
    (CONFIG, "0", ["num_hidden_layers"], "num_hidden_layers is 0, not"),
    (CONFIG, "true", ["num_hidden_layers"], "num_hidden_layers is True, not"),
    (CONFIG, '"mlp99999x_gelu"', ["mm_projector_type"], "mm_projector_type is 'mlp99999x_gelu'"),
    (CONFIG, "5", ["mm_projector_type"], "mm_projector_type is 5, not a text;"),
    (CONFIG, "NaN", ["rms_norm_eps"], r"is not valid JSON \(NaN is not a JSON number"),
    (CONFIG, "1e999", ["rms_norm_eps"], r"is not valid JSON \(1e999 is not a finite number"),
    (CONFIG, "0.0", ["rms_norm_eps"], "rms_norm_eps is 0.0, not a number from 1e-12 to 0.01;"),
    (CONFIG, "-1e-5", ["rms_norm_eps"], "rms_norm_eps is -1e-05, not"),
    (CONFIG, "0.0", ["rope_theta"], "rope_theta is 0.0, not a number from 2 to 1e"),
    (CONFIG, "0", ["rope_parameters", "rope_theta"], "rope_parameters.rope_theta is 0, not"),
    (CONFIG, '{"type": "linear", "factor": 0}', [ROPE], "rope_scaling.factor is 0, not a number from 1 to"),
    (CONFIG, '{"type": ["linear"], "factor": 2}', [ROPE], "rope_scaling has type|wrong kind"),
    (CONFIG, "-5", ["vocab_size"], "vocab_size is -5, not"),
    (CONFIG, "9223372036854775808", ["vocab_size"], "vocab_size is 9223372036854775808, not"),
    (CONFIG, "9" * 5000, ["vocab_size"], "is not valid JSON"),
    (CONFIG, "7", ["num_attention_heads"], "num_key_value_heads is 4, not a divisor of num_attention_heads, 7;"),
    (CONFIG, "3", ["num_key_value_heads"], "num_key_value_heads is 3, not a divisor of num_attention_heads, 4;"),
    (CONFIG, "47", ["head_dim"], "head_dim is 47, not an even number;"),
    (CONFIG, "0", ["head_dim"], "q_proj.weight is .* but the config makes it"),
    (CONFIG, "1000000", ["intermediate_size"], "gate_proj.weight is .* but the config makes it"),
    (CONFIG, "1000000", ["hidden_size"], "embed_tokens.weight is .* but the config makes it"),
    (CONFIG, '"swoosh"', ["hidden_act"], "hidden_act is 'swoosh';"),
    (CONFIG, "[]", ["hidden_act"], "wrong kind"),
    (CONFIG, "5000", ["pad_token_id"], "pad_token_id is 5000, not an id below vocab_size, 704;"),
    (CONFIG, "-1.0", ["initializer_range"], "initializer_range is -1.0, not"),
    (CONFIG, '"int3"', ["dtype"], "dtype is 'int3', not the name of a dtype"),
    (CONFIG, "4", ["sliding_window"], "sliding_window is 4, which Llama's language model does not have;"),
    (CONFIG, "false", ["text_config"], "text_config is False, which Llama's language model does not have;"),
    (CONFIG, '"x"', ["mm_hidden_size"], "mm_hidden_size is 'x', not a number;"),
    (CONFIG, "[[1, 100000]]", ["image_grid_pinpoints"], "image_grid_pinpoints is"),
    (CONFIG, '"' + "[" * 300 + '"', ["image_grid_pinpoints"], "image_grid_pinpoints is"),
    (CONFIG, "5", [VISION], "mm_vision_config is 5, not an object;"),
    (CONFIG, "0", [VISION, "patch_size"], "mm_vision_config: patch_size is 0, not"),
    (CONFIG, "9000", [VISION, "image_size"], "mm_vision_config: image_size is 9000, not"),
    (CONFIG, "98", [VISION, "image_size"], "position_embedding.weight is .* but the config makes it"),
    (CONFIG, "5", [VISION, "num_attention_heads"], "num_attention_heads is 5, not a divisor of 128;"),
    (CONFIG, '"swoosh"', [VISION, "hidden_act"], "hidden_act is 'swoosh', not an activation"),
    (CONFIG, "0", [VISION, "layer_norm_eps"], "layer_norm_eps is 0, not"),
    (CONFIG, '{"a":' * 100_000 + "1" + "}" * 100_000, ["x"], "nested too deep"),
    (PIXELS, "[0.5]", ["image_mean"], r"image_mean is \[0.5\], not three numbers from 0.0 to 1.0;"),
    (PIXELS, "[0, 0, 0]", ["image_std"], r"image_std is \[0, 0, 0\], not three numbers"),
    (PIXELS, "5", ["image_std"], "image_std is 5, not three numbers"),
    (PIXELS, "[NaN, 1, 1]", ["image_std"], "NaN is not a JSON number"),
    (PIXELS, "0", ["size"], "size is 0, not 1 to 10000 pixels;"),
    (PIXELS, "{}", ["crop_size"], r"crop_size is \{\}, not"),
    (PIXELS, '"x"', ["rescale_factor"], "rescale_factor is 'x', not a number;"),
    ("processor_config.json", "5", ["image_processor"], "image_processor is 5, not an object;"),
    (TOKENS, '{"x": {}}', ["added_tokens_decoder"], "'x' is not a token id;"),
    (TOKENS, '{"5": {"content": 5}}', ["added_tokens_decoder"], "is not an added token"),
    (TOKENS, "[]", ["added_tokens_decoder", "5"], "is not an added token"),
    (TOKENS, "5", ["bos_token"], "5 is not a token;"),
    (TOKENS, '"<nowhere>"', ["eos_token"], "the vocabulary of the weights ends at 703;"),
    (TOKENS, '"x"', ["legacy"], "legacy is 'x', not true or false;"),
    ("added_tokens.json", '"x"', ["<x>"], "'x' is not a token id;"),
]


@pytest.mark.parametrize(("name", "raw", "keys", "message"), CASES, ids=lambda value: str(value)[:30])
def test_a_value_that_no_model_has(tiny, refused, name, raw, keys, message):
    put(tiny / name, raw, *keys)
    assert re.search(message, found := refused()), found
    assert len(found) < 1000


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"garbage" * 1000, None])
def test_a_damaged_vocabulary(tiny, refused, content):
    path = tiny / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:3000] if content is None else content)
    assert re.fullmatch(rf"{path} is damaged \(.*fetch it again.*", refused())


@pytest.mark.parametrize("name", [CONFIG, PIXELS, TOKENS, "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "5", '"x"', "{", "", '{"x": NaN}'])
def test_files_that_are_not_an_object(tiny, refused, name, text):
    (tiny / name).write_text(text)
    assert refused().startswith(f"{tiny / name} is ")


def test_options_of_calls_and_names_of_code_are_not_settings(tiny):
    """transformers would set them on its config: `to_dict` as a number, a billion labels."""
    before = open_checkpoint(tiny).config
    for key, raw in {"to_dict": "5", "num_labels": "1000000000", "return_dict": "false", "_private": "{}"}.items():
        put(tiny / CONFIG, raw, key)
    assert open_checkpoint(tiny).config.to_dict() == before.to_dict()


def test_a_null_means_the_default(tiny):
    for key in ("mm_vision_select_layer", "mm_vision_select_feature", "mm_use_im_start_end"):
        put(tiny / CONFIG, "null", key)
    config = open_checkpoint(tiny).config
    assert (config.mm_vision_select_layer, config.mm_vision_select_feature) == (-2, "patch")
