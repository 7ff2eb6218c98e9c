"""Print the run summary and the memory estimate before training starts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.records import EncodedRecord
from llava.files.terminal_text import print_text
from llava.model.capabilities import capabilities_of
from llava.model.checkpoint.checkpoint import Checkpoint
from llava.model.configuration import LlavaConfig
from llava.model.devices import free_memory
from llava.model.memory import ModelSizes
from llava.model.plan import Training, describe_plan
from llava.tokenization.llama_tokenizer import LlavaTokenizer
from llava.train.flags.arguments import ModelArguments, is_first_process, is_offloaded, output_kind, zero_stage
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.model_setup import adapter_rank
from llava.train.packing_setup import BatchPlan, describe_execution
from llava.train.validation.evaluator import Evaluator


def print_summary(
    model: nn.Module,
    records: Sequence[EncodedRecord],
    checkpoint: Checkpoint,
    evaluator: Evaluator | None,
    model_args: ModelArguments,
    training_args: TrainingArguments,
) -> None:
    """Print what the first process is about to train: output, template, rates, parameters, rows, the first row."""
    if not is_first_process():
        return
    args, config = training_args, checkpoint.config
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings = [
        ("output", f"{output_kind(model_args, args)} -> {args.output_dir}"),
        ("template", config.conversation_template),
        ("image aspect ratio", str(config.image_aspect_ratio)),
        ("dtype", f"{args.weight_dtype} on {args.device}, {args.world_size} process(es)"),
        ("learning rate", f"{args.learning_rate}, projector {args.mm_projector_lr or 'the same'}"),
        ("rows a step", str(rows_per_step)),
        *([("validation", evaluator.describe())] if evaluator else []),
    ]
    print_text(describe_run(model, records, checkpoint.tokenizer, settings), flush=True)


def print_machine(config: LlavaConfig, training_args: TrainingArguments) -> None:
    """Print what the first process computes with: device, dtype, attention, compilation, kernels."""
    if is_first_process():
        can = capabilities_of(training_args.device)
        print_text(describe_execution(can, config.head_dim, training_args), flush=True)


def print_memory_plan(
    plan: BatchPlan, config: LlavaConfig, model_args: ModelArguments, training_args: TrainingArguments
) -> None:
    """Print the memory estimate of a GPU, before the weights are loaded; nothing on other devices."""
    if training_args.device.type == "cuda" and is_first_process():
        kind, rank = output_kind(model_args, training_args), adapter_rank(training_args)
        lengths = plan.planned_lengths(training_args.train_batch_size)
        free = free_memory(training_args.device)
        print(describe_memory(config, training_args, kind, rank, lengths, free), flush=True)


def mark_supervised(record: EncodedRecord, tokenizer: LlavaTokenizer) -> str:
    """Return a record's text with its supervised spans in `[[ ]]`."""
    text, run, was_supervised = "", [], False
    for token, label in [*zip(record.input_ids, record.labels, strict=True), (None, IGNORE_INDEX)]:
        is_supervised = label != IGNORE_INDEX
        if token is None or token == IMAGE_TOKEN_INDEX or is_supervised != was_supervised:
            span = tokenizer.decode(run) if run else ""
            text += f"[[{span}]]" if was_supervised else span
            text += DEFAULT_IMAGE_TOKEN if token == IMAGE_TOKEN_INDEX else ""
            run = []
        if token is not None and token != IMAGE_TOKEN_INDEX:
            run.append(token)
        was_supervised = is_supervised
    return text


def describe_run(
    model: nn.Module,
    records: Sequence[EncodedRecord],
    tokenizer: LlavaTokenizer,
    settings: Sequence[tuple[str, str]],
) -> str:
    """Return the run summary: `settings`, (name, value) each, then parameters, rows, tokens and the first record."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    supervised = sum(sum(label != IGNORE_INDEX for label in record.labels) for record in records)
    images = {path for record in records for path in record.images}
    lines = [
        *settings,
        ("trainable parameters", f"{trainable:,} of {total:,} ({100 * trainable / total:.2f} %)"),
        ("rows", f"{len(records):,}, {len(images):,} images"),
        ("supervised tokens", f"{supervised:,}, {supervised / len(records):.1f} a row"),
        ("first row", repr(mark_supervised(records[0], tokenizer))),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in lines)


def describe_memory(
    config: LlavaConfig, training_args: TrainingArguments, kind: str, rank: int, lengths: Sequence[int], available: int
) -> str:
    """Return the memory estimate: what the run needs on each GPU, what is free, and flags that would fit.

    Args:
        kind: from `output_kind`.
        rank: of the adapters, 0 without.
        lengths: of the rows, in positions.
        available: bytes free on the GPU, before the model is loaded.
    """
    run = Training(
        kind=kind,
        batch=training_args.per_device_train_batch_size,
        accumulation=training_args.gradient_accumulation_steps,
        length=max(lengths),
        is_padded=len(set(lengths)) > 1,
        rank=rank,
        dropout=training_args.lora_dropout,
        bits=training_args.bits,
        checkpointing=training_args.checkpoints_activations,
        zero=zero_stage(training_args.deepspeed),
        offload=is_offloaded(training_args.deepspeed),
        gpus=training_args.world_size,
    )
    return f"memory on each GPU, estimated\n{describe_plan(ModelSizes.of(config), run, available)}"
