"""A model whose weights stay in their files: slow, but a 7B model runs in a few gigabytes of memory."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
from torch import nn

from llava.model.adapter import OUTSIDE_LLM, PEFT_PREFIX, Adapter, read_adapter
from llava.model.checkpoint import Checkpoint
from llava.model.lazy_tensors import LazyTensor, LazyTensors
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.vision_tower import released_name

_WRAPPED = ".base_layer."
"""What peft puts into the name of a weight that has an adapter."""


def stream_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, adapter_directory: str | Path | None = None
) -> nn.Module:
    """Return a model that reads the weights of each module when it runs, and drops them afterwards.

    Args:
        checkpoint: from `open_checkpoint`; without the adapter's products if `adapter_directory` is given.
        device: where it computes.
        dtype: in which it computes.
        adapter_directory: LoRA directory computed beside the weights, unmerged, by peft.

    Raises:
        ValueError: if that is a DoRA adapter.
    """
    with accelerate.init_empty_weights(include_buffers=False):
        model: nn.Module = LlavaLlamaForCausalLM(checkpoint.config)
    adapter = None
    if adapter_directory is not None:
        adapter = read_adapter(adapter_directory)
        if adapter.magnitudes:  # DoRA looks at the weights themselves, while they are in their files
            raise ValueError(f"{adapter_directory} is a DoRA adapter, which can't run with weights left in their files")
        settings = peft.PeftConfig.from_pretrained(str(adapter_directory))
        settings.exclude_modules = OUTSIDE_LLM
        model.name_or_path = settings.base_model_name_or_path
        with accelerate.init_empty_weights(include_buffers=False):
            model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    for parameter in model.parameters():  # not `model.to(dtype)`, which would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    entries = {name: _entry(name, checkpoint.tensors, adapter) for name, _ in model.named_parameters()}
    accelerate.cpu_offload(model.eval(), device, state_dict=LazyTensors(entries))
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.register_forward_hook(_give_memory_back)
    return model


def _give_memory_back(*_: Any) -> None:
    """Return freed memory to the system; the C library keeps it otherwise, some 100 MB for each layer that ran."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)


def _entry(name: str, tensors: LazyTensors, adapter: Adapter | None) -> LazyTensor:
    """Return the tensor of a parameter, by its name in a model that peft may have wrapped."""
    module, mark, leaf = name.removeprefix(PEFT_PREFIX).partition(".lora_")
    if mark:
        return adapter.pairs[f"{module}.weight"]["AB".index(leaf[0])]
    return tensors.entries[released_name(module.replace(_WRAPPED, "."))]
