"""The plan prints needed and available memory, and the nearest setup that fits."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from llava.model import devices
from llava.model.plan import (
    CONTEXT_BYTES,
    Inference,
    Training,
    describe_plan,
    fitting_inference,
    fitting_training,
    main,
    plan_inference,
    plan_training,
)
from tests.model.test_memory import LLAVA_7B, LLAVA_TINY

GB = 10**9


def need(run):
    parts = plan_training(LLAVA_7B, run) if isinstance(run, Training) else plan_inference(LLAVA_7B, run)
    return sum(parts.values()) + CONTEXT_BYTES


def test_the_task_script_on_80_gb():
    assert describe_plan(LLAVA_7B, Training(), 80 * GB).splitlines() == [
        "  frozen weights                           14.1 GB",
        "  trained weights, gradients, optimizer     5.5 GB",
        "  activations                               7.8 GB",
        "  CUDA itself                               0.8 GB",
        "  needed on each GPU                       28.1 GB",
        "  available                                80.0 GB",
        "it fits",
    ]


def test_without_a_gpu_only_the_needed_memory_is_printed():
    assert describe_plan(LLAVA_7B, Inference(), None).splitlines()[-1].split() == [
        "needed", "on", "each", "GPU", "15.3", "GB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("run", "available", "flags"),
    [
        (Training(checkpointing=False), 40, "--per_device_train_batch_size 16 --gradient_accumulation_steps 1 "
         "--gradient_checkpointing True --deepspeed scripts/zero2.json"),
        (Training(), 24, "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 "
         "--gradient_checkpointing True --deepspeed scripts/zero2.json"),
        (Training(rank=16), 16, "--per_device_train_batch_size 16 --gradient_accumulation_steps 1 "
         "--gradient_checkpointing True --bits 4 --deepspeed scripts/zero2.json"),
        (Training(kind="full", gpus=8), 80, "--per_device_train_batch_size 16 --gradient_accumulation_steps 1 "
         "--gradient_checkpointing True --deepspeed scripts/zero2.json"),
        (Inference(batch=32), 24, "--batch-size 16"),
        (Inference(batch=32), 16, "--batch-size 2"),
        (Inference(), 12, "--batch-size 1 --load-8bit"),
        (Inference(), 8, "--batch-size 1 --load-4bit"),
    ],
)  # fmt: skip
def test_the_nearest_setup_that_fits(run, available, flags):
    fitting = fitting_training if isinstance(run, Training) else fitting_inference
    found = fitting(LLAVA_7B, run, available * GB)
    assert found.flags() == flags
    assert need(found) <= available * GB
    text = describe_plan(LLAVA_7B, run, available * GB)
    assert text.endswith("it fits" if found == run else f": {flags}")


@pytest.mark.parametrize("run", [Training(), Training(kind="full"), Inference()])
def test_nothing_fits(run):
    message = "it does not fit, nor does anything smaller on such a GPU; use a larger one"
    assert describe_plan(LLAVA_7B, run, 2 * GB).endswith(message)


def test_rows_a_step_stay_the_same():
    for rows in (16, 12, 7):
        found = fitting_training(LLAVA_7B, Training(batch=rows), 22 * GB)
        assert found.batch * found.accumulation >= rows
        assert found.batch * (found.accumulation - 1) < rows


@pytest.mark.parametrize("field", ["batch", "length", "rank"])
def test_more_needs_more(field):
    run = Training()
    assert need(dataclasses.replace(run, **{field: 2 * getattr(run, field)})) > need(run)


def test_what_is_partitioned_shrinks_with_gpus():
    one, four = (need(Training(kind="full", zero=3, gpus=gpus)) for gpus in (1, 4))
    assert one - four == pytest.approx(0.75 * 16 * (LLAVA_7B.llm_parameters + LLAVA_7B.projector_parameters), rel=0.02)


def test_the_program(capsys, tmp_path):
    words = ["--model-path", str(LLAVA_TINY), "--batch", "4", "--length", "99", "--lora-r", "8"]
    assert main([*words, "--gpu-memory", "4", "--json", str(tmp_path / "plan.json")]) == 0
    assert capsys.readouterr().out.startswith(f"training {LLAVA_TINY}\n  frozen weights  ")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["available"] == 4 * GB
    assert (written["setup"]["batch"], written["setup"]["rank"]) == (4, 8)
    assert sum(written["bytes"].values()) < 4 * GB
    assert main([*words, "--infer", "--gpu-memory", "0.5"]) == 1
    assert "it does not fit, nor does anything smaller" in capsys.readouterr().out


def test_free_memory_is_read_from_the_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "free_memory", lambda device: 7 * GB)
    assert main(["--model-path", str(LLAVA_TINY), "--infer"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].split() == ["available", "7.0", "GB"]


def test_the_weights_are_not_needed(goldens, copy_golden, change_config, tmp_path, capsys):
    directory = copy_golden("llava-v1.5-golden", tmp_path / "x")
    for path in directory.glob("pytorch_model*"):
        path.unlink()
    change_config(directory, mm_vision_tower="openai/clip-vit-large-patch14-336")
    assert main(["--model-path", str(directory)]) == 0
    assert "needed on each GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--batch", "0"], "--batch is 0; choose a positive number"), (["--kind", "x"], "invalid choice: 'x'")],
)
def test_wrong_usage(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main(["--model-path", str(LLAVA_TINY), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_model(capsys, tmp_path):
    assert main(["--model-path", str(tmp_path / "none")]) == 2
    assert "is neither a directory nor complete in the hub's cache" in capsys.readouterr().err
