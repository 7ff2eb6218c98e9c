"""Check that what flags need is installed and reachable, before data and weights are read.

transformers' own integrations, optimizers and schedules are built once on trial, so that their errors come at once and
name the flag, not an hour later.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_reporting_integration_callbacks

from llava.train.flags.training_arguments import TrainingArguments
from llava.train.output_files import LOG_FILE

_STAND_ALONE = ("all", "none")
_REPORTING_PACKAGES = {  # name for --report_to: modules of which one is needed, and what to install
    "azure_ml": (("azureml",), "azureml-sdk"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables of a launcher; without them DeepSpeed falls back to MPI."""
_SCHEDULE_EXAMPLES = {
    "cosine_with_min_lr": '{"min_lr": 1e-6}',
    "cosine_warmup_with_min_lr": '{"min_lr": 1e-6}',
    "warmup_stable_decay": '{"num_decay_steps": 100}',
}


def check_requirements(training: TrainingArguments) -> None:
    """Refuse flags whose packages, settings or services are missing.

    Raises:
        ValueError: naming the flag and what to install or pass.
    """
    _check_reporting(training.report_to)
    _check_optimizer(training)
    _check_schedule(training)
    _check_compilation(training)


def refuse_missing_launcher(training: TrainingArguments) -> None:
    """Refuse DeepSpeed without a launcher, where it would ask for mpi4py.

    Raises:
        ValueError: naming the flag and the launchers.
    """
    is_launched = all(name in os.environ for name in _LAUNCHED)
    if training.deepspeed and not is_launched and importlib.util.find_spec("mpi4py") is None:
        raise ValueError(
            f"--deepspeed {training.deepspeed} needs a launcher: start the training with deepspeed "
            "llava/train/train_mem.py (as scripts/v1_5 do) or torchrun --nproc_per_node 1 -m llava.train.train_mem, or "
            "leave the flag out"
        )


def refuse_dropping_all(rows: int, training: TrainingArguments) -> None:
    """Refuse `--dataloader_drop_last` if there are fewer rows than one batch of all processes.

    Args:
        rows: number of training rows.
        training: flags.

    Raises:
        ValueError: with the numbers.
    """
    each, processes = training.train_batch_size, training.world_size
    if not training.dataloader_drop_last or rows >= each * processes:
        return
    smaller = f" or pass --per_device_train_batch_size {rows // processes} or less" if rows >= processes else ""
    raise ValueError(
        f"--dataloader_drop_last True leaves nothing to train on: {rows} rows are fewer than the {each * processes} "
        f"of a batch ({each} on each of {processes} process(es)); leave it out{smaller}"
    )


def _check_reporting(names: Sequence[str]) -> None:
    for name in names:
        if name in _STAND_ALONE:
            raise ValueError(f"--report_to {' '.join(names)}: {name} stands alone; leave it or the others out")
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"--report_to {name} is unknown; choose none, all (whatever is installed), or some of "
                f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}, with spaces between them"
            )
        otherwise = f"or pass --report_to none, everything is logged to {LOG_FILE} anyway"
        modules, package = _REPORTING_PACKAGES.get(name, ((), ""))
        if modules and not any(map(importlib.util.find_spec, modules)):
            raise ValueError(f"--report_to {name} needs a package; run: pip install {package}, {otherwise}")
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except Exception as error:  # each integration raises its own
            raise ValueError(f"--report_to {name} can't be used here ({_one_line(error)}); {otherwise}") from error


def _check_optimizer(training: TrainingArguments) -> None:
    try:
        Trainer.get_optimizer_cls_and_kwargs(training, nn.Linear(1, 1))
    except Exception as error:  # optimizers differ in what they raise without their package
        how = f" with --optim_args {training.optim_args}" if training.optim_args else ""
        raise ValueError(
            f"--optim {training.optim.value}{how} can't be used here ({_one_line(error)}); or leave it out"
        ) from error


def _check_schedule(training: TrainingArguments) -> None:
    kind = training.lr_scheduler_type.value
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        get_scheduler(kind, optimizer, 1, 10, scheduler_specific_kwargs=training.lr_scheduler_kwargs or {})
    except Exception as error:  # a missing keyword is a ValueError or a TypeError
        example = _SCHEDULE_EXAMPLES.get(kind)
        way_out = f"pass --lr_scheduler_kwargs '{example}'" if example else "change or leave out --lr_scheduler_kwargs"
        raise ValueError(f"--lr_scheduler_type {kind} can't be used ({_one_line(error)}); {way_out}") from error


def _check_compilation(training: TrainingArguments) -> None:
    known = [backend.value.lower() for backend in DynamoBackend]
    if training.torch_compile and training.torch_compile_backend not in known:
        raise ValueError(f"--torch_compile_backend {training.torch_compile_backend}: choose one of {', '.join(known)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
