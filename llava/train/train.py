"""Finetune LLaVA-1.5, or pretrain its projector: load, choose what learns, data, trainer, save.

Run by the scripts in `scripts/v1_5`: `deepspeed llava/train/train_mem.py --model_name_or_path ... --data_path ...`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence

import torch
import transformers
from transformers import TrainerCallback

from llava.data.dataset import ImageSettings
from llava.model.checkpoint import Checkpoint
from llava.model.configuration import LlavaConfig, features_per_image
from llava.model.devices import free_memory
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.callbacks import CurvePlot, EarlyStopping, LastValidation, NamelessBuffers
from llava.train.command_line import parse_arguments
from llava.train.data_check import load_both
from llava.train.packs import Order, choose_feed, choose_order, prepare_model
from llava.train.recipe import describe_memory, describe_run
from llava.train.recompute import KeepActivations
from llava.train.resume import find_resume_point
from llava.train.run_record import add_to_record, run_facts
from llava.train.saving import Saver
from llava.train.signals import Stopped
from llava.train.starting_point import (
    adapter_rank,
    add_projector,
    add_what_was_trained,
    describe_base,
    load_model,
    open_for_training,
    surroundings,
)
from llava.train.trainer import LOG_FILE, FileLog, LlavaTrainer
from llava.train.validators import Validator, build_validator

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    logging.basicConfig(level=logging.INFO if _is_first() else logging.WARNING, format="%(message)s")
    try:
        arguments = parse_arguments(argv)
    except ValueError as error:
        return _fail(error, code=2)
    try:
        train(*arguments)
    except Stopped as stop:
        if _is_first():
            print(stop, file=sys.stderr)
        return stop.code
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
        ValueError: if data, checkpoint and flags don't fit each other, or a loss is no number.
        Stopped: if a signal asked for the end; the state is saved.
    """
    warn_of_idle_gpus(training_args)
    transformers.set_seed(training_args.seed)
    checkpoint = open_for_training(model_args, data_args, training_args.cache_dir)
    config = checkpoint.config
    config.tokenizer_model_max_length = training_args.model_max_length
    checkpoint.tokenizer.model_max_length = training_args.model_max_length
    patches = features_per_image(config, config.mm_vision_config)
    records, validation = load_both(data_args, training_args, checkpoint, patches, is_first=_is_first())
    base = describe_base(model_args.model_name_or_path, checkpoint, training_args.bits)
    checkpoint = add_projector(checkpoint, model_args, training_args.seed)
    if training_args.lora_weight_path:
        checkpoint = add_what_was_trained(checkpoint, model_args, training_args)

    kind = "lora" if training_args.lora_enable else "projector" if model_args.tune_mm_mlp_adapter else "full"
    rank = adapter_rank(training_args) if kind == "lora" else 0
    order = choose_order(records, patches, training_args)
    if training_args.device.type == "cuda" and _is_first():
        _print_memory(config, training_args, kind, rank, order)
    model = load_model(checkpoint, kind, model_args, training_args)
    beside = surroundings(checkpoint, base, model_args, data_args, training_args)
    facts = run_facts(records, kind=kind, base_fingerprint=base["base_model_fingerprint"], training_args=training_args)
    beside = dataclasses.replace(beside, training=add_to_record(beside.training, facts))
    layers_run = prepare_model(model, training_args)
    settings = ImageSettings(config.image_aspect_ratio, config.image_grid_pinpoints)
    padding = checkpoint.tokenizer.pad_token_id or 0
    feed = choose_feed(order, checkpoint.image_processor, settings, padding, training_args, layers_run)
    validator = build_validator(validation, checkpoint, model, data_args, training_args) if validation else None
    trainer = LlavaTrainer(
        model,
        training_args,
        saver=Saver(model, beside, kind, training_args.weight_dtype),
        train_dataset=feed.dataset,
        train_sampler=feed.sampler,
        data_collator=feed.collator,
        validator=validator,
        callbacks=[*_callbacks(training_args), KeepActivations(model, rank=rank, positions=feed.positions)],
    )
    if _is_first():
        described = _facts(checkpoint, kind, training_args, validator)
        print(describe_run(model, records, checkpoint.tokenizer, described), flush=True)
    resume_point = find_resume_point(training_args, beside.training, LOG_FILE)
    if resume_point is None:
        _check_sanity(trainer, training_args.sanity_check)
    trainer.train(resume_from_checkpoint=resume_point)
    trainer.save_state()
    trainer.save_model()


def warn_of_idle_gpus(training_args: TrainingArguments) -> None:
    """Say so if a process that is alone leaves GPUs unused."""
    here = torch.cuda.device_count() if training_args.device.type == "cuda" else 0
    if training_args.world_size == 1 and here > 1:
        logger.warning(
            "one process trains on one GPU, and %d are here; start a process for each, as scripts/v1_5 and torchrun do",
            here,
        )


def _print_memory(config: LlavaConfig, training_args: TrainingArguments, kind: str, rank: int, order: Order) -> None:
    lengths = order.planned_lengths(training_args.train_batch_size)
    free = free_memory(training_args.device)
    print(describe_memory(config, training_args, kind, rank, lengths, free), flush=True)


def _check_sanity(trainer: LlavaTrainer, n_steps: int) -> None:
    if n_steps:
        before, after = trainer.check_first_batch(n_steps)
        logger.info("first batch alone: loss %.4f, after %d steps %.4f", before, n_steps, after)


def _callbacks(training_args: TrainingArguments) -> list[TrainerCallback]:
    patience = training_args.early_stopping_patience
    stopping = [] if patience is None else [EarlyStopping(patience)]
    return [FileLog(), LastValidation(), *stopping, CurvePlot(), NamelessBuffers()]


def _facts(
    checkpoint: Checkpoint, kind: str, training_args: TrainingArguments, validator: Validator | None
) -> list[tuple[str, str]]:
    per_step = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    return [
        ("output", f"{kind} -> {training_args.output_dir}"),
        ("template", checkpoint.config.conversation_template),
        ("image aspect ratio", str(checkpoint.config.image_aspect_ratio)),
        ("dtype", f"{training_args.weight_dtype} on {training_args.device}, {training_args.world_size} process(es)"),
        ("learning rate", f"{training_args.learning_rate}, projector {training_args.mm_projector_lr or 'the same'}"),
        ("rows a step", str(per_step)),
        *([("validation", validator.describe())] if validator else []),
    ]


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _fail(error: object, *, code: int) -> int:
    if _is_first():
        print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
