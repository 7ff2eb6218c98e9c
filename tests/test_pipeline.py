"""The real scripts with the real DeepSpeed launcher on the CPU, started elsewhere, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from llava.eval.run_llava import eval_model
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.train.fault_tolerance.checkpoint_dir import newest_valid, verify

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests/data/goldens"
BASE = GOLDENS / "llava-v1.5-golden"
SETTINGS = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "training.json",
]
LORA_FILES = sorted(["adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin", *SETTINGS])
RUN_FILES = ["README.md", "loss.png", "train_log.jsonl", "trainer_state.json"]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_script(name: str, cwd: Path, *flags: str, **variables: object) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "CUDA_"))}
    environment |= {name: str(value) for name, value in variables.items()}
    environment |= {"OMP_NUM_THREADS": "1", "PORT": free_port()}
    return subprocess.run(
        ["bash", str(ROOT / name), *flags], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows about eight images, then six rows of text alone: with groups by modality some batches have no image."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").symlink_to(GOLDENS / "images")
    images = sorted(path.name for path in (GOLDENS / "images").iterdir())
    rows = [
        {
            "id": index,
            "image": images[index % 8],
            "conversations": turns(f"<image>\nWhich is {index}?", f"it is {index}"),
        }
        for index in range(10)
    ] + [{"id": 100 + index, "conversations": turns(f"Say {index}.", str(index))} for index in range(6)]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    questions = [
        {"question_id": index, "image": image, "text": f"Which is {index}?"} for index, image in enumerate(images)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    return folder


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


SHORT = (
    "--lora_r", "4", "--lora_alpha", "8", "--mm_projector_lr", "1e-2", "--learning_rate", "1e-2", "--lora_dropout", "0",
    "--per_device_train_batch_size", "2", "--save_steps", "2", "--model_max_length", "256", "--report_to", "none",
    "--dataloader_num_workers", "0",
)  # fmt: skip


def losses(out: Path) -> list[float]:
    lines = (out / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.fixture(scope="session")
def lora_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of the task script with two processes."""
    folder = tmp_path_factory.mktemp("lora")
    done = run_script(
        "scripts/v1_5/finetune_task_lora.sh", folder, *SHORT, BASE_MODEL=BASE, DATA=data, OUT=folder / "out", GPUS="2"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[[it is 0</s>]]" in done.stdout
    assert "trainable parameters" in done.stdout
    return folder / "out"


def test_task_lora(lora_run: Path) -> None:
    found = losses(lora_run)
    assert len(found) == 4
    assert found[-1] < found[0]
    assert files(lora_run) == sorted([*LORA_FILES, *RUN_FILES])
    checkpoints = sorted(path.name for path in lora_run.iterdir() if path.is_dir())
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    assert set(LORA_FILES) <= set(files(lora_run / checkpoints[0]))
    for directory in (lora_run, lora_run / checkpoints[0]):
        _, model, _, _ = load_pretrained_model(str(directory), str(BASE), "any name", device="cpu")
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_an_unfinished_run_of_the_original_opens(lora_run: Path, tmp_path: Path) -> None:
    """There the projector is in DeepSpeed's states alone, and `config.json` comes with the finished run."""
    run, left = lora_run, tmp_path / "checkpoint-2"
    ours = ("config.json", "non_lora_trainables.bin", "training.json", "tokenizer.model", "preprocessor_config.json")
    shutil.copytree(run / "checkpoint-2", left, ignore=shutil.ignore_patterns(*ours))
    assert list(left.glob("global_step2/mp_rank_00_model_states.pt"))
    expected = open_checkpoint(run / "checkpoint-2", BASE)
    found = open_checkpoint(left, BASE)
    assert sorted(found.tensors) == sorted(expected.tensors)
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in found.tensors)
    assert found.image_processor.to_dict() == expected.image_processor.to_dict()
    with pytest.raises(FileNotFoundError, match="lacks non_lora_trainables"):  # ZeRO-3 keeps parts in many files
        shutil.rmtree(left / "global_step2")
        open_checkpoint(left, BASE)


def test_from_training_to_answers(lora_run: Path, data: Path, tmp_path: Path) -> None:
    out, merged = lora_run, tmp_path / "merged"
    command = ["python", str(ROOT / "scripts/merge_lora_weights.py"), "--model-path", str(out)]
    merge = subprocess.run(
        [*command, "--save-model-path", str(merged)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert merge.returncode == 0, merge.stderr
    assert "equal greedy answers 100 %" in merge.stdout
    assert files(merged) == sorted(["README.md", "loss.png", "model.safetensors", *SETTINGS])

    inference = run_script(
        "inference.sh", tmp_path, "--max_new_tokens", "5", "--device", "cpu", MODEL=merged, DATA=data
    )
    assert inference.returncode == 0, inference.stderr
    answers = (data / "finetuned_llava_answers.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in answers.splitlines()]
    assert [record["question_id"] for record in records] == list(range(8))

    args = type("Args", (), {
        "model_path": str(merged), "model_base": None, "model_name": "merged", "query": "Which is 0?",
        "conv_mode": None, "image_file": str(data / "images/alpha.png"), "sep": ",", "temperature": 0, "top_p": None,
        "num_beams": 1, "max_new_tokens": 5,
    })()  # fmt: skip
    assert eval_model(args) == records[0]["text"]


def test_full_finetuning_writes_a_released_layout(data: Path, tmp_path: Path) -> None:
    flags = [flag for pair in zip(SHORT[::2], SHORT[1::2], strict=True) if "lora" not in pair[0] for flag in pair]
    done = run_script(
        "scripts/v1_5/finetune_task.sh", tmp_path, *flags, "--max_steps", "2", "--save_strategy", "no",
        BASE_MODEL=BASE, DATA=data, OUT=tmp_path / "out", ZERO="scripts/zero3.json", GPUS="2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "terminate called" not in done.stderr  # ZeRO-3 aborts where the process group is left open
    assert files(tmp_path / "out") == sorted(["model.safetensors", *SETTINGS, *RUN_FILES])
    _, before, _, _ = load_pretrained_model(str(BASE), None, "base", device="cpu")
    _, after, _, _ = load_pretrained_model(str(tmp_path / "out"), None, "out", device="cpu")
    changed = {
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    learning = {name for name, _ in before.named_parameters() if "vision_tower" not in name}
    assert changed == learning


def test_pretraining_then_visual_instruction_tuning(data: Path, tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    _, model, _, _ = load_pretrained_model(str(BASE), None, "base", device="cpu")
    write_llm_alone(model, llm)
    rows = [row for row in json.loads((data / "data.json").read_text(encoding="utf-8")) if "image" in row]
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps(rows), encoding="utf-8")
    flags = ["--per_device_train_batch_size", "2", "--max_steps", "2", "--report_to", "none",
             "--model_max_length", "256", "--dataloader_num_workers", "0"]  # fmt: skip
    tower = GOLDENS / "clip-vit-tiny-patch14-56"
    pretrained = run_script(
        "scripts/v1_5/pretrain.sh", tmp_path, *flags,
        BASE_MODEL=llm, VISION_TOWER=tower, DATA=data, DATA_FILE=captions, OUT=tmp_path / "projector", GPUS="1",
    )  # fmt: skip
    assert pretrained.returncode == 0, pretrained.stdout + pretrained.stderr
    assert files(tmp_path / "projector") == sorted(["mm_projector.bin", *SETTINGS, *RUN_FILES])
    load_pretrained_model(str(tmp_path / "projector"), str(llm), "projector", device="cpu", vision_tower=str(tower))

    (tmp_path / "both").mkdir()
    tuned = run_script(
        "scripts/v1_5/finetune_lora.sh", tmp_path, *flags, "--lora_r", "4", "--version", "v1",
        BASE_MODEL=llm, VISION_TOWER=tower, DATA=data / "images", DATA_FILE=captions, GPUS="1",
        PROJECTOR=tmp_path / "projector/mm_projector.bin", OUT=tmp_path / "lora", ZERO="scripts/zero2.json",
    )  # fmt: skip
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    assert files(tmp_path / "lora") == sorted([*LORA_FILES, *RUN_FILES])


def write_llm_alone(model: torch.nn.Module, directory: Path) -> None:
    """Write a directory such as Vicuna's: Llama's weights, config and tokenizer, nothing of images."""
    directory.mkdir()
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(("model.vision", "model.mm_"))
    }
    torch.save(state, directory / "pytorch_model.bin")
    config = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if not key.startswith(("mm_", "image_"))} | {
        "model_type": "llama"
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).write_bytes((BASE / name).read_bytes())


def test_a_signal_to_the_script_ends_it_saved(data: Path, tmp_path: Path) -> None:
    """As a scheduler does, which knows the shell alone; two processes under DeepSpeed's launcher."""
    out = tmp_path / "out"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "CUDA_"))}
    environment |= {"BASE_MODEL": str(BASE), "DATA": str(data), "OUT": str(out), "GPUS": "2", "OMP_NUM_THREADS": "1"}
    environment["PORT"] = free_port()
    command = ["bash", str(ROOT / "scripts/v1_5/finetune_task_lora.sh"), *SHORT, "--num_train_epochs", "500"]
    with (tmp_path / "errors").open("w") as errors:
        script = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=errors, stderr=errors, start_new_session=True
        )
        try:
            while script.poll() is None and not (out / "checkpoint-2").exists():
                time.sleep(0.1)
            script.terminate()
            code = script.wait(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
    text = (tmp_path / "errors").read_text(encoding="utf-8")
    assert code == 143, text
    (message,) = (line for line in text.splitlines() if line.startswith("stopped by SIGTERM after step "))
    step = int(message.split()[5].rstrip(";"))
    assert f"{out}/checkpoint-{step} is saved; run the same command again to go on" in message
    assert verify(out / f"checkpoint-{step}")
    assert newest_valid(out) == out / f"checkpoint-{step}"
    assert len(losses(out)) == step
