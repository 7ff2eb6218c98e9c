"""What training starts from: the weights as flags and checkpoint describe them, and what of them learns."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from llava.constants import DEFAULT_TEMPLATE
from llava.conversation import get_template
from llava.model.adapter import read_adapter, read_projector
from llava.model.builder import build_model
from llava.model.checkpoint import Checkpoint, Layout, open_checkpoint
from llava.model.hub import snapshot_revision
from llava.model.lazy_tensors import LazyTensors, fingerprint
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.projector import build_projector
from llava.model.quantization import refuse_quantized
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, as_json, zero_stage
from llava.train.lora import add_lora, choose_trainable, continue_lora
from llava.train.saving import Surroundings

logger = logging.getLogger(__name__)

DEFAULT_PROJECTOR = "mlp2x_gelu"


def open_for_training(model_args: ModelArguments, data_args: DataArguments, cache_dir: str | None = None) -> Checkpoint:
    """Open the weights to start from and settle what flags and checkpoint say about the model.

    Raises:
        ValueError: if a flag contradicts the checkpoint, or the weights are no full model.
    """
    checkpoint = open_checkpoint(
        model_args.model_name_or_path, vision_tower=model_args.vision_tower, cache_dir=cache_dir
    )
    refuse_quantized(checkpoint.config, model_args.model_name_or_path, "trained")
    if checkpoint.layout not in (Layout.FULL, Layout.HF):
        raise ValueError(
            f"--model_name_or_path {model_args.model_name_or_path} holds a {checkpoint.layout.value}; merge it first "
            "with scripts/merge_lora_weights.py, or continue from it with --lora_weight_path and its base here"
        )
    if checkpoint.image_processor is None:
        raise ValueError(f"{model_args.model_name_or_path} has no vision tower; pass --vision_tower with its directory")
    config = checkpoint.config
    has_projector = any("mm_projector" in name for name in checkpoint.tensors)
    for key in ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature"):
        asked = getattr(model_args, key)
        if asked is not None and has_projector and asked != getattr(config, key):
            raise ValueError(f"--{key} {asked}: the checkpoint has {getattr(config, key)}; leave the flag out")
        if asked is not None:
            setattr(config, key, asked)
    if not has_projector and model_args.mm_projector_type is None:
        config.mm_projector_type = DEFAULT_PROJECTOR
    template = config.conversation_template
    if model_args.version and template and get_template(template) != get_template(model_args.version):
        raise ValueError(
            f"--version {model_args.version}: the checkpoint was trained with {template}; leave the flag out"
        )
    config.conversation_template = template or model_args.version or DEFAULT_TEMPLATE
    config.image_aspect_ratio = data_args.image_aspect_ratio or config.image_aspect_ratio or "pad"
    return checkpoint


def add_projector(checkpoint: Checkpoint, model_args: ModelArguments, seed: int) -> Checkpoint:
    """Add the projector asked for, or a fresh one where the weights have none."""
    config = checkpoint.config
    if model_args.pretrain_mm_mlp_adapter:
        projector = read_projector(model_args.pretrain_mm_mlp_adapter)
        return dataclasses.replace(checkpoint, tensors=checkpoint.tensors.overlaid(projector.entries))
    if any("mm_projector" in name for name in checkpoint.tensors):
        return checkpoint
    logger.info("the weights have no projector; a fresh %s starts from seed %d", config.mm_projector_type, seed)
    fresh = build_projector(config.mm_projector_type, config.mm_hidden_size, config.hidden_size).state_dict()
    entries = LazyTensors.of({f"model.mm_projector.{name}": tensor for name, tensor in fresh.items()}).entries
    return dataclasses.replace(checkpoint, tensors=checkpoint.tensors.overlaid(entries))


def add_what_was_trained(
    checkpoint: Checkpoint, model_args: ModelArguments, training_args: TrainingArguments
) -> Checkpoint:
    """Put the projector of a LoRA directory, whose adapters are trained further, in the place of the base's.

    Raises:
        FileNotFoundError: if one of its files is missing.
        ValueError: if it was trained on another base, or has adapters outside the LLM.
    """
    directory = training_args.lora_weight_path
    if read_adapter(directory).outside_llm().pairs:
        raise ValueError(
            f"--lora_weight_path {directory} has adapters outside the LLM; merge it with scripts/merge_lora_weights.py "
            "and start from the result"
        )
    trained = open_checkpoint(
        directory,
        model_args.model_name_or_path,
        vision_tower=model_args.vision_tower,
        with_adapter=False,
        cache_dir=training_args.cache_dir,
    )
    return dataclasses.replace(checkpoint, tensors=trained.tensors)


def adapter_rank(training_args: TrainingArguments) -> int:
    """Return the rank of the adapters that will learn: the one asked for, or that of the directory they come from."""
    directory = training_args.lora_weight_path
    return read_adapter(directory).settings["r"] if directory else training_args.lora_r


def load_model(
    checkpoint: Checkpoint, kind: str, model_args: ModelArguments, training_args: TrainingArguments
) -> nn.Module:
    """Load the weights and choose what learns; `kind` is what comes out: lora, projector or full."""
    # ZeRO-3 partitions whole parameters from the CPU's memory; everything else starts on its device.
    device = "cpu" if zero_stage(training_args.deepspeed) == 3 else training_args.device
    model: nn.Module = build_model(checkpoint, dtype=training_args.weight_dtype, device=device, bits=training_args.bits)
    model.config.use_cache = False
    if training_args.lora_enable:
        model = _with_adapters(model, model_args, training_args)
    choose_trainable(
        model,
        lora=training_args.lora_enable,
        projector=not training_args.freeze_mm_mlp_adapter,
        backbone=kind == "full" and not model_args.freeze_backbone,
        tower=model_args.unfreeze_mm_vision_tower,
        # DeepSpeed keeps masters in fp32 itself; without it the parameters that learn are the masters.
        dtype=training_args.weight_dtype if training_args.deepspeed else torch.float32,
    )
    return model


def _with_adapters(
    model: LlavaLlamaForCausalLM, model_args: ModelArguments, training_args: TrainingArguments
) -> nn.Module:
    if training_args.lora_weight_path:
        wrapped = continue_lora(model, training_args.lora_weight_path)
        settings = wrapped.peft_config[wrapped.active_adapter]
        logger.info("adapters go on with their own rank %d and alpha %d", settings.r, settings.lora_alpha)
        return wrapped
    return add_lora(
        model,
        rank=training_args.lora_r,
        alpha=training_args.lora_alpha,
        dropout=training_args.lora_dropout,
        bias=training_args.lora_bias,
        base_name=model_args.model_name_or_path,
        targets=training_args.lora_target_modules and training_args.lora_target_modules.split(","),
        use_dora=training_args.use_dora,
        use_rslora=training_args.use_rslora,
    )


def describe_base(name: str, checkpoint: Checkpoint, bits: int) -> dict[str, Any]:
    """Return the config keys that tell what training starts from; the weights' samples are read for it."""
    return {
        "base_model_name_or_path": name,
        "base_model_revision": snapshot_revision(checkpoint.directory),
        "base_model_fingerprint": fingerprint(checkpoint.tensors),
        "base_model_bits": bits,
        "merged_adapter_fingerprint": None,
    }


def surroundings(
    checkpoint: Checkpoint,
    base: Mapping[str, Any],
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> Surroundings:
    """Return what every saved directory holds beside its weights; `base` comes from `describe_base`."""
    config = copy.deepcopy(checkpoint.config)
    config.use_cache = True
    for key, value in base.items():
        setattr(config, key, value)
    config.mm_projector_lr = training_args.mm_projector_lr
    config.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
    config.freeze_mm_mlp_adapter = training_args.freeze_mm_mlp_adapter
    config.unfreeze_mm_vision_tower = model_args.unfreeze_mm_vision_tower
    config.mm_vision_tower_lr = training_args.mm_vision_tower_lr
    config.use_mm_proj = True
    flags = as_json(model_args, data_args, training_args)
    return Surroundings(config, checkpoint.tokenizer, checkpoint.image_processor, flags)
