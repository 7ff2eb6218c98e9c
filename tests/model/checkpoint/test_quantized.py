"""Quantised weights in files: bitsandbytes' own layout, read back strictly and without a difference."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint.checkpoint import save_checkpoint, state_for_file
from llava.model.checkpoint.lazy_tensors import LazyTensor, LazyTensors
from llava.model.checkpoint.quantized import (
    STATE_BYTES,
    quantize_tensors,
    stored_layout,
    stored_parameter,
    stored_parts,
)
from llava.model.checkpoint.read_tensors import SAFETENSORS_FILE, open_weights
from llava.model.checkpoint.write_tensors import save_tensors, write_weights
from llava.model.configuration import LlavaConfig
from llava.model.quantization import quantization_settings, quantize_linears, quantized_parameter
from llava.tokenization.llama_tokenizer import load_tokenizer

pytest.importorskip("bitsandbytes")

BITS = [4, 8]
CPU = torch.device("cpu")
WEIGHT = "model.layers.0.mlp.up_proj.weight"
STATE = "weight.quant_state.bitsandbytes__nf4"


def random_weight(rows=96, columns=128, dtype=torch.float16):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def quantised_layer(weight, bits):
    layers = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    quantize_linears(layers, bits, weight.dtype)
    layers[0].weight = quantized_parameter(layers[0], weight, weight.dtype)
    return layers[0]


def text_of(tensor):
    return json.loads(bytes(tensor.tolist()))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_parts_equal_what_bitsandbytes_saves(bits, dtype):
    weight = random_weight(dtype=dtype)
    found = quantize_tensors(LazyTensors.of({WEIGHT: weight}), bits, dtype, CPU)
    expected = quantised_layer(weight, bits).state_dict()
    prefix = WEIGHT.removesuffix("weight")
    assert [name.removeprefix(prefix) for name in found] == list(expected)
    for name, tensor in expected.items():
        entry, read = found.entries[prefix + name], found[prefix + name]
        assert (entry.shape, entry.dtype) == (read.shape, read.dtype)
        if name == STATE:
            assert text_of(read) == text_of(tensor)
            assert len(read) == STATE_BYTES
        else:
            assert read.dtype is tensor.dtype
            assert torch.equal(read, tensor), name


@pytest.mark.parametrize("shape", [(96, 128), (32, 64), (1, 2), (3, 43), (160, 128)])
@pytest.mark.parametrize("bits", BITS)
def test_sizes_are_known_before_the_values(bits, shape):
    weight = random_weight(*shape)
    expected = quantised_layer(weight, bits).state_dict()
    prefix = WEIGHT.removesuffix("weight")
    found = stored_parts(WEIGHT, weight.shape, bits)
    assert found.keys() == {prefix + name for name in expected}
    for name, tensor in expected.items():
        kind = found[prefix + name]
        assert kind.dtype is tensor.dtype
        assert kind.shape == (None if name == STATE else tensor.shape)


def counted(tensors):
    """The same tensors, and how often each was read."""
    reads = dict.fromkeys(tensors, 0)

    def entry(name, tensor):
        def read():
            reads[name] += 1
            return tensor

        return LazyTensor(tensor.shape, tensor.dtype, read, "shard.bin")

    return LazyTensors({name: entry(name, tensor) for name, tensor in tensors.items()}), reads


@pytest.mark.parametrize("bits", BITS)
def test_each_weight_is_read_once_and_kept_no_longer_than_it_is_written(bits, tmp_path):
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    tensors, reads = counted({name: random_weight() for name in names})
    quantised = quantize_tensors(tensors, bits, torch.float16, CPU)
    write_weights(quantised, tmp_path, max_shard_bytes=5000)
    assert reads == dict.fromkeys(names, 1)
    assert all(entry.read.func.__self__._parts == {} for entry in quantised.entries.values())
    written = open_weights(tmp_path)
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: entry.shape for name, entry in quantised.entries.items()
    }


def test_the_rest_is_cast_and_integers_stay():
    rest = {
        "lm_head.weight": torch.ones(4, 4),
        "model.embed_tokens.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        "model.layers.0.input_layernorm.weight": torch.ones(4),
        "model.mm_projector.0.weight": torch.ones(4, 4),
        "position_ids": torch.arange(4),
    }
    found = quantize_tensors(LazyTensors.of(rest), 4, torch.float16, CPU)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        **dict.fromkeys(rest, torch.float16),
        "position_ids": torch.int64,
    }


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", [WEIGHT, "lm_head.weight"])
def test_tensors_with_nan_are_named(bits, name):
    weight = random_weight()
    weight[3, 5] = torch.nan
    found = quantize_tensors(counted({name: weight})[0], bits, torch.float16, CPU)
    with pytest.raises(ValueError, match=rf"^{name} in shard.bin holds NaN or infinity"):
        found[name]


@pytest.mark.parametrize("bits", BITS)
def test_values_too_large_for_fp16_are_named(bits):
    weight = random_weight(dtype=torch.float32)
    weight[3, 5] = 1e6
    found = quantize_tensors(LazyTensors.of({WEIGHT: weight}), bits, torch.float16, CPU)
    with pytest.raises(
        ValueError, match=rf"^{WEIGHT} holds values too large for torch.float16; quantise with bfloat16"
    ):
        found[WEIGHT]


def stored(bits, **changes):
    """A layer without weight, and the parts of one, some changed."""
    weight = random_weight()
    layer = quantised_layer(weight, bits)
    parts = dict(quantize_tensors(LazyTensors.of({WEIGHT: weight}), bits, torch.float16, CPU))
    prefix = WEIGHT.removesuffix("weight")
    return layer, parts | {prefix + name: tensor for name, tensor in changes.items()}


def text(**changes):
    weight = random_weight()
    state = text_of(dict(quantised_layer(weight, 4).state_dict())[STATE]) | changes
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_comes_back_as_it_was(bits):
    layer, parts = stored(bits)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.weight = stored_parameter(layer, WEIGHT, parts)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize(
    "changes",
    [{"blocksize": 128}, {"quant_type": "fp4"}, {"shape": [1, 2]}, {"dtype": "int8"}, {"nested_offset": 1e999}],
)
def test_another_kind_of_nf4_is_refused(changes):
    layer, parts = stored(4)
    parts[f"{WEIGHT}.{STATE.removeprefix('weight.')}"] = text(**changes)
    message = rf"^{WEIGHT}.quant_state.bitsandbytes__nf4 says .*, which does not fit the layer of shape \[96, 128\] and"
    with pytest.raises(ValueError, match=message):
        stored_parameter(layer, WEIGHT, parts)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"quant_type": "nf4"}', b"\xff"])
def test_a_damaged_text_is_refused(content):
    layer, parts = stored(4)
    parts[f"{WEIGHT}.{STATE.removeprefix('weight.')}"] = torch.tensor(list(content), dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=rf"^{WEIGHT}.quant_state.bitsandbytes__nf4 is damaged \(.*\); quantise the 16"
    ):
        stored_parameter(layer, WEIGHT, parts)


def test_another_layout_of_int8_is_refused():
    layer, parts = stored(8, weight_format=torch.tensor(1, dtype=torch.uint8))
    with pytest.raises(
        ValueError, match=r"^model.layers.0.mlp.up_proj.weight_format is not 0, the layout by rows; qua"
    ):
        stored_parameter(layer, WEIGHT, parts)


SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 704, "conversation_template": "vicuna_v1"}


@pytest.fixture(scope="module")
def directories(request, tiny_model, tmp_path_factory):
    """A tiny random LLaVA in 16 bit, and the same quantised, by bits."""
    model, tokenizer = tiny_model(**SIZES), load_tokenizer(request.config.rootpath / "playground/llava-tiny")
    tensors, found = state_for_file(model), {}
    for bits in (16, *BITS):
        found[bits] = tmp_path_factory.mktemp(f"bits{bits}")
        config = LlavaConfig.from_dict(model.config.to_dict())
        if bits == 16:
            save_checkpoint(tensors, config, tokenizer, None, found[bits], dtype=torch.float16)
        else:
            config.quantization_config = quantization_settings(bits, torch.float16)
            halves = {name: tensor.half() for name, tensor in tensors.items()}
            quantised = quantize_tensors(LazyTensors.of(halves), bits, torch.float16, CPU)
            save_checkpoint(quantised, config, tokenizer, None, found[bits])
    return found


def load(directory, **options):
    return load_pretrained_model(str(directory), None, "tiny", device="cpu", **{"dtype": "float16", **options})[1]


@pytest.mark.parametrize("bits", BITS)
def test_a_saved_directory_equals_quantising_while_loading(directories, bits):
    saved = [load(directories[bits]), load(directories[bits], **{f"load_{bits}bit": True})]
    quantised = load(directories[16], **{f"load_{bits}bit": True})
    expected = {name: tensor.clone() for name, tensor in quantised.state_dict().items()}
    assert sum(name.endswith(("absmax", "SCB")) for name in expected) == 14 * (2 if bits == 4 else 1)
    ids = torch.tensor([[1, -200, 300, 301]])
    images = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():
        answers = quantised(input_ids=ids, images=images).logits
    for model in saved:
        found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        with torch.no_grad():
            logits = model(input_ids=ids, images=images).logits
        assert torch.equal(logits, answers)


@pytest.mark.parametrize("bits", BITS)
def test_other_bits_than_the_directorys_are_refused(directories, bits):
    other = 12 - bits
    with pytest.raises(
        ValueError, match=rf"^{directories[bits]} holds {bits}-bit weights, but {other} bit is requested"
    ):
        load(directories[bits], **{f"load_{other}bit": True})


@pytest.mark.parametrize("bits", BITS)
def test_transformers_reads_the_llm_of_a_saved_directory(directories, bits, tmp_path):
    """The same logits from `from_pretrained`, which knows nothing of this code."""
    llm = {name: entry for name, entry in open_weights(directories[bits]).entries.items() if not is_outside_llm(name)}
    write_weights(LazyTensors(llm), tmp_path)
    settings = json.loads((directories[bits] / "config.json").read_text())
    settings = {key: value for key, value in settings.items() if not key.startswith("mm_")}
    settings |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    theirs, report = LlamaForCausalLM.from_pretrained(
        tmp_path, device_map="cpu", dtype=torch.float16, output_loading_info=True
    )
    assert not any(report.values())
    ids = torch.tensor([[1, 300, 301, 302]])
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, load(directories[bits])(input_ids=ids).logits)


def is_outside_llm(name):
    return "vision_tower" in name or "mm_projector" in name


def damaged(source, target, change):
    """A copy of a directory whose tensors are changed."""
    shutil.copytree(source, target)
    tensors = {name: tensor.clone() for name, tensor in open_weights(source).items()}
    change(tensors)
    save_tensors(tensors, target / SAFETENSORS_FILE)
    return target


Q = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("bits", "change", "message"),
    [
        (4, lambda tensors: tensors.pop(f"{Q}weight.absmax"), rf"1 missing \({Q}weight.absmax\)"),
        (4, lambda tensors: tensors.pop(f"{Q}{STATE}"), rf"1 missing \({Q}{STATE}\)"),
        (8, lambda tensors: tensors.pop(f"{Q}SCB"), rf"1 missing \({Q}SCB\)"),
        (
            4,
            lambda tensors: tensors.update({"lm_head.weight.absmax": torch.zeros(1)}),
            r"1 unexpected \(lm_head.weight.absmax\)",
        ),
        (
            4,
            lambda tensors: tensors.update({f"{Q}weight.absmax": torch.zeros(63, dtype=torch.uint8)}),
            rf"^{Q}weight.absmax is \(63,\) in \S+/model.safetensors, but the config makes it \(64,\); use the",
        ),
        (
            8,
            lambda tensors: tensors.update({f"{Q}weight": torch.zeros(64, 64)}),
            rf"^{Q}weight is torch.float32 in \S+/model.safetensors, but the config makes it torch.int8; use",
        ),
        (
            8,
            lambda tensors: tensors[f"{Q}SCB"].fill_(torch.nan),
            rf"^{Q}SCB in .*model.safetensors holds NaN or infinity",
        ),
        (
            4,
            lambda tensors: tensors[f"{Q}weight.nested_absmax"].fill_(torch.inf),
            rf"^{Q}weight.nested_absmax in .*model.safetensors holds NaN or infinity",
        ),
    ],
)
def test_damaged_directories_are_refused_by_name(directories, tmp_path, bits, change, message):
    directory = damaged(directories[bits], tmp_path / "damaged", change)
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_a_truncated_directory_is_refused(directories, tmp_path):
    directory = tmp_path / "short"
    shutil.copytree(directories[4], directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged \(.*\); fetch it again"):
        load(directory)


@pytest.mark.parametrize("bits", BITS)
def test_nan_in_a_shard_is_named_while_it_is_quantised(directories, tmp_path, bits):
    directory = damaged(directories[16], tmp_path / "nan", lambda tensors: tensors[f"{Q}weight"].fill_(torch.nan))
    with pytest.raises(ValueError, match=rf"^{Q}weight in .*model.safetensors holds NaN or infinity"):
        load(directory, **{f"load_{bits}bit": True})


def test_a_directory_that_is_not_quantised_has_no_layout(tiny_model):
    assert stored_layout(tiny_model(), None) == {}
