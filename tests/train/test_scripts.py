"""The scripts start the launcher with the right flags (a stub replaces it)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from llava.train.flags.command_line import parse_arguments

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launched(tmp_path):
    """Return the function (script, *flags, **variables) -> words that `deepspeed` was started with."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "deepspeed"
    stub.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    stub.chmod(0o755)

    def run(script, *flags, **variables):
        names = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **variables}
        environment = {key: value for key, value in os.environ.items() if key != "VAL_SHARE"} | names
        command = ["bash", str(ROOT / "scripts/v1_5" / script), *flags]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    return run


def parsed(words):
    start = next(place for place, word in enumerate(words) if word.endswith("train_mem.py"))
    flags = words[start + 1 :]
    place = flags.index("--deepspeed")
    return parse_arguments([*flags[:place], *flags[place + 2 :], "--use_cpu", "True", "--report_to", "none"])


@pytest.mark.parametrize("script", ["finetune_task_lora.sh", "finetune_task.sh"])
def test_validation_is_opt_in(launched, script):
    _, data, training = parsed(launched(script))
    assert (data.val_share, str(training.eval_strategy.value), training.save_steps) == (None, "no", 500)
    assert training.load_best_model_at_end is False
    _, data, training = parsed(launched(script, "--eval_max_questions", "50", VAL_SHARE="0.1", EVAL_STEPS="20"))
    assert (data.val_share, data.eval_max_questions) == (0.1, 50)
    assert (training.eval_strategy.value, training.eval_steps, training.save_steps) == ("steps", 20, 20)
    assert (training.load_best_model_at_end, training.metric_for_best_model) == (True, "eval_accuracy")


def test_machines_and_gpus(launched):
    assert launched("finetune_task.sh")[0] == "llava/train/train_mem.py"
    assert launched("finetune_task.sh", HOSTFILE="my hosts")[:2] == ["--hostfile", "my hosts"]
    assert launched("finetune_task.sh", GPUS="2")[:2] == ["--num_gpus", "2"]
