"""Which parameters learn: LoRA adapters, the projector, the LLM, and on request the image encoder."""

from __future__ import annotations

from collections.abc import Sequence

import peft
import torch
from torch import nn

from llava.model.adapter import OUTSIDE_LLM
from llava.model.llava_llama import LlavaLlamaForCausalLM

PROJECTOR = "mm_projector"
TOWER = "vision_tower"
UNUSED_NORM = "post_layernorm"
"""Of CLIP's encoder: it makes the pooled output, which LLaVA doesn't read, so it would never have a gradient."""


def linear_names(model: LlavaLlamaForCausalLM) -> list[str]:
    """Return the names of the linear layers in the LLM's blocks (`q_proj`, ..., `down_proj`), quantised ones too."""
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
        model: loaded; the encoder and projector get no adapter.
        rank: r.
        alpha: products are scaled by alpha / r.
        dropout: 0..1, on the adapters' inputs.
        bias: peft's "none", "lora_only" or "all".
        base_name: recorded in `adapter_config.json`.
        targets: names of the layers; None = all linear ones.
        use_dora: learn the length of each row of the weights, too.
        use_rslora: scale by alpha / sqrt(r) instead.

    Raises:
        ValueError: if the LLM's blocks have no linear layer of a name in `targets`.
    """
    names = linear_names(model)
    if strangers := sorted(set(targets or ()) - set(names)):
        raise ValueError(f"--lora_target_modules {strangers[0]}: choose among {','.join(names)}")
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


def continue_lora(model: LlavaLlamaForCausalLM, directory: str) -> peft.PeftModel:
    """Wrap a model with the adapters of a LoRA directory, to train them further."""
    settings = peft.PeftConfig.from_pretrained(directory)
    settings.exclude_modules = OUTSIDE_LLM
    settings.inference_mode = False
    return peft.PeftModel.from_pretrained(model, directory, config=settings, is_trainable=True)


def choose_trainable(
    model: nn.Module,
    *,
    lora: bool,
    projector: bool,
    backbone: bool,
    tower: bool = False,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Set `requires_grad` of every parameter and return the names of those that learn.

    Args:
        model: with adapters already in place if `lora`.
        lora: the adapters learn, and the LLM's own weights don't.
        projector: the projector learns.
        backbone: the LLM's weights learn; no effect with `lora`.
        tower: the image encoder learns, but for the norm that its patch features don't pass.
        dtype: of the parameters that learn, and of the whole encoder if it learns; None leaves it.

    Raises:
        ValueError: if nothing would learn.
    """
    names = []
    for name, parameter in model.named_parameters():
        if TOWER in name:
            learns = tower and UNUSED_NORM not in name
        elif PROJECTOR in name:
            learns = projector
        else:
            learns = "lora_" in name if lora else backbone
        parameter.requires_grad_(learns)
        if learns:
            names.append(name)
        if dtype is not None and (learns or (tower and TOWER in name)):  # the encoder runs in one dtype
            parameter.data = parameter.data.to(dtype)
    if not names:
        raise ValueError("nothing would learn; pass --lora_enable True, or fewer --freeze_... flags")
    return names


def parameter_groups(
    model: nn.Module,
    decayed: Sequence[str],
    *,
    weight_decay: float,
    projector_lr: float | None,
    tower_lr: float | None = None,
) -> list[dict]:
    """Return the optimizer's groups: with and without weight decay, projector and encoder apart if they have own rates.

    Args:
        model: with `requires_grad` set.
        decayed: names of the parameters that weight decay applies to.
        weight_decay: of those.
        projector_lr: learning rate of the projector; None = that of the rest.
        tower_lr: learning rate of the image encoder; None = that of the rest.
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
