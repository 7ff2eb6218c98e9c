"""Finetune LLaVA-1.5, or pretrain its projector: load, choose what learns, data, trainer, save.

Run by the scripts in `scripts/v1_5`: `deepspeed llava/train/train_mem.py --model_name_or_path ... --data_path ...`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from llava.data.dataset import ImageSettings
from llava.data.records import DataError, EncodedRecord, describe_problems, encode_records, read_records
from llava.model.checkpoint import Checkpoint
from llava.model.devices import free_memory
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from llava.train.packs import choose_feed, choose_order, features_per_image, prepare_model
from llava.train.recipe import describe_memory, describe_run
from llava.train.recompute import KeepActivations
from llava.train.saving import Saver
from llava.train.starting_point import (
    adapter_rank,
    add_projector,
    add_what_was_trained,
    describe_base,
    load_model,
    open_for_training,
    surroundings,
)
from llava.train.trainer import FileLog, LlavaTrainer

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
    patches = features_per_image(config)
    records = load_data(data_args, checkpoint, training_args.model_max_length, patches)
    base = describe_base(model_args.model_name_or_path, checkpoint, training_args.bits)
    checkpoint = add_projector(checkpoint, model_args, training_args.seed)
    if training_args.lora_weight_path:
        checkpoint = add_what_was_trained(checkpoint, model_args, training_args)

    kind = "lora" if training_args.lora_enable else "projector" if model_args.tune_mm_mlp_adapter else "full"
    rank = adapter_rank(training_args) if kind == "lora" else 0
    order = choose_order(records, patches, training_args)
    if training_args.device.type == "cuda" and _is_first():
        lengths = order.planned_lengths(training_args.train_batch_size)
        free = free_memory(training_args.device)
        print(describe_memory(config, training_args, kind, rank, lengths, free), flush=True)
    model = load_model(checkpoint, kind, model_args, training_args)
    beside = surroundings(checkpoint, base, model_args, data_args, training_args)
    layers_run = prepare_model(model, training_args)
    settings = ImageSettings(config.image_aspect_ratio, config.image_grid_pinpoints)
    padding = checkpoint.tokenizer.pad_token_id or 0
    feed = choose_feed(order, checkpoint.image_processor, settings, padding, training_args, layers_run)
    trainer = LlavaTrainer(
        model,
        training_args,
        saver=Saver(model, beside, kind, training_args.weight_dtype),
        train_dataset=feed.dataset,
        train_sampler=feed.sampler,
        data_collator=feed.collator,
        callbacks=[FileLog(), KeepActivations(model, rank=rank, positions=feed.positions)],
    )
    if _is_first():
        print(describe_run(model, records, checkpoint.tokenizer, _facts(checkpoint, kind, training_args)), flush=True)
    trainer.train(resume_from_checkpoint=find_resume_point(training_args))
    trainer.save_state()
    trainer.save_model()


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
