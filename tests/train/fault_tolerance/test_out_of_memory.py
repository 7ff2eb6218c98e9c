"""Running out of memory ends a training in one message; its checkpoints are intact."""

from __future__ import annotations

import os
import re

import pytest
import torch

from llava.train.fault_tolerance.checkpoint_dir import verify
from llava.train.fault_tolerance.out_of_memory import OutOfMemory, is_out_of_memory
from llava.train.trainer import LlavaTrainer

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB."
ERRORS = {
    "allocator": torch.OutOfMemoryError(CUDA),
    "runtime": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported."),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
}
FLAGS = ["--lora_enable", "True", "--lora_r", "2", "--lora_dropout", "0.1", "--per_device_train_batch_size", "2"]
FLAGS += ["--num_train_epochs", "1", "--save_strategy", "steps", "--save_steps", "2"]


def rows(count=12):
    return [
        {
            "id": str(index),
            "image": "landscape.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\nQuestion {index}?"},
                {"from": "gpt", "value": "red"},
            ],
        }
        for index in range(count)
    ]


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_what_says_that_memory_ran_out(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("a shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))
    wrapped = RuntimeError("the compiler failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)
    assert issubclass(OutOfMemory, RuntimeError)


@pytest.fixture
def fail_at(monkeypatch):
    """Return the function (step, error, place) -> None: training raises the error in that step."""

    def install(step, error, place="training_step"):
        original = getattr(LlavaTrainer, place)

        def fail(self, *args, **kwargs):
            if self.state.global_step == step - 1:
                raise type(error)(*error.args)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(LlavaTrainer, place, fail)

    return install


@pytest.mark.parametrize("place", ["training_step", "_get_grad_norm"])
@pytest.mark.parametrize("kind", ERRORS)
def test_one_message_and_exit_code_1(train_tiny, fail_at, tmp_path, capfd, kind, place):
    fail_at(4, ERRORS[kind], place)
    assert train_tiny(tmp_path / "out", rows(), *FLAGS) == 1
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: out of memory, process 0 on cpu: ")
    assert re.search(r"; estimated were [\d.]+ [KMG]B on each GPU; pass --per_device_train_batch_size 2 ", line)
    assert "--gradient_checkpointing True" in line
    assert line.endswith(
        f"{tmp_path}/out/checkpoint-2 is intact, and the same command with these flags resumes from it"
    )


def test_without_a_checkpoint(train_tiny, fail_at, tmp_path, capfd):
    fail_at(1, ERRORS["allocator"])
    assert train_tiny(tmp_path / "out", rows(), *FLAGS) == 1
    assert capfd.readouterr().err.rstrip().endswith("; no checkpoint was written yet")


def test_the_weights_do_not_fit(train_tiny, monkeypatch, tmp_path, capfd):
    def fail(*args):
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr("llava.train.recipe.load_model", fail)
    assert train_tiny(tmp_path / "out", rows(), *FLAGS) == 1
    assert "out of memory, process 0 on cpu: CUDA out of memory; estimated were" in capfd.readouterr().err


def test_the_last_checkpoint_is_intact_and_is_resumed_from(train_tiny, monkeypatch, fail_at, tmp_path):
    assert train_tiny(tmp_path / "whole", rows(), *FLAGS) == 0
    fail_at(4, ERRORS["allocator"])
    assert train_tiny(tmp_path / "out", rows(), *FLAGS) == 1
    assert verify(tmp_path / "out/checkpoint-2")
    monkeypatch.undo()
    assert train_tiny(tmp_path / "out", rows(), *FLAGS) == 0
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == two


def test_other_errors_keep_their_traceback(train_tiny, fail_at, tmp_path):
    fail_at(2, RuntimeError("a shape mismatch"))
    with pytest.raises(RuntimeError, match=r"^a shape mismatch$"):
        train_tiny(tmp_path / "out", rows(), *FLAGS)


@pytest.mark.parametrize("rank", [0, 1])
def test_any_rank_ends_all_of_them(train_forked, tmp_path, rank):
    def before():
        original = LlavaTrainer.training_step

        def fail(self, *args, **kwargs):
            if self.state.global_step == 3 and int(os.environ["RANK"]) == rank:
                raise torch.OutOfMemoryError(CUDA)
            return original(self, *args, **kwargs)

        LlavaTrainer.training_step = fail

    output = train_forked("out", rows(24), *FLAGS, before=before, code=1)
    logs = {number: (tmp_path / f"out.{number}.log").read_text() for number in (0, 1)}
    assert "Traceback" not in "".join(logs.values())
    assert f"error: out of memory, process {rank} on cpu: CUDA out of memory; " in logs[rank]
    assert f"error: process {1 - rank} lost another one, whose message says why" in logs[1 - rank]
    assert verify(output / "checkpoint-2")
