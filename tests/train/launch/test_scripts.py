"""The scripts start the launcher with the right flags (a stub replaces it)."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.train.flags.command_line import parse_arguments

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts/v1_5").glob("*.sh") if path.name != "launch.sh")


def parsed(words):
    start = next(place for place, word in enumerate(words) if word.endswith("train_mem.py"))
    flags = words[start + 1 :]
    place = flags.index("--deepspeed") if "--deepspeed" in flags else len(flags)
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
    assert launched("finetune_task.sh")[:2] == ["deepspeed", "llava/train/train_mem.py"]
    assert launched("finetune_task.sh", HOSTFILE="my hosts")[1:3] == ["--hostfile", "my hosts"]
    assert launched("finetune_task.sh", GPUS="2")[1:3] == ["--num_gpus", "2"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_deepspeed_one_process_is_plain_python(launched, script):
    words = launched(script, launchers=(), GPUS="1")
    assert words[:2] == ["python", "llava/train/train_mem.py"]
    (line,) = launched.error.splitlines()
    assert line.startswith("launcher: python, one process (deepspeed is not on the PATH); nothing is lost")
    assert parsed(words)[2].deepspeed is None


def test_without_deepspeed_several_gpus_are_torchruns(launched):
    words = launched("finetune_task_lora.sh", launchers=("torchrun",), GPUS="2")
    assert words[:5] == ["torchrun", "--nproc_per_node", "2", "--standalone", "llava/train/train_mem.py"]
    assert "ZeRO-2 is lost" in launched.error
    parsed(words)


@pytest.mark.parametrize("script", ["finetune.sh", "finetune_lora.sh", "finetune_task.sh"])
def test_without_deepspeed_sharded_weights_are_refused(launched, script):
    """Their default is ZeRO-3; with FSDP, which the message offers, they start."""
    assert launched(script, launchers=("torchrun",), GPUS="2") == 1
    (line,) = launched.error.splitlines()
    assert line.startswith(
        "error: ZERO=scripts/zero3.json shards the weights over 2 GPUs with DeepSpeed, and deepspeed is"
    )
    assert launched(script, "--fsdp", launchers=("torchrun",), GPUS="2")[0] == "torchrun"


def test_launcher_overrides(launched):
    both = ("deepspeed", "torchrun")
    assert launched("pretrain.sh", launchers=both, LAUNCHER="torchrun", GPUS="2")[0] == "torchrun"
    assert launched("pretrain.sh", launchers=both, LAUNCHER="python")[0] == "python"
    assert launched("pretrain.sh", launchers=both, LAUNCHER="deepspeed")[0] == "deepspeed"
    assert launched("pretrain.sh", launchers=("torchrun",), LAUNCHER="deepspeed") == 1
    assert "not on the PATH; run pip install" in launched.error
