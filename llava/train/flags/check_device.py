"""Refuse flags that the device of this process doesn't support."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava.constants import FP8
from llava.train.flags.check_arguments import refuse

if TYPE_CHECKING:  # for annotations: it imports torch
    from llava.train.flags.training_arguments import TrainingArguments


def check_device(training: TrainingArguments) -> None:
    """Refuse flags that this process's device doesn't support, all of them in one message.

    Raises:
        ValueError: naming the flag, the value and what to do.
    """
    from llava.model.capabilities import capabilities_of  # imports torch, and the other checks come before
    from llava.model.quantization import DEVICES

    device, here = training.device.type, capabilities_of(training.device)
    no_compilation = here.refuse_compilation()
    refuse(
        [
            (
                training.bits != 16 and device not in DEVICES,
                f"--bits {training.bits} runs on CUDA and the CPU, not on {device}; leave it out",
            ),
            (
                training.bits == 8 and device in DEVICES and not here.has_int8,
                f"--bits 8: {here.machine} has no kernels for LLM.int8; pass --bits 4",
            ),
            (
                training.base_dtype == FP8 and not here.has_fp8,
                f"--base_dtype fp8: {here.machine} has no FP8 products; leave it out",
            ),
            *(
                (bool(no_compilation) and is_given, f"{flag}: {no_compilation}; leave it out")
                for flag, is_given in (
                    ("--compile_layers on", training.compile_layers == "on"),
                    ("--fuse_lora on", training.fuse_lora == "on"),
                    ("--torch_compile True", training.torch_compile),
                )
            ),
            (
                training.fuse_lora == "on" and training.compile_layers == "off" and device == "cuda",
                "--fuse_lora on runs compiled on CUDA; leave --compile_layers off out",
            ),
            (
                bool(training.fsdp) and device == "cpu",
                "--fsdp shards over GPUs; on the CPU accelerate leaves it out without a word, so leave it out",
            ),
        ]
    )
