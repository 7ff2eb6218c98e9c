"""Put image features into token embeddings: a function of tensors, without model or config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


class SplicedInputs(NamedTuple):
    """What the LLM takes: embeddings (B, S, D); mask (B, S) bool; positions and labels (B, S) int64, labels or None."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None


def splice_image_features(
    input_ids: Tensor,
    image_features: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor],
    *,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    max_length: int | None = None,
    padding_side: str = "right",
) -> SplicedInputs:
    """Replace every `IMAGE_TOKEN_INDEX` by the patch features of its image.

    Args:
        input_ids: (B, T) int64; images are consumed in reading order, row by row.
        image_features: one (P, D) tensor per placeholder, on the embedding's device and dtype; P may differ.
        embed: token embedding, (N,) -> (N, D).
        labels: (B, T) int64; patches receive `IGNORE_INDEX`.
        attention_mask: (B, T), nonzero where a token counts; padding on either side is dropped and laid anew.
        max_length: in spliced tokens; what is behind it is cut off, as in the original.
        padding_side: "right" or "left", of the result.

    Returns:
        inputs_embeds (B, S, D), attention_mask (B, S) bool, position_ids (B, S) counting from 0 at each row's first
        token, labels (B, S) or None. Padding has embedding 0, position 0 and label `IGNORE_INDEX`.

    Raises:
        ValueError: if the number of placeholders differs from `len(image_features)`, or the padding side has another
            name.
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side is {padding_side!r}; choose right or left")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    placeholders = int((input_ids[keep] == IMAGE_TOKEN_INDEX).sum())
    if placeholders != len(image_features):
        raise ValueError(
            f"the prompts hold {placeholders} image placeholders, but {len(image_features)} images were given"
        )
    row_labels = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
    features = iter(image_features)
    rows = [
        _splice_row(ids[kept], targets[kept], features, embed)
        for ids, targets, kept in zip(input_ids, row_labels, keep, strict=True)
    ]
    rows = [(embeds[:max_length], targets[:max_length]) for embeds, targets in rows]
    return _pad_rows(rows, padding_side, with_labels=labels is not None)


def _splice_row(
    ids: Tensor, labels: Tensor, features: Sequence[Tensor], embed: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Splice one row without padding; takes its images from the iterator `features`."""
    is_image = ids == IMAGE_TOKEN_INDEX
    text_embeds = embed(ids[~is_image])  # one lookup for all the row's text
    pieces, targets, text_start, label_start = [], [], 0, 0
    for position in is_image.nonzero().flatten().tolist():
        text_stop = text_start + position - label_start
        patches = next(features)
        pieces += [text_embeds[text_start:text_stop], patches.to(text_embeds)]
        targets += [labels[label_start:position], labels.new_full((len(patches),), IGNORE_INDEX)]
        text_start, label_start = text_stop, position + 1
    pieces.append(text_embeds[text_start:])
    targets.append(labels[label_start:])
    return torch.cat(pieces), torch.cat(targets)


def _pad_rows(rows: list[tuple[Tensor, Tensor]], padding_side: str, *, with_labels: bool) -> SplicedInputs:
    length = max(len(embeds) for embeds, _ in rows)
    device = rows[0][0].device
    embeds, masks, positions, labels = [], [], [], []
    for row, targets in rows:
        missing = length - len(row)
        padding = (missing, 0) if padding_side == "left" else (0, missing)
        embeds.append(torch.nn.functional.pad(row, (0, 0, *padding)))
        masks.append(torch.nn.functional.pad(torch.ones(len(row), dtype=torch.bool, device=device), padding))
        positions.append(torch.nn.functional.pad(torch.arange(len(row), device=device), padding))
        labels.append(torch.nn.functional.pad(targets, padding, value=IGNORE_INDEX))
    return SplicedInputs(
        torch.stack(embeds), torch.stack(masks), torch.stack(positions), torch.stack(labels) if with_labels else None
    )
