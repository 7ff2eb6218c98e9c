"""Set up the model: open the base, add weights of earlier stages, attach LoRA, choose parameters, build the saver."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import nn

from llava.constants import DEFAULT_TEMPLATE, FP8
from llava.conversation import get_template
from llava.data.records import EncodedRecord
from llava.model.adapter.lora import is_llm_block, read_adapter
from llava.model.adapter.non_lora import read_projector
from llava.model.builder import build_model
from llava.model.checkpoint.checkpoint import Checkpoint, Layout, open_checkpoint
from llava.model.checkpoint.hub import snapshot_revision
from llava.model.checkpoint.lazy_tensors import LazyTensors, fingerprint
from llava.model.configuration import LlavaConfig
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.packed.forward import PackedLlavaForCausalLM
from llava.model.projector import build_projector
from llava.model.quantization import refuse_quantized
from llava.train.fault_tolerance.run_manifest import add_run_manifest, run_manifest
from llava.train.flags.arguments import DataArguments, ModelArguments, as_json, output_kind, zero_stage
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.lora import add_lora, choose_trainable, continue_lora
from llava.train.saving import CheckpointMetadata, Saver

logger = logging.getLogger(__name__)

DEFAULT_PROJECTOR = "mlp2x_gelu"
_PROJECTOR_FLAGS = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature")
"""Fixed by the checkpoint if it has a projector."""
_VOCABULARY_FLAGS = ("mm_use_im_start_end", "mm_use_im_patch_token")
"""Fixed by the checkpoint, with or without a projector."""


def open_base(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Checkpoint:
    """Open the checkpoint that training starts from, and complete its config from the flags.

    Raises:
        ValueError: if a flag contradicts the checkpoint, or the directory doesn't hold a full model.
    """
    name = model_args.model_name_or_path
    base = open_checkpoint(name, vision_tower=model_args.vision_tower, cache_dir=training_args.cache_dir)
    refuse_quantized(base.config, name, "trained")
    if base.layout not in (Layout.FULL, Layout.HF):
        raise ValueError(
            f"--model_name_or_path {name} holds a {base.layout.value}; merge it first with "
            "scripts/merge_lora_weights.py, or continue from it with --lora_weight_path and its base here"
        )
    if base.image_processor is None:
        raise ValueError(f"{name} has no vision tower; pass --vision_tower with its directory")
    _complete_config(base.config, model_args, has_projector=_has_projector(base))
    config, length = base.config, training_args.model_max_length
    config.image_aspect_ratio = data_args.image_aspect_ratio or config.image_aspect_ratio or "pad"
    config.tokenizer_model_max_length = base.tokenizer.model_max_length = length
    return base


def _complete_config(config: LlavaConfig, model_args: ModelArguments, *, has_projector: bool) -> None:
    for key in (*_PROJECTOR_FLAGS, *_VOCABULARY_FLAGS):
        asked, found = getattr(model_args, key), getattr(config, key)
        if asked in (None, found):
            continue
        if has_projector or key in _VOCABULARY_FLAGS:
            raise ValueError(f"--{key} {asked}: the checkpoint has {found}; leave the flag out")
        setattr(config, key, asked)
    if not has_projector and model_args.mm_projector_type is None:
        config.mm_projector_type = DEFAULT_PROJECTOR
    found, asked = config.conversation_template, model_args.version
    if asked and found and get_template(found) != get_template(asked):
        raise ValueError(f"--version {asked}: the checkpoint was trained with {found}; leave the flag out")
    config.conversation_template = found or asked or DEFAULT_TEMPLATE


def _has_projector(checkpoint: Checkpoint) -> bool:
    return any("mm_projector" in name for name in checkpoint.tensors)


def add_trained_weights(base: Checkpoint, model_args: ModelArguments, training_args: TrainingArguments) -> Checkpoint:
    """Return the base with the weights of earlier stages: a pretrained or fresh projector, `--lora_weight_path`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if an adapter was trained on another base, or can't be trained further.
    """
    checkpoint = _add_projector(base, model_args, training_args.seed)
    if training_args.lora_weight_path:
        tensors = _tensors_beside_adapter(model_args, training_args)
        checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
    return checkpoint


def _add_projector(base: Checkpoint, model_args: ModelArguments, seed: int) -> Checkpoint:
    config = base.config
    if model_args.pretrain_mm_mlp_adapter:
        entries = read_projector(model_args.pretrain_mm_mlp_adapter).entries
    elif _has_projector(base):
        return base
    else:
        logger.info("the base has no projector; a new %s is initialized with seed %d", config.mm_projector_type, seed)
        state = build_projector(config.mm_projector_type, config.mm_hidden_size, config.hidden_size).state_dict()
        entries = LazyTensors.of({f"model.mm_projector.{name}": tensor for name, tensor in state.items()}).entries
    return dataclasses.replace(base, tensors=base.tensors.overlaid(entries))


def _tensors_beside_adapter(model_args: ModelArguments, training_args: TrainingArguments) -> LazyTensors:
    """Return the base's weights, with the whole weights and non-LLM adapters of `--lora_weight_path` applied."""
    directory = training_args.lora_weight_path
    adapter = read_adapter(directory)
    twice = sorted(name for name in adapter.pairs.keys() & adapter.replaced.keys() if is_llm_block(name))
    if twice:
        raise ValueError(
            f"--lora_weight_path {directory} holds {twice[0]} whole and with an adapter; merge it with "
            "scripts/merge_lora_weights.py and start from the result"
        )
    if outside := sorted(name for name in adapter.pairs if not is_llm_block(name)):
        logger.warning(
            "%d adapters of %s are outside the LLM's blocks (%s first): they are merged into their weights, which are "
            "written whole to the result; only adapters inside the blocks are trained further",
            len(outside),
            directory,
            outside[0],
        )
    if not adapter.trains_projector:
        logger.warning("%s holds no projector; training continues from the base's", directory)
    return open_checkpoint(
        directory,
        model_args.model_name_or_path,
        vision_tower=model_args.vision_tower,
        with_adapter=False,
        cache_dir=training_args.cache_dir,
    ).tensors


def adapter_rank(training_args: TrainingArguments) -> int:
    """Return the rank of the trained adapters: `--lora_r`, or that of `--lora_weight_path`; 0 without LoRA."""
    if not training_args.lora_enable:
        return 0
    if not training_args.lora_weight_path:
        return training_args.lora_r
    pairs = read_adapter(training_args.lora_weight_path).pairs
    return max(down.shape[0] for down, _ in pairs.values())


def load_model(start: Checkpoint, model_args: ModelArguments, training_args: TrainingArguments) -> nn.Module:
    """Load the weights, attach the LoRA adapters and choose the trainable parameters."""
    # ZeRO-3 partitions whole parameters from the CPU's memory; everything else starts on its device.
    device = "cpu" if zero_stage(training_args.deepspeed) == 3 else training_args.device
    settings = {"dtype": training_args.weight_dtype, "bits": training_args.bits}
    model: nn.Module = build_model(start, device=device, model_class=PackedLlavaForCausalLM, **settings)
    model.config.use_cache = False
    if training_args.lora_enable:
        model = _attach_adapters(model, model_args, training_args)
    choose_trainable(
        model,
        lora=training_args.lora_enable,
        projector=not training_args.freeze_mm_mlp_adapter,
        backbone=output_kind(model_args, training_args) == "full" and not model_args.freeze_backbone,
        tower=model_args.unfreeze_mm_vision_tower,
        # DeepSpeed keeps fp32 copies itself; without it the trainable parameters are in fp32.
        dtype=training_args.weight_dtype if training_args.deepspeed else torch.float32,
    )
    return model


def _attach_adapters(
    model: LlavaLlamaForCausalLM, model_args: ModelArguments, training_args: TrainingArguments
) -> nn.Module:
    if training_args.lora_weight_path:
        wrapped = continue_lora(model, training_args.lora_weight_path, model_args.model_name_or_path)
        settings = wrapped.peft_config[wrapped.active_adapter]
        logger.info("the adapters keep their own rank %d and alpha %g", settings.r, settings.lora_alpha)
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


def build_saver(
    model: nn.Module,
    base: Checkpoint,
    records: Sequence[EncodedRecord],
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> Saver:
    """Return the writer of checkpoints and of the result, with config, tokenizer and run manifest."""
    kind, base_fingerprint = output_kind(model_args, training_args), fingerprint(base.tensors)
    config = copy.deepcopy(base.config)
    for key, value in {
        "use_cache": True,
        "base_model_name_or_path": model_args.model_name_or_path,
        "base_model_revision": snapshot_revision(base.directory),
        "base_model_fingerprint": base_fingerprint,
        "base_model_bits": 8 if training_args.base_dtype == FP8 else training_args.bits,
        "merged_adapter_fingerprint": None,
        "mm_projector_lr": training_args.mm_projector_lr,
        "mm_vision_tower_lr": training_args.mm_vision_tower_lr,
        "tune_mm_mlp_adapter": model_args.tune_mm_mlp_adapter,
        "freeze_mm_mlp_adapter": training_args.freeze_mm_mlp_adapter,
        "unfreeze_mm_vision_tower": model_args.unfreeze_mm_vision_tower,
        "use_mm_proj": True,
    }.items():
        setattr(config, key, value)
    run = run_manifest(records, kind=kind, base_fingerprint=base_fingerprint, training_args=training_args)
    manifest = add_run_manifest(as_json(model_args, data_args, training_args), run)
    metadata = CheckpointMetadata(config, base.tokenizer, base.image_processor, manifest)
    return Saver(model, metadata, kind, training_args.weight_dtype, _weights_unlike_base(training_args))


def _weights_unlike_base(training_args: TrainingArguments) -> set[str]:
    """Names of the weights outside LoRA's layers in which the start of training differs from the base."""
    if not training_args.lora_weight_path:
        return set()
    adapter = read_adapter(training_args.lora_weight_path).outside_llm()
    return {*adapter.pairs, *adapter.replaced}
