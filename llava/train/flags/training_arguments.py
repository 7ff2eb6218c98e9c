"""`TrainingArguments`: every field of `transformers.TrainingArguments` and the flags of this code."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers.trainer_pt_utils import AcceleratorConfig

from llava.model.capabilities import capabilities_of
from llava.model.devices import best_device
from llava.train.flags.arguments import TrainingFlags, checkpointing_flag
from llava.train.flags.json_flags import read_json_flag
from llava.train.flags.precision import choose_precision

logger = logging.getLogger(__name__)

CHECKPOINTING = checkpointing_flag([entry.name for entry in dataclasses.fields(transformers.TrainingArguments)])
"""Flag of activation checkpointing in the installed version of transformers."""
_DEEPSPEED_BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")


@dataclass
class TrainingArguments(TrainingFlags, transformers.TrainingArguments):
    """How it is trained: transformers' flags, LoRA, quantization, packs, fault tolerance."""

    def __post_init__(self) -> None:
        TrainingFlags.__post_init__(self)
        _check_accelerator_config(self.accelerator_config)
        if best_device().type == "cpu":
            self.use_cpu = True  # else DeepSpeed's processes don't find each other without a GPU
        device = torch.device("cpu") if self.use_cpu else best_device()
        self.bf16, self.fp16 = choose_precision(capabilities_of(device), self.bf16, self.fp16, self.tf32)
        if self.warmup_ratio is not None:
            self.warmup_steps, self.warmup_ratio = self.warmup_ratio, None
        if getattr(self, CHECKPOINTING) and not getattr(self, f"{CHECKPOINTING}_kwargs"):
            setattr(self, f"{CHECKPOINTING}_kwargs", {"use_reentrant": False})
        self.logging_nan_inf_filter = False  # it waits for the device at each batch; the run stops at a NaN loss anyway
        has_accelerator_config = self.accelerator_config is not None
        reports_to_all = self.report_to in ("all", ["all"])
        logging_dir, self.logging_dir = (
            self.logging_dir,
            None,
        )  # deprecated field of some versions
        transformers.TrainingArguments.__post_init__(self)
        self.logging_dir = logging_dir
        if reports_to_all:
            logger.info("--report_to all: %s", ", ".join(self.report_to) or "nothing is installed")
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type == "cuda"
        if not has_accelerator_config:  # blocking copies would make a batch wait for the previous update
            self.accelerator_config.non_blocking = self.dataloader_pin_memory

    @property
    def device(self) -> torch.device:
        """This process's device; "cpu" without an index: torch can't load tensors to "cpu:0"."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def n_gpu(self) -> int:
        """GPUs of this process, at most 1: packs don't work under `nn.DataParallel`."""
        return min(1, super().n_gpu)

    @property
    def checkpoints_activations(self) -> bool:
        """Whether activation checkpointing is on, whatever this version of transformers calls the flag."""
        return bool(getattr(self, CHECKPOINTING))

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of frozen weights."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


def enable_activation_checkpointing(model: nn.Module, training: TrainingArguments) -> None:
    """Turn on activation checkpointing, whatever this version of transformers calls it."""
    settings = {f"{CHECKPOINTING}_kwargs": getattr(training, f"{CHECKPOINTING}_kwargs")}
    getattr(model, f"{CHECKPOINTING}_enable")(**settings)


def set_batch(training: TrainingArguments, batch: int, accumulation: int) -> None:
    """Change the micro-batch and its accumulation of parsed flags, in DeepSpeed's config too.

    Raises:
        ValueError: if that config has numbers of its own for them.
    """
    content = read_json_flag("deepspeed", training.deepspeed)
    fixed = [key for key in _DEEPSPEED_BATCH if content.get(key, "auto") != "auto"]
    if fixed:
        raise ValueError(
            f"--deepspeed {training.deepspeed} sets {fixed[0]} to {content[fixed[0]]}, and --fit auto would train "
            f'batches of {batch}; write "auto" there, or pass --fit off'
        )
    training.per_device_train_batch_size, training.gradient_accumulation_steps = batch, accumulation
    if training.deepspeed:  # as transformers does in its search for hyperparameters
        from accelerate.utils import DeepSpeedPlugin
        from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

        training.hf_deepspeed_config = HfTrainerDeepSpeedConfig(training.deepspeed)
        training.hf_deepspeed_config.trainer_config_process(training)
        training.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=training.hf_deepspeed_config)


def _check_accelerator_config(config: str | dict | None) -> None:
    known = [entry.name for entry in dataclasses.fields(AcceleratorConfig)]
    if other := [key for key in read_json_flag("accelerator_config", config) if key not in known]:
        raise ValueError(f"--accelerator_config has no {other[0]}; choose among {', '.join(known)}")
