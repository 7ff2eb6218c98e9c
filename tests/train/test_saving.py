"""Saved parameters are restored bit for bit, and a directory is never left half written."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint.read_tensors import open_weights
from llava.model.checkpoint.write_tensors import write_weights
from llava.model.configuration import LlavaConfig
from llava.train.lora import add_lora, choose_trainable
from llava.train.saving import CheckpointMetadata, Saver, atomic_fill, gather_parameters

SETTINGS = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "training.json",
]
WEIGHTS = {
    "lora": ["adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"],
    "projector": ["mm_projector.bin"],
    "full": ["model.safetensors"],
}


@pytest.fixture(params=["lora", "projector", "full"])
def saver(request, goldens):
    kind = request.param
    path = str(goldens / "llava-v1.5-golden")
    tokenizer, model, processor, _ = load_pretrained_model(path, None, "x", device="cpu", dtype="float32")
    metadata = CheckpointMetadata(copy.deepcopy(model.config), tokenizer, processor, '{"flags": 1}\n')
    if kind == "lora":
        model = add_lora(model, rank=2, alpha=4, dropout=0.0, bias="none", base_name=path)
    choose_trainable(model, lora=kind == "lora", projector=True, backbone=kind == "full")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return Saver(model, metadata, kind, torch.float32)


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_saved_and_restored_bit_for_bit(saver, tmp_path):
    saver.save(saver.gather(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(WEIGHTS[saver.kind] + SETTINGS)
    assert (tmp_path / "training.json").read_text() == '{"flags": 1}\n'
    before = snapshot(saver.model)
    with torch.no_grad():
        for parameter in saver.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    saver.restore(tmp_path)
    assert all(torch.equal(parameter, before[name]) for name, parameter in saver.model.named_parameters())


def test_the_base_is_not_read_for_a_save(saver, tmp_path, monkeypatch):
    monkeypatch.setattr(LlavaConfig, "from_pretrained", lambda *_: pytest.fail("the base was read"))
    saver.save(saver.gather(), tmp_path)


def test_a_missing_parameter_is_named(saver, tmp_path):
    saver.save(saver.gather(), tmp_path)
    if saver.kind == "full":
        gone = "model.mm_projector.2.bias"
        write_weights(open_weights(tmp_path).renamed(lambda name: None if name == gone else name), tmp_path)
    else:
        name = "non_lora_trainables.bin" if saver.kind == "lora" else "mm_projector.bin"
        tensors = torch.load(tmp_path / name, weights_only=True)
        torch.save(
            {key: value for key, value in tensors.items() if not key.endswith("mm_projector.2.bias")}, tmp_path / name
        )
    message = r"lacks .*model.mm_projector.2.bias, which this run trains; start over in another --output_dir$"
    with pytest.raises(ValueError, match=message):
        saver.restore(tmp_path)


def test_gathered_are_copies(tiny_model):
    model = tiny_model()
    choose_trainable(model, lora=False, projector=True, backbone=False)
    state = gather_parameters(model, trainable_only=True)
    assert sorted(state) == [f"model.mm_projector.{leaf}" for leaf in ("0.bias", "0.weight", "2.bias", "2.weight")]
    before = state["model.mm_projector.0.bias"].clone()
    with torch.no_grad():
        model.model.mm_projector[0].bias.zero_()
    assert torch.equal(state["model.mm_projector.0.bias"], before)
    assert len(gather_parameters(model, trainable_only=False)) == len(list(model.parameters()))


@pytest.mark.parametrize("saver", ["lora"], indirect=True)
def test_adapter_files_are_pefts_and_the_originals(saver, tmp_path):
    saver.save(saver.gather(), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["inference_mode"]) == (2, 4, True)
    assert settings["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    others = torch.load(tmp_path / "non_lora_trainables.bin", weights_only=True)
    assert sorted(others) == [
        f"base_model.model.model.mm_projector.{leaf}" for leaf in ("0.bias", "0.weight", "2.bias", "2.weight")
    ]


def test_files_move_once_all_are_written(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "other.txt").write_text("stays")
    with atomic_fill(tmp_path) as hidden:
        (hidden / "a.txt").write_text("new")
        (hidden / "b.txt").write_text("b")
        assert (tmp_path / "a.txt").read_text() == "old"
        assert not (tmp_path / "b.txt").exists()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.txt": "new",
        "b.txt": "b",
        "other.txt": "stays",
    }


def test_weights_of_an_earlier_run_are_never_read_instead(tmp_path):
    """A single file goes before an index, so one that stayed would hide the shards just written."""
    for name in ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"):
        (tmp_path / name).write_text("old")
    with atomic_fill(tmp_path) as hidden:
        (hidden / "model.safetensors.index.json").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_model.safetensors",
        "model.safetensors.index.json",
    ]
    (tmp_path / "model.safetensors").write_text("base")
    with atomic_fill(tmp_path) as hidden:
        (hidden / "adapter_model.safetensors").write_text("an adapter")
    assert (tmp_path / "model.safetensors").read_text() == "base"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_directory_as_it_was(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(type(error)), atomic_fill(tmp_path) as hidden:
        (hidden / "a.txt").write_text("half")
        raise error
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}


def test_leftovers_of_a_killed_run_are_cleared(tmp_path):
    (tmp_path / "out" / ".writing").mkdir(parents=True)
    (tmp_path / "out" / ".writing" / "half.bin").write_text("x")
    with atomic_fill(tmp_path / "out") as hidden:
        (hidden / "a.txt").write_text("a")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.txt"]
