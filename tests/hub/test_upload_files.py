"""Which files go to the hub, and which directories are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.hub.upload_files import find_local_paths, refuse_incomplete, rename_base, select_files
from llava.model.checkpoint.read_tensors import open_weights
from llava.model.checkpoint.write_tensors import write_weights

LORA = "llava-v1.5-golden-task-lora"


@pytest.fixture
def adapter(goldens, tmp_path):
    return shutil.copytree(goldens / LORA, tmp_path / "adapter")


def test_nothing_but_the_model_is_uploaded(adapter):
    for name in (
        "training.json", "train_log.jsonl", "trainer_state.json", "training_args.bin", ".env", "id_rsa", "token",
        "answers.jsonl", "answers.jsonl.journal", "secret-config.json", "private.safetensors", "db.bin",
    ):  # fmt: skip
        (adapter / name).write_text("secret")
    (adapter / "checkpoint-5").mkdir()
    (adapter / "checkpoint-5/model.safetensors").write_text("state")
    for name in ("README.md", "LICENSE", "Notice", "loss.png"):
        (adapter / name).write_text("for people")
    files, left_out = select_files(adapter)
    model = ["adapter_config.json", "adapter_model.safetensors", "config.json", "non_lora_trainables.bin"]
    assert sorted(files) == sorted([*model, "LICENSE", "Notice", "README.md", "loss.png"])
    assert set(files) | set(left_out) == {f"{p.name}/" if p.is_dir() else p.name for p in adapter.iterdir()}
    assert left_out["training.json"] == "has paths of this machine; the card has its recipe"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "global_step4", "optimizer.bin"])
def test_a_checkpoint_to_resume_from_is_refused(adapter, name):
    (adapter / name).touch()
    with pytest.raises(ValueError, match=rf"is a checkpoint that training resumes from \(it holds {name}\); push"):
        refuse_incomplete(adapter)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("adapter_model.safetensors", "lacks adapter_model.safetensors or adapter_model.bin"),
        ("non_lora_trainables.bin", "which holds the projector trained with the adapter"),
    ],
)
def test_an_adapter_without_a_file_is_refused(adapter, missing, message):
    refuse_incomplete(adapter)
    (adapter / missing).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        refuse_incomplete(adapter)


def test_directories_that_hold_no_complete_model(goldens, tmp_path):
    refuse_incomplete(goldens / "llava-v1.5-golden")
    shutil.copytree(goldens / "llava-v1.5-golden", tmp_path / "blind", ignore=shutil.ignore_patterns("*.bin"))
    weights = open_weights(goldens / "llava-v1.5-golden")
    write_weights(weights.renamed(lambda name: None if "vision_tower" in name else name), tmp_path / "blind")
    with pytest.raises(ValueError, match=r"holds no vision tower; write a complete checkpoint with scripts/convert"):
        refuse_incomplete(tmp_path / "blind")
    shutil.rmtree(tmp_path / "blind")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; name the directory of a model"):
        refuse_incomplete(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no model"):
        refuse_incomplete(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"file is a file; name the directory of a model"):
        refuse_incomplete(tmp_path / "file")


def test_a_base_on_this_machine_is_seen_and_renamed(adapter, tmp_path):
    for name in ("config.json", "adapter_config.json"):
        settings = json.loads((adapter / name).read_text())
        (adapter / name).write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path)}))
    files, _ = select_files(adapter)
    assert find_local_paths(files) == [
        f"{name}: base_model_name_or_path {tmp_path}" for name in ("config.json", "adapter_config.json")
    ]
    renamed = rename_base(files, "liuhaotian/llava-v1.5-7b")
    assert find_local_paths({**files, **renamed}) == []
    for name, content in renamed.items():
        before = json.loads(Path(files[name]).read_text())
        assert json.loads(content) == {**before, "base_model_name_or_path": "liuhaotian/llava-v1.5-7b"}
