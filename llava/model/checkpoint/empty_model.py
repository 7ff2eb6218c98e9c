"""Build a model without weights, on the meta device, safely while other threads load or run models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llava.model.configuration import LlavaConfig
from llava.model.llava_llama import LlavaLlamaForCausalLM

_META = torch.device("meta")


def empty_model(
    config: LlavaConfig, model_class: type[LlavaLlamaForCausalLM] | None = None, model_args: Sequence[Any] = ()
) -> LlavaLlamaForCausalLM:
    """Return the model of a config, its parameters on `meta` and its buffers on the CPU.

    `accelerate.init_empty_weights` patches `nn.Module` for the whole process, so that models which other threads load
    meanwhile would lose their weights. A device context belongs to one thread.

    Args:
        config: of the model.
        model_class: derived from `LlavaLlamaForCausalLM`; None = that itself.
        model_args: of a derived class, after the config.
    """
    with _META:
        model = (model_class or LlavaLlamaForCausalLM)(config, *model_args)
    for module in model.modules():
        if any(buffer.device == _META for buffer in module.buffers(recurse=False)):
            # Rotary frequencies and position ids are computed from the config of the module that holds them.
            filled = type(module)(module.config)
            attributes = {name: value for name, value in vars(filled).items() if isinstance(value, torch.Tensor)}
            for name, tensor in {**attributes, **dict(filled.named_buffers(recurse=False))}.items():
                setattr(module, name, tensor)
    return model
