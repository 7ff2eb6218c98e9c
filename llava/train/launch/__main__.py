"""Start training with the flags that all stages share, in front of those given.

Run by `scripts/v1_5/launch.sh`; `llava train` is `llava.train.launch.task_lora`. LAUNCHER, GPUS, ZERO, HOSTFILE and
PORT are in the environment. One line on stderr says which launcher was chosen, why, and what is lost.

Example: LAUNCHER=torchrun GPUS=2 python -m llava.train.launch --lora_enable True --data_path data.json --output_dir out
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence

from llava.files.terminal_text import report_error
from llava.train.flags.command_line import refuse_early
from llava.train.launch.choose_launcher import choose_launcher, inspect_machine, read_request
from llava.train.launch.processes import run_launcher

WRONG_FLAGS, NO_LAUNCHER = 2, 127
SHARED_FLAGS = (
    *("--num_train_epochs", "1"),
    *("--gradient_accumulation_steps", "1"),
    *("--fit", "auto"),
    *("--eval_strategy", "no"),
    *("--save_strategy", "steps", "--save_total_limit", "2"),
    *("--weight_decay", "0.", "--warmup_ratio", "0.03", "--lr_scheduler_type", "cosine"),
    *("--logging_steps", "1"),
    *("--model_max_length", "2048"),
    *("--gradient_checkpointing", "True"),
    *("--dataloader_num_workers", "4"),
    *("--report_to", "tensorboard"),
)
"""Flags of every stage; a later one on the command line replaces them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start training with `SHARED_FLAGS` and the flags given; return its exit code."""
    return launch(sys.argv[1:] if argv is None else argv, os.environ)


def launch(flags: Sequence[str], environment: Mapping[str, str]) -> int:
    """Choose the launcher, run it, and wait for the end of the training.

    Args:
        flags: of the training; `SHARED_FLAGS` come before them.
        environment: variables that ask for a launcher, and those of its processes.

    Returns:
        the exit code: 1 if the launcher is refused, 127 if it is not there, 2 for wrong flags, else the training's.
    """
    flags = [*SHARED_FLAGS, *flags]
    try:
        refuse_early(flags)
    except (ValueError, OSError, ImportError) as error:
        report_error(error)
        return WRONG_FLAGS
    try:
        chosen = choose_launcher(read_request(environment, flags), inspect_machine(environment.get("PATH")))
    except ValueError as error:
        report_error(error)
        return 1
    launcher = shutil.which(chosen.words[0], path=environment.get("PATH"))
    if launcher is None:
        report_error(f"{chosen.words[0]} is not on the PATH; activate the environment that has torch")
        return NO_LAUNCHER
    note = ""
    if chosen.words[0] == "deepspeed" and shutil.which("nvidia-smi") is None:
        note = "; without a GPU its first run compiles an extension with a C++ compiler, LAUNCHER=python does not"
    print(f"{chosen.line}{note}", file=sys.stderr, flush=True)
    return run_launcher([launcher, *chosen.words[1:], *flags], environment, launcher=chosen.words[0])


if __name__ == "__main__":
    sys.exit(main())
