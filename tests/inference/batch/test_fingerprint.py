"""A checkpoint's fingerprint is its content, wherever it is, and no tensor's values are left out."""

import json
import os
import shutil

import pytest
import torch

from llava.inference.batch.fingerprint import ModelSources, checkpoint_fingerprint, is_same_run_value
from llava.model.checkpoint.read_tensors import open_weights
from llava.model.checkpoint.write_tensors import save_tensors


def test_a_copy_is_the_same_and_any_change_is_not(goldens, tmp_path):
    source = goldens / "llava-v1.5-golden"
    fingerprint = checkpoint_fingerprint(source)
    copy = shutil.copytree(source, tmp_path / "copy")
    os.utime(copy / "config.json", (0, 0))
    assert checkpoint_fingerprint(copy) == fingerprint
    (copy / "notes.txt").write_text("not part of the model")
    assert checkpoint_fingerprint(copy) == fingerprint
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert checkpoint_fingerprint(copy) != fingerprint


def test_large_files_are_sampled_up_to_their_end(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1_000_000))
    before = checkpoint_fingerprint(tmp_path)
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    assert checkpoint_fingerprint(tmp_path) != before


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_small_tensor_between_large_ones_is_seen(tmp_path, name):
    """64 stretches of 4 KB over the file fall beside the projector, which is 0.1 % of it."""
    tensors = {f"model.layers.{index}.weight": torch.zeros(2_000_000) for index in range(2)}
    tensors |= {f"model.mm_projector.{index}.weight": torch.zeros(4_000) for index in range(2)}
    path = tmp_path / name

    def write():
        torch.save(tensors, path) if path.suffix == ".bin" else save_tensors(tensors, path)
        return checkpoint_fingerprint(tmp_path)

    before = write()
    tensors["model.mm_projector.0.weight"] = torch.ones(4_000)
    after = write()
    assert before != after
    assert write() == after
    if path.suffix == ".safetensors":
        assert before.split("-")[0] == after.split("-")[0]  # what earlier versions recorded has not seen it


def test_every_tensor_of_a_model_is_seen(goldens, tmp_path):
    golden = open_weights(goldens / "llava-v1.5-golden")
    tensors = {name: tensor[:100].clone() for name, tensor in golden.items()}  # short vocabularies, to write little
    seen = set()
    for name in tensors:
        changed = {**tensors, name: tensors[name] + 1}
        save_tensors(changed, tmp_path / "model.safetensors")
        seen.add(checkpoint_fingerprint(tmp_path))
    assert len(seen) == len(tensors)


def test_files_that_hold_no_tensors_count_whole(tmp_path):
    path = tmp_path / "training_args.bin"
    path.write_bytes(bytes(1_000_000))
    before = checkpoint_fingerprint(tmp_path)
    path.write_bytes(bytes(300_001) + b"x" + bytes(699_998))
    assert checkpoint_fingerprint(tmp_path) != before


def test_what_a_model_is_made_of(goldens):
    adapter, base, tower = (
        goldens / name for name in ("llava-v1.5-golden-task-lora", "llava-v1.5-golden", "clip-vit-tiny-patch14-56")
    )
    assert ModelSources.find(str(adapter), str(base)) == (adapter, base, tower)
    assert ModelSources.find(str(base)) == (base, None, tower)
    assert ModelSources.find(str(base), vision_tower=str(adapter)).vision_tower == adapter


def test_a_recorded_base_counts_without_a_flag(goldens, tmp_path):
    base = shutil.copytree(goldens / "llava-v1.5-golden", tmp_path / "base")
    adapter = shutil.copytree(goldens / "llava-v1.5-golden-task-lora", tmp_path / "adapter")
    config = adapter / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(base)}))
    before, stamps = (sources := ModelSources.find(str(adapter))).fingerprints(), sources.stamps()
    assert before == {
        "model": checkpoint_fingerprint(adapter),
        "model_base": checkpoint_fingerprint(base),
        "vision_tower": None,
    }
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    after = ModelSources.find(str(adapter))
    assert after.fingerprints()["model_base"] != before["model_base"]
    assert after.stamps() != stamps


def test_what_earlier_versions_recorded_is_compared_with_what_they_computed(goldens):
    found = checkpoint_fingerprint(goldens / "llava-v1.5-golden")
    former = "8ba6e0900a5b459c09c61736ef91f6b5"
    assert found.split("-")[0] == former
    assert is_same_run_value("model", former, found)
    assert is_same_run_value("model_base", None, found)  # the recorded base was not looked at
    assert not is_same_run_value("model", former[::-1], found)
    assert not is_same_run_value("model", found.replace(found[-8:], "0" * 8), found)
    assert not is_same_run_value("model", 5, found)
    assert not is_same_run_value("conv_mode", None, "vicuna_v1")
