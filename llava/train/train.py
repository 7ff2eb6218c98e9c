"""Finetune LLaVA-1.5, or pretrain its projector: load, choose what learns, data, trainer, save.

Run by the scripts in `scripts/v1_5`: `deepspeed llava/train/train_mem.py --model_name_or_path ... --data_path ...`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from llava.constants import DEFAULT_TEMPLATE
from llava.conversation import get_template
from llava.data.dataset import ImageSettings, SupervisedCollator, SupervisedDataset
from llava.data.records import DataError, EncodedRecord, describe_problems, encode_records, read_records
from llava.model.adapter import read_adapter, read_projector
from llava.model.builder import build_model
from llava.model.checkpoint import Checkpoint, Layout, open_checkpoint
from llava.model.devices import free_memory
from llava.model.hub import snapshot_revision
from llava.model.lazy_tensors import LazyTensors, fingerprint
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.projector import build_projector
from llava.model.quantization import refuse_quantized
from llava.train.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    as_json,
    parse_arguments,
    zero_stage,
)
from llava.train.lora import add_lora, choose_trainable, continue_lora
from llava.train.recipe import describe_memory, describe_run
from llava.train.saving import Saver, Surroundings
from llava.train.trainer import FileLog, LlavaTrainer

logger = logging.getLogger(__name__)

DEFAULT_PROJECTOR = "mlp2x_gelu"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    logging.basicConfig(level=logging.INFO if _is_first() else logging.WARNING, format="%(message)s")
    try:
        arguments = parse_arguments(argv)
    except ValueError as error:
        return _fail(error, code=2)
    try:
        train(*arguments)
    except (ValueError, OSError, ImportError) as error:
        logger.debug("", exc_info=True)
        return _fail(error, code=1)
    except RuntimeError as error:
        if "ImageError" not in str(error):  # how a picture that can't be decoded arrives from a worker process
            raise
        return _fail(str(error).strip().splitlines()[-1], code=1)
    finally:
        if torch.distributed.is_initialized():  # left open, ZeRO-3 aborts at the interpreter's exit
            torch.distributed.destroy_process_group()
    return 0


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Run the whole training.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if data, checkpoint and flags don't fit each other.
    """
    transformers.set_seed(training_args.seed)
    checkpoint = open_for_training(model_args, data_args, training_args.cache_dir)
    config = checkpoint.config
    config.tokenizer_model_max_length = training_args.model_max_length
    checkpoint.tokenizer.model_max_length = training_args.model_max_length
    patches = (config.mm_vision_config["image_size"] // config.mm_vision_config["patch_size"]) ** 2
    records = load_data(data_args, checkpoint, training_args.model_max_length, patches)
    base = describe_base(model_args.model_name_or_path, checkpoint, training_args.bits)
    checkpoint = add_projector(checkpoint, model_args, training_args.seed)
    if training_args.lora_weight_path:
        checkpoint = add_what_was_trained(checkpoint, model_args, training_args)

    kind = "lora" if training_args.lora_enable else "projector" if model_args.tune_mm_mlp_adapter else "full"
    if training_args.device.type == "cuda" and _is_first():
        rank = adapter_rank(training_args)
        lengths = [len(record.input_ids) + len(record.images) * (patches - 1) for record in records]
        free = free_memory(training_args.device)
        print(describe_memory(config, training_args, kind, rank, lengths, free), flush=True)
    model = load_model(checkpoint, kind, model_args, training_args)
    beside = surroundings(checkpoint, base, model_args, data_args, training_args)
    dataset = SupervisedDataset(
        records,
        checkpoint.image_processor,
        ImageSettings(config.image_aspect_ratio, config.image_grid_pinpoints),
        patches,
    )
    padding = checkpoint.tokenizer.pad_token_id or 0
    trainer = LlavaTrainer(
        model,
        training_args,
        saver=Saver(model, beside, kind, training_args.weight_dtype),
        train_dataset=dataset,
        data_collator=SupervisedCollator(padding, checkpoint.image_processor.crop_size["height"]),
        callbacks=[FileLog()],
    )
    if _is_first():
        print(describe_run(model, records, checkpoint.tokenizer, _facts(checkpoint, kind, training_args)), flush=True)
    trainer.train(resume_from_checkpoint=find_resume_point(training_args))
    trainer.save_state()
    trainer.save_model()


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


def load_data(data_args: DataArguments, checkpoint: Checkpoint, max_length: int, patches: int) -> list[EncodedRecord]:
    """Read and encode the training data.

    Raises:
        DataError: if rows can't be used and were not asked to be left out, or none is left.
    """
    rows = read_records(data_args.data_path)
    records, problems = encode_records(
        rows,
        checkpoint.config.conversation_template,
        checkpoint.tokenizer,
        image_folder=data_args.image_folder,
        patches_per_image=patches,
        max_length=max_length,
    )
    if problems:
        message = describe_problems(data_args.data_path, problems, len(rows))
        if data_args.on_bad_row == "error" or not records:
            raise DataError(f"{message}\nmend them, or pass --on_bad_row skip to leave them out")
        logger.warning("%s\nthey are left out", message)
    return records


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
    config.use_mm_proj = True
    flags = as_json(model_args, data_args, training_args)
    return Surroundings(config, checkpoint.tokenizer, checkpoint.image_processor, flags)


def find_resume_point(training_args: TrainingArguments) -> str | None:
    """Return the checkpoint to continue from: the one asked for, else the output directory's newest complete one."""
    asked = training_args.resume_from_checkpoint
    if asked and asked not in ("auto", "True", "true"):
        return asked
    # The trainer's state is written last, so a checkpoint without it was cut off.
    complete = [path.parent for path in Path(training_args.output_dir).glob("checkpoint-*/trainer_state.json")]
    numbered = {int(path.name.rpartition("-")[2]): path for path in complete if path.name.rpartition("-")[2].isdigit()}
    if not numbered:
        return None
    newest = numbered[max(numbered)]
    logger.info("continuing from %s", newest)
    return str(newest)


def _facts(checkpoint: Checkpoint, kind: str, training_args: TrainingArguments) -> list[tuple[str, str]]:
    per_step = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    return [
        ("output", f"{kind} -> {training_args.output_dir}"),
        ("template", checkpoint.config.conversation_template),
        ("image aspect ratio", str(checkpoint.config.image_aspect_ratio)),
        ("dtype", f"{training_args.weight_dtype} on {training_args.device}, {training_args.world_size} process(es)"),
        ("learning rate", f"{training_args.learning_rate}, projector {training_args.mm_projector_lr or 'the same'}"),
        ("rows a step", str(per_step)),
    ]


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _fail(error: object, *, code: int) -> int:
    if _is_first():
        print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
