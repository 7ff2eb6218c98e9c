"""`llava train`: the recipe of `scripts/v1_5/finetune_task_lora.sh`, with the same variables, flags and launchers.

A test holds both to the same command. The script stays, to be read and changed; this works without a checkout.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava.train.launch.__main__ import launch

_DEFAULTS = {
    "BASE_MODEL": "liuhaotian/llava-v1.5-7b",
    "DATA": "playground/data_train",
    "OUT": "checkpoints/llava-v1.5-7b-task-lora",
    "ZERO": "scripts/zero2.json",
}
_EVAL_STEPS = "500"
VARIABLES = f"""
variables, as of scripts/v1_5/finetune_task_lora.sh (BASE_MODEL=... llava train):
  BASE_MODEL            directory or hub id (default: {_DEFAULTS["BASE_MODEL"]})
  DATA                  folder with data.json and images/ (default: {_DEFAULTS["DATA"]})
  OUT                   directory to write (default: {_DEFAULTS["OUT"]})
  GPUS                  number of GPUs (default: all)
  VAL_SHARE             share of the images to validate on, such as 0.02 (default: none); the checkpoint with the
                        best accuracy is what is left at the end
  EVAL_STEPS            steps from one validation to the next (default: {_EVAL_STEPS})
  ZERO                  DeepSpeed config, or none (default: {_DEFAULTS["ZERO"]})
  LAUNCHER              deepspeed, torchrun or python (default: what is installed and needed)
  HOSTFILE, PORT        machines, and the port by which they find each other: docs/multi_gpu.md"""


def main(argv: Sequence[str] | None = None) -> int:
    """Start the training that variables and flags ask for; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    environment = task_environment(os.environ)
    try:
        return launch([*task_flags(environment), *words], environment)
    finally:
        if "--help" in words or "-h" in words:
            print(VARIABLES)


def task_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with the recipe's defaults for what is not set in it.

    The folders of this Python's programs come first on the PATH: without an activated environment its launchers are
    found there alone.
    """
    folders = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent), environment.get("PATH") or os.defpath]
    defaults = {name: environment.get(name) or default for name, default in _DEFAULTS.items()}
    return {**environment, **defaults, "PATH": os.pathsep.join(dict.fromkeys(folders))}


def task_flags(environment: Mapping[str, str]) -> list[str]:
    """Return the recipe's own flags, before those of the command line.

    Args:
        environment: BASE_MODEL, DATA, OUT, and VAL_SHARE and EVAL_STEPS to validate.
    """
    data, share = environment["DATA"], environment.get("VAL_SHARE")
    flags = [
        *("--model_name_or_path", environment["BASE_MODEL"], "--version", "v1"),
        *("--data_path", f"{data}/data.json", "--image_folder", f"{data}/images", "--image_aspect_ratio", "pad"),
        *("--output_dir", environment["OUT"], "--save_steps", "500"),
        *("--lora_enable", "True", "--lora_r", "128", "--lora_alpha", "256"),
        *("--learning_rate", "2e-4", "--mm_projector_lr", "2e-5"),
        *("--per_device_train_batch_size", "16", "--group_by_modality_length", "True"),
    ]
    if share:
        steps = environment.get("EVAL_STEPS") or _EVAL_STEPS
        flags += ["--val_share", share, "--eval_strategy", "steps", "--eval_steps", steps, "--save_steps", steps]
        flags += ["--load_best_model_at_end", "True", "--metric_for_best_model", "eval_accuracy"]
    return flags
