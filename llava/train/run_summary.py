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
from llava.tokenization.llama_tokenizer import LlavaTokenizer
from llava.train.flags.arguments import ModelArguments, is_first_process, output_kind
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.packing_setup import describe_execution
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
