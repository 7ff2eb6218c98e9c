"""`scripts/quantize_checkpoint.py`: complete checkpoints from full weights and from adapters, and refusals."""

from __future__ import annotations

import json
import sys

import peft
import pytest
import torch

from llava.export import quantize as program
from llava.inference.session import Session
from llava.model import devices
from llava.model.adapter.tensor_names import PEFT_PREFIX
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint.checkpoint import open_checkpoint, save_checkpoint
from llava.model.checkpoint.read_tensors import SAFETENSORS_DTYPES, open_weights
from llava.model.checkpoint.write_tensors import save_tensors
from llava.model.configuration import load_config

pytest.importorskip("bitsandbytes")

BITS = [4, 8]
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer_config.json",
]
NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def root(request):
    return request.config.rootpath


@pytest.fixture(scope="module")
def base(root):
    return root / "playground/llava-tiny"


@pytest.fixture(scope="module")
def run():
    def call(source, target, bits=4, *flags):
        words = ["--model-path", source, "--save-path", target, "--bits", bits, "--device", "cpu", *flags]
        return program.main([str(word) for word in words])

    return call


@pytest.fixture(scope="module")
def quantised(run, base, tmp_path_factory):
    """Directories by bits."""
    found = {bits: tmp_path_factory.mktemp("quantised") / f"{bits}-bit" for bits in BITS}
    for bits, target in found.items():
        assert run(base, target, bits) == 0
    return found


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    """An adapter on the base's `q_proj` and `up_proj`, with a projector of its own."""
    directory = tmp_path_factory.mktemp("lora")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    settings.base_model_name_or_path = str(base)
    settings.save_pretrained(directory)
    generator, adapter, projector = torch.Generator().manual_seed(0), {}, {}
    for name, tensor in open_weights(base).items():
        module = PEFT_PREFIX + name.removesuffix(".weight")
        if name.startswith("model.layers.") and module.endswith(("q_proj", "up_proj")):
            adapter[f"{module}.lora_A.weight"] = 0.1 * torch.randn(4, tensor.shape[1], generator=generator)
            adapter[f"{module}.lora_B.weight"] = 0.1 * torch.randn(tensor.shape[0], 4, generator=generator)
        elif "mm_projector" in name:
            projector[PEFT_PREFIX + name] = tensor + 0.01
    save_tensors(adapter, directory / "adapter_model.safetensors")
    save_tensors(projector, directory / "non_lora_trainables.bin")
    (directory / "config.json").write_bytes((base / "config.json").read_bytes())
    return directory


@pytest.mark.parametrize("bits", BITS)
def test_the_directory_is_complete(quantised, base, bits):
    assert sorted(path.name for path in quantised[bits].iterdir()) == FILES
    before, after = load_config(base).to_dict(), load_config(quantised[bits]).to_dict()
    settings = after.pop("quantization_config")
    assert settings["quant_method"] == "bitsandbytes"
    assert (settings["load_in_4bit"], settings["load_in_8bit"]) == (bits == 4, bits == 8)
    assert settings["bnb_4bit_compute_dtype"] == "float16"
    assert after == before


def test_it_is_a_fraction_of_the_size(quantised, base):
    def block_bytes(directory):
        entries = open_weights(directory).entries
        return sum(entry.nbytes for name, entry in entries.items() if "proj" in name and ".layers." in name)

    llm = block_bytes(base)
    sizes = {bits: block_bytes(quantised[bits]) for bits in BITS}
    assert 0.25 < sizes[4] / llm < 0.4  # at these widths the tables of levels weigh something
    assert 0.5 < sizes[8] / llm < 0.65


@pytest.mark.parametrize("bits", BITS)
def test_every_tensor_lies_aligned_in_the_file(quantised, bits):
    content = (quantised[bits] / "model.safetensors").read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:stop])
    header.pop("__metadata__")
    for name, entry in header.items():
        assert (stop + entry["data_offsets"][0]) % SAFETENSORS_DTYPES[entry["dtype"]].itemsize == 0, name


@pytest.mark.parametrize("bits", BITS)
def test_it_answers_without_a_flag_as_if_quantised_while_loading(quantised, base, bits):
    sessions = [
        Session.load(str(quantised[bits]), device="cpu", dtype="float16"),
        Session.load(str(base), bits=bits, device="cpu", dtype="float16"),
    ]
    ids = torch.tensor([[1, -200, 300, 301, 302, 5]])
    pixels = torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():
        found, expected = (session.model(input_ids=ids, images=pixels).logits for session in sessions)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", BITS)
def test_an_adapter_is_merged_before(run, lora, base, tmp_path, bits):
    checkpoint = open_checkpoint(lora, base)
    (tmp_path / "merged").mkdir()
    parts = (checkpoint.config, checkpoint.tokenizer, checkpoint.image_processor)
    save_checkpoint(checkpoint.tensors, *parts, tmp_path / "merged")
    assert run(tmp_path / "merged", tmp_path / "expected", bits) == 0
    assert run(lora, tmp_path / "found", bits, "--model-base", base) == 0
    expected, found = open_weights(tmp_path / "expected"), open_weights(tmp_path / "found")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not torch.equal(found[NAME], open_weights_of(run, base, tmp_path / "plain", bits)[NAME])
    loaded = load_pretrained_model(
        str(lora), str(base), "lora", device="cpu", dtype="float16", **{f"load_{bits}bit": True}
    )
    weights = loaded[1].state_dict()
    blocks = [name for name in found if name.startswith("model.layers.")]
    assert all(torch.equal(weights[name], found[name]) for name in blocks if not name.endswith("__nf4"))
    assert len(blocks) > 5 * 9


def open_weights_of(run, source, target, bits):
    assert run(source, target, bits) == 0
    return open_weights(target)


def test_weights_in_fp32_are_narrowed_to_bf16_by_default(run, goldens, tmp_path):
    source = goldens / "llava-v1.5-golden"
    assert run(source, tmp_path / "default", 4) == 0
    assert run(source, tmp_path / "chosen", 4, "--dtype", "float16") == 0
    for name, dtype in (("default", torch.bfloat16), ("chosen", torch.float16)):
        assert open_weights(tmp_path / name)["lm_head.weight"].dtype is dtype
        settings = json.loads((tmp_path / name / "config.json").read_text())
        assert settings["torch_dtype"] == settings["quantization_config"]["bnb_4bit_compute_dtype"]
        assert settings["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_the_note_on_qlora(run, lora, base, tmp_path, capsys):
    settings = json.loads((lora / "config.json").read_text())
    (tmp_path / "qlora").mkdir()
    for path in lora.iterdir():
        (tmp_path / "qlora" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "qlora/config.json").write_text(json.dumps({**settings, "base_model_bits": 4}))
    assert run(tmp_path / "qlora", tmp_path / "out", 4, "--model-base", base) == 0
    assert "the adapter was trained on its base held in 4 bit" in capsys.readouterr().out


def failure(capsys, code):
    assert code == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_quantising_twice_is_refused(run, quantised, tmp_path, capsys):
    message = failure(capsys, run(quantised[4], tmp_path / "out", 8))
    assert message == (
        f"error: {quantised[4]} holds quantised weights, which load for inference but can't be quantised again; give "
        "the directory of the 16-bit weights they were made from"
    )


def test_a_directory_is_replaced_only_when_asked(run, base, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert "already holds files" in failure(capsys, run(base, tmp_path / "out"))
    assert (tmp_path / "out/mine.txt").exists()
    assert run(base, tmp_path / "out", 4, "--overwrite") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


def test_after_damaged_weights_nothing_is_left(run, base, tmp_path, capsys):
    source = tmp_path / "damaged"
    source.mkdir()
    for path in base.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor.clone() for name, tensor in open_weights(base).items()}
    tensors[NAME][0, 0] = torch.nan
    save_tensors(tensors, source / "model.safetensors")
    message = failure(capsys, run(source, tmp_path / "out"))
    assert message.startswith(f"error: {NAME} in {source / 'model.safetensors'} holds NaN or infinity")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_devices_without_kernels_are_refused(base, tmp_path, capsys):
    words = ["--model-path", str(base), "--save-path", str(tmp_path / "out"), "--bits", "4", "--device", "mps"]
    message = failure(capsys, program.main(words))
    assert message == "error: --device mps: quantising is supported on cuda and cpu"


def test_the_best_device_that_has_kernels_is_the_default(monkeypatch):
    monkeypatch.setattr(devices, "best_device", lambda: torch.device("mps"))
    assert program.choose_device(None) == torch.device("cpu")
    monkeypatch.setattr(devices, "best_device", lambda: torch.device("cuda"))
    assert program.choose_device(None) == torch.device("cuda")


def test_without_bitsandbytes_the_extra_is_named(run, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert failure(capsys, run(base, tmp_path / "out")).startswith("error: 4 and 8 bit need bitsandbytes")
    assert not (tmp_path / "out").exists()
