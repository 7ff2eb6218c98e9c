"""The scripts that users run, as they stand and one after the other, through `benchmarks/end_to_end.sh`."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch


@pytest.fixture
def steps_of(request, tmp_path):
    """Return the function (steps, **variables) -> {step: (verdict, outcome)} that runs the benchmark in `tmp_path`."""

    def run(steps, **variables):
        names = {"WORK": str(tmp_path / "work"), "STEPS": steps, "PORT": "any", **variables}
        command = ["bash", "benchmarks/end_to_end.sh", str(tmp_path / "results")]
        done = subprocess.run(
            command, cwd=request.config.rootpath, env={**os.environ, **names}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / "results/steps.tsv").read_text().splitlines()
        return {name: (verdict, outcome) for name, verdict, _, _, outcome in (line.split("\t") for line in lines)}

    return run


@pytest.mark.slow
def test_small_model_on_the_cpu(steps_of, tmp_path):
    """Also: stopped by SIGTERM and resumed, the losses are those of the run that was never stopped."""
    steps = "data task_lora interrupted resumed merge answers"
    found = steps_of(steps, MODEL="playground/llava-tiny", IMAGES="6", MAX_STEPS="24")
    assert {name: verdict for name, (verdict, _) in found.items()} == dict.fromkeys(steps.split(), "ok")
    losses = found["task_lora"][1].removeprefix("loss ").split()
    assert len(losses) == 24
    stopped = found["interrupted"][1].removeprefix("loss ").split()
    assert 2 <= len(stopped) < 24 and stopped == losses[: len(stopped)]
    assert found["resumed"][1] == found["task_lora"][1]
    answers = [json.loads(line) for line in (tmp_path / "work/answers.jsonl").read_text().splitlines()]
    assert [answer["question_id"] for answer in answers] == [
        10 * image + place for image in range(6) for place in range(4)
    ]
    assert [answer["metadata"] for answer in answers] == [{}] * 24


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_true_sizes_on_a_gpu(steps_of):
    """LLaVA-1.5-7B with random weights: every script but those that need several GPUs, with the scripts' own flags."""
    found = steps_of(
        "data base pretrain lora drop_base weights task_lora no_checkpointing checkpointing_all trained_tower 4bit "
        "interrupted resumed merge answers question chat chat_4bit"
    )
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    for name in ("task_lora", "no_checkpointing", "checkpointing_all", "trained_tower", "4bit", "resumed"):
        losses = [float(loss) for loss in found[name][1].removeprefix("loss ").split()]
        assert losses[-1] < 0.5 * losses[0], (name, losses)
