"""Attach LoRA adapters, choose the trainable parameters, group them for the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from torch import nn

from llava.model.adapter.attached import attach
from llava.model.adapter.lora import OUTSIDE_LLM, read_adapter
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.vision_tower import CLIPVisionTower

PROJECTOR = "mm_projector"
TOWER = "vision_tower"
UNUSED_NORM = "post_layernorm"
"""CLIP's norm of the pooled output, which LLaVA doesn't use, so it never has a gradient."""


def linear_names(model: LlavaLlamaForCausalLM) -> list[str]:
    """Return the names of the linear layers in the LLM's blocks (`q_proj`, ..., `down_proj`), quantized ones too."""
    modules = model.model.layers.named_modules()
    return sorted({name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)})


def add_lora(
    model: LlavaLlamaForCausalLM,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    bias: str,
    base_name: str,
    targets: Sequence[str] | None = None,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> peft.PeftModel:
    """Wrap a model with LoRA adapters on linear layers of the LLM.

    Args:
        model: its vision tower and projector get no adapter.
        alpha: the products are scaled by alpha / r.
        dropout: 0..1, on the adapters' inputs.
        bias: peft's "none", "lora_only" or "all".
        base_name: recorded in `adapter_config.json`.
        targets: names of the layers; None = all linear layers.
        use_dora: also learn the length of each weight row.
        use_rslora: scale by alpha / sqrt(r) instead.

    Raises:
        ValueError: if a name in `targets` is not a linear layer of the LLM's blocks.
    """
    names = linear_names(model)
    if unknown := sorted(set(targets or ()) - set(names)):
        raise ValueError(f"--lora_target_modules {unknown[0]}: choose among {','.join(names)}")
    model.name_or_path = base_name
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=bias,
        target_modules=list(targets or names),
        exclude_modules=OUTSIDE_LLM,
        use_dora=use_dora,
        use_rslora=use_rslora,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, settings)


def continue_lora(model: LlavaLlamaForCausalLM, directory: str | Path, base_name: str | None = None) -> peft.PeftModel:
    """Attach the adapters of a LoRA directory to their base, to train them further.

    Args:
        model: the adapters' base.
        directory: LoRA directory.
        base_name: recorded as the base's name; None = as the directory records it.

    Raises:
        ValueError: if the adapters are not complete or don't fit the model.
    """
    return attach(model, read_adapter(directory), base_name=base_name, is_trainable=True)


def choose_trainable(
    model: nn.Module,
    *,
    lora: bool,
    projector: bool,
    backbone: bool,
    tower: bool = False,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Set `requires_grad` of every parameter and return the names of the trainable parameters.

    Args:
        model: with adapters already in place if `lora`.
        lora: train the adapters and freeze the LLM's own weights.
        projector: train the projector.
        backbone: train the LLM's weights; no effect with `lora`.
        tower: train the vision tower, except for its unused norm; a frozen tower is put into eval mode.
        dtype: of the trainable parameters, and of the whole tower if it is trained; None = unchanged.

    Raises:
        ValueError: if no parameter is trainable.
    """
    names = []
    for name, parameter in model.named_parameters():
        if TOWER in name:
            is_trainable = tower and UNUSED_NORM not in name
        elif PROJECTOR in name:
            is_trainable = projector
        else:
            is_trainable = "lora_" in name if lora else backbone
        parameter.requires_grad_(is_trainable)
        if is_trainable:
            names.append(name)
        if dtype is not None and (is_trainable or (tower and TOWER in name)):  # the tower runs in one dtype
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, CLIPVisionTower):
            module.train(module.training)  # a tower that was frozen just now leaves training mode
    if not names:
        raise ValueError("no parameter is trainable; pass --lora_enable True, or fewer --freeze_... flags")
    return names


def parameter_groups(
    model: nn.Module,
    decayed: Sequence[str],
    *,
    weight_decay: float,
    projector_lr: float | None,
    tower_lr: float | None = None,
) -> list[dict]:
    """Return the optimizer's parameter groups: by weight decay and by learning rate.

    Args:
        model: with `requires_grad` set.
        decayed: names of the parameters with weight decay.
        weight_decay: their decay.
        projector_lr: learning rate of the projector; None = the run's.
        tower_lr: learning rate of the vision tower; None = the run's.
    """
    decayed_names = set(decayed)
    groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = projector_lr if PROJECTOR in name else tower_lr if TOWER in name else None
            groups.setdefault((rate, name in decayed_names), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if is_decayed else 0.0,
            **({} if rate is None else {"lr": rate}),
        }
        for (rate, is_decayed), parameters in groups.items()
    ]
