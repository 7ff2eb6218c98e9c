"""4 and 8 bit: quantised layers, exactness, answers, and refused inputs."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from llava.model import devices
from llava.model.builder import load_pretrained_model
from llava.model.configuration import LlavaConfig
from llava.model.quantization import (
    check_placement,
    choose_bits,
    has_4bit_weights,
    import_bitsandbytes,
    is_quantized,
    narrow_dtypes,
    plain_parameter,
    quantization_note,
    quantization_settings,
    quantize_4bit,
    quantize_8bit,
    quantize_linears,
    quantized_parameter,
    refuse_quantized,
    saved_bits,
)

BITS = [4, 8]
CPU, MPS, GPU = torch.device("cpu"), torch.device("mps"), torch.device("cuda:0")
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ]
)
"""Source: Dettmers et al. 2023, appendix E."""


def random_weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quantised_config():
    return lambda bits: LlavaConfig(quantization_config=quantization_settings(bits, torch.bfloat16))


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r'^4 and 8 bit need bitsandbytes \(.*\); run: pip install -e "\.\[quant\]"$'
    with pytest.raises(ImportError, match=message):
        import_bitsandbytes()


def test_other_numbers_of_bits():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"^bits is 3; choose 4, 8, 16 or 'fp8'$"):
        quantize_linears(nn.Sequential(nn.Linear(2, 2)), 3, torch.float32)
    with pytest.raises(ValueError, match=r"^bits is 16; choose 4 or 8$"):
        quantization_settings(16, torch.float32)


def test_plain_parameters_are_cast():
    parameter = plain_parameter(nn.Linear(2, 2), torch.ones(2, 2, dtype=torch.float64), torch.bfloat16)
    assert isinstance(parameter, nn.Parameter)
    assert parameter.dtype is torch.bfloat16


def test_nf4_stores_the_nearest_level_and_quantises_the_scales():
    bnb = pytest.importorskip("bitsandbytes")
    weight = random_weight(6, 128)
    stored = quantize_4bit(weight)
    blocks = weight.view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = (blocks / scales).unsqueeze(-1).sub(NF4).abs().argmin(-1).flatten()
    packed = stored.data.flatten()
    assert torch.equal(torch.stack([packed >> 4, packed & 15], 1).flatten(), levels.to(torch.uint8))
    state = stored.quant_state
    assert state.nested
    assert state.absmax.dtype is torch.uint8
    restored = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    torch.testing.assert_close(restored, scales.flatten(), rtol=0.02, atol=0)


def test_int8_stores_each_row_by_its_largest_value():
    pytest.importorskip("bitsandbytes")
    weight = random_weight(5, 64).half()
    stored = quantize_8bit(weight)
    largest = weight.float().abs().amax(1)
    assert torch.equal(stored.SCB, largest)
    assert torch.equal(stored.data, (weight.float() * (127 / largest[:, None])).round().to(torch.int8))
    assert torch.equal(stored.CB, stored.data)


@pytest.mark.parametrize("bits", BITS)
def test_a_layer_computes_with_its_quantised_weight(bits):
    bnb = pytest.importorskip("bitsandbytes")
    layers = nn.Sequential(nn.Linear(64, 32, bias=False))
    quantize_linears(layers, bits, torch.float32)
    assert layers[0].weight.is_meta
    layers[0].weight = quantized_parameter(layers[0], random_weight(32, 64), torch.float32)
    stored = layers[0].weight
    restored = stored.data.float() * stored.SCB[:, None] / 127 if bits == 8 else None
    if bits == 4:
        restored = bnb.functional.dequantize_4bit(stored.data, stored.quant_state)
    rows = random_weight(3, 64)
    with torch.no_grad():
        found = layers.eval()(rows)
    # On CPUs with bf16 instructions the 4-bit kernel rounds to bf16, and LLM.int8 rounds its inputs to 8 bit.
    torch.testing.assert_close(found, rows @ restored.T, atol=0.02 * float((rows @ restored.T).abs().max()), rtol=0)


def test_which_layers_are_of_4_bit(monkeypatch):
    pytest.importorskip("bitsandbytes")
    for bits, is_4bit in ((4, True), (8, False), (None, False)):
        layers = nn.Sequential(nn.Linear(64, 32, bias=False))
        if bits:
            quantize_linears(layers, bits, torch.float32)
        assert has_4bit_weights(layers) == is_4bit
        layers[0].lora_A = nn.ModuleDict()  # as peft's layers around them have it
        assert not has_4bit_weights(layers)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not has_4bit_weights(layers)


def test_eight_bit_logs_no_casts(caplog):
    pytest.importorskip("bitsandbytes")
    layers = nn.Sequential(nn.Linear(64, 32, bias=False))
    quantize_linears(layers, 8, torch.float32)
    layers[0].weight = quantized_parameter(layers[0], random_weight(32, 64), torch.float32)
    with caplog.at_level(logging.WARNING):
        layers(random_weight(3, 64))
    assert caplog.messages == []


@pytest.fixture(scope="module")
def embedded(repository):
    """The embedded model, by bits."""
    pytest.importorskip("bitsandbytes")
    options = {16: {}, 8: {"load_8bit": True}, 4: {"load_4bit": True}}
    path = str(repository / "playground/llava-tiny")
    return {
        bits: load_pretrained_model(path, None, "llava-tiny", device="cpu", dtype="float32", **option)
        for bits, option in options.items()
    }


@pytest.fixture(scope="module")
def repository(request):
    return request.config.rootpath


@pytest.mark.parametrize("bits", BITS)
def test_quantised_are_the_llms_blocks_alone(embedded, bits):
    import bitsandbytes as bnb

    kind = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}[bits]
    model, plain = embedded[bits][1], embedded[16][1]
    found = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kind)}
    assert found == {
        f"model.layers.{layer}.{part}_proj.weight"
        for layer in range(5)
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert narrow_dtypes(plain, bits).keys() == found
    rest = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in found:
            assert torch.equal(parameter, rest[name]), name


def test_sixteen_bit_weights_have_one_dtype(embedded):
    assert narrow_dtypes(embedded[16][1], 16) == {}


@pytest.mark.parametrize(("bits", "similarity"), [(4, 0.98), (8, 0.999)])
def test_quantised_answers_on_the_cpu(embedded, bits, similarity):
    ids = torch.tensor([[1, -200, 300, 301, 302, 5]])
    pixels = torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = (embedded[each][1](input_ids=ids, images=pixels).logits for each in (bits, 16))
    assert torch.nn.functional.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > similarity
    answer = embedded[bits][1].generate(ids, images=pixels, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape == (1, 3)


@pytest.mark.parametrize("bits", BITS)
def test_settings_are_those_of_transformers(bits):
    settings = quantization_settings(bits, torch.bfloat16)
    understood = BitsAndBytesConfig.from_dict(dict(settings))
    assert understood.to_dict() == settings
    assert understood.quantization_method() == {4: "nf4", 8: "llm_int8"}[bits]
    assert understood.bnb_4bit_use_double_quant is (bits == 4)
    assert understood.llm_int8_skip_modules == ["lm_head", "model.mm_projector", "model.vision_tower"]


def test_the_config_records_the_bits(quantised_config):
    plain = LlavaConfig()
    assert not is_quantized(plain)
    assert saved_bits(plain, "here") is None
    assert [choose_bits(bits, plain, "here") for bits in (4, 8, 16)] == [4, 8, 16]
    for bits in BITS:
        config = quantised_config(bits)
        assert is_quantized(config)
        assert saved_bits(config, "here") == bits
        assert [choose_bits(requested, config, "here") for requested in (16, bits)] == [bits, bits]


@pytest.mark.parametrize(("saved", "requested"), [(4, 8), (8, 4)])
def test_other_bits_than_stored_are_refused(quantised_config, saved, requested):
    message = (
        rf"^here holds {saved}-bit weights, but {requested} bit is requested; leave the option out, or load the 16-bit"
    )
    with pytest.raises(ValueError, match=message):
        choose_bits(requested, quantised_config(saved), "here")


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "gptq"},
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_use_double_quant": False},
        {"load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 0.0},
    ],
)
def test_other_methods_are_refused(changes):
    config = LlavaConfig(quantization_config={**quantization_settings(4, torch.bfloat16), **changes})
    assert is_quantized(config)
    message = r"^here is quantised by .*; supported are .*: make one from the 16-bit weights with scripts/quantize_ch"
    with pytest.raises(ValueError, match=message):
        saved_bits(config, "here")


def test_a_method_that_cannot_be_read_is_named():
    config = LlavaConfig(quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ValueError, match=r"^here is quantised by awq; supported are"):
        saved_bits(config, "here")
    with pytest.raises(ValueError, match=r"^here holds weights quantised by awq, which can't be trained; give the dir"):
        refuse_quantized(config, "here", "trained")


def test_quantised_weights_are_refused_where_values_are_needed(quantised_config):
    refuse_quantized(LlavaConfig(), "here", "merged")
    message = (
        r"^here holds quantised weights, which load for inference but can't be merged; give the directory of the 16-bit"
    )
    with pytest.raises(ValueError, match=message):
        refuse_quantized(quantised_config(4), "here", "merged")


def test_the_warning_for_adapters_of_quantised_bases():
    assert quantization_note(16) is None
    assert quantization_note(4).startswith("the adapter was trained on its base held in 4 bit and is added to the 16")


@pytest.mark.parametrize("bits", BITS)
def test_devices_without_kernels_are_refused(bits):
    message = rf"^{bits} bit is supported on CUDA and the CPU, not on mps; load 16 bit there, or pass device cpu$"
    with pytest.raises(ValueError, match=message):
        check_placement(nn.Sequential(), bits, {MPS})
    message = rf"^{bits} bit can't be spread over GPU and CPU; name GPUs alone in device_map, or one device$"
    with pytest.raises(ValueError, match=message):
        check_placement(nn.Sequential(), bits, {GPU, CPU})


def test_8_bit_needs_turing(pretend_gpu):
    pretend_gpu((7, 0))
    message = r"^8 bit: GPU \(compute capability 7.0, Volta\) has no kernels for LLM.int8; load 4 or 16 bit$"
    with pytest.raises(ValueError, match=message):
        check_placement(nn.Sequential(), 8, {GPU})
    check_placement(nn.Sequential(), 4, {GPU})
    pretend_gpu((7, 5))
    check_placement(nn.Sequential(), 8, {GPU})


@pytest.mark.parametrize(("into", "out"), [(96, 32), (64, 40)])
def test_widths_that_the_cpu_computes_wrongly_are_refused(into, out):
    layers = nn.Sequential(nn.Linear(64, 32), nn.Linear(into, out))
    message = (
        rf"^layer 1 turns {into} features into {out}, but 4 bit on the CPU needs a multiple of 64 and of 32; load 8 or "
        "16 bit, or use a GPU$"
    )
    with pytest.raises(ValueError, match=message):
        check_placement(layers, 4, {CPU})
    check_placement(layers, 8, {CPU})
    check_placement(layers, 4, {GPU, torch.device("cuda:1")})
    check_placement(layers[:1], 4, {CPU})


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": "mps"}, r"^4 bit is supported on CUDA and the CPU, not on mps"),
        ({"model": "cpu", "lm_head": "cuda:0"}, r"^4 bit can't be spread over GPU and CPU"),
        (
            {"model": "cpu", "": "disk"},
            r"^device_map leaves the model on disk; load 4 bit, or use more or larger GPUs$",
        ),
    ],
)
def test_device_maps_are_checked_before_tensors_are_read(repository, monkeypatch, device_map, message):
    monkeypatch.setattr(devices, "available_devices", lambda: ["cpu", "mps:0", "cuda:0"])
    path = str(repository / "playground/llava-tiny")
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(path, None, "llava-tiny", load_4bit=True, device_map=device_map)


def test_a_map_of_one_device_is_that_device(repository, embedded):
    path = str(repository / "playground/llava-tiny")
    device_map = {"model": "cpu", "lm_head": "cpu"}
    model = load_pretrained_model(path, None, "x", load_8bit=True, device_map=device_map, dtype="float32")[1]
    ids = torch.tensor([[1, 300, 301]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, embedded[8][1](input_ids=ids).logits)
