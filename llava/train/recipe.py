"""What a run is about to do, in words, before it does it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.records import EncodedRecord
from llava.tokenization import LlavaTokenizer


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
