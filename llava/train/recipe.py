"""What a run is about to do, in words, before it does it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.records import EncodedRecord
from llava.model.configuration import LlavaConfig
from llava.model.memory import ModelSizes
from llava.model.plan import Training, describe_plan
from llava.tokenization import LlavaTokenizer
from llava.train.arguments import TrainingArguments, is_offloaded, zero_stage


def mark_supervised(record: EncodedRecord, tokenizer: LlavaTokenizer) -> str:
    """Return a row's text with its supervised stretches in `[[ ]]`."""
    text, run, was_supervised = "", [], False
    for token, label in [*zip(record.input_ids, record.labels, strict=True), (None, IGNORE_INDEX)]:
        is_supervised = label != IGNORE_INDEX
        if token is None or token == IMAGE_TOKEN_INDEX or is_supervised != was_supervised:
            stretch = tokenizer.decode(run) if run else ""
            text += f"[[{stretch}]]" if was_supervised else stretch
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
    facts: Sequence[tuple[str, str]],
) -> str:
    """Return the recipe as a table of lines.

    Args:
        model: with `requires_grad` set.
        records: of the training data.
        tokenizer: of the model.
        facts: further lines, (what, value).
    """
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    supervised = sum(sum(label != IGNORE_INDEX for label in record.labels) for record in records)
    images = {path for record in records for path in record.images}
    lines = [
        *facts,
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
    """Return what the run needs on each GPU, what is there, and what would fit.

    Args:
        config: of the model.
        training_args: flags.
        kind: "lora", "projector" or "full".
        rank: of the adapters.
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
