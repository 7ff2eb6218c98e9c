"""Splice image features into token embeddings: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


class SplicedInputs(NamedTuple):
    """Inputs of the LLM: embeddings (B, S, D), mask (B, S) bool, positions (B, S) int64, labels (B, S) or None."""

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
        image_features: one (P, D) tensor per placeholder; P may differ.
        embed: token embedding, (tokens,) -> (tokens, D).
        labels: (B, T) int64; patches receive `IGNORE_INDEX`.
        attention_mask: (B, T), nonzero where a token counts; padding on either side is dropped.
        max_length: S at most; longer rows are truncated, as in the original.
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
    keep = token_mask(input_ids, attention_mask)
    placeholders = int((input_ids[keep] == IMAGE_TOKEN_INDEX).sum())
    if placeholders != len(image_features):
        raise ValueError(
            f"the prompts hold {placeholders} image placeholders, but {len(image_features)} images were given"
        )
    row_labels = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
    features = iter(image_features)
    rows = [
        splice_row(ids[kept], targets[kept], features, embed)
        for ids, targets, kept in zip(input_ids, row_labels, keep, strict=True)
    ]
    rows = [(embeds[:max_length], targets[:max_length]) for embeds, targets in rows]
    return pad_rows(rows, padding_side, with_labels=labels is not None)


def splice_row(
    ids: Tensor, labels: Tensor, features: Sequence[Tensor], embed: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Splice one row without padding, (T,) -> (S, D), (S,); takes its images from the iterator `features`."""
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


def pad_rows(rows: list[tuple[Tensor, Tensor]], padding_side: str, *, with_labels: bool) -> SplicedInputs:
    """Pad rows of embeddings (S, D) and labels (S,) to one batch; see `splice_image_features`."""
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


def place_features(embeds: Tensor, positions: Tensor, features: Tensor) -> Tensor:
    """Return embeddings (B, S, D) with features (positions, D) in place of those at flat indices."""
    return embeds.flatten(0, 1).index_copy(0, positions, features.to(embeds)).view_as(embeds)


def split_tiles(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return each image as (tiles, 3, height, width), one of (3, height, width) as a single tile.

    Raises:
        TypeError: if an image is not a tensor.
        ValueError: if one has another number of dimensions, or they differ in size.
    """
    for image in images:
        if not isinstance(image, Tensor):
            raise TypeError(f"images hold a {type(image).__name__}; pass the pixels that process_images makes of them")
    shapes = [tuple(image.shape) for image in images]
    if any(len(shape) not in (3, 4) for shape in shapes) or len({shape[-3:] for shape in shapes}) > 1:
        given = tuple(images.shape) if isinstance(images, Tensor) else f"a list of {', '.join(map(str, shapes))}"
        raise ValueError(
            f"images are {given}; pass (N, 3, height, width), or a list of (3, height, width) or "
            "(tiles, 3, height, width), all of one size"
        )
    return [image[None] if image.ndim == 3 else image for image in images]


def token_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the attention mask over ids, (B, T) bool; without one, all ids count.

    Raises:
        ValueError: if ids or mask are not (B, T).
    """
    _check_ids(input_ids)
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}, but input_ids are {tuple(input_ids.shape)}; it needs a "
            "column for each id, of which an image has one"
        )
    return attention_mask.bool()


def _check_ids(input_ids: Tensor) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids are {tuple(input_ids.shape)}; pass (B, T), a single prompt as input_ids[None]")


def takes_images(input_ids: Tensor, images: Tensor | Sequence[Tensor] | None, cached: int) -> bool:
    """Tell whether a call's images go into its prompts; a decoding loop passes them again at every step.

    Args:
        input_ids: (B, T).
        images: of the call.
        cached: positions in the KV cache.

    Raises:
        ValueError: if the ids are not (B, T), or there are placeholders without images or after a filled cache.
    """
    _check_ids(input_ids)
    is_step = cached > 0 or input_ids.shape[1] == 1
    if images is None and input_ids.shape[1] == 1:
        return False  # a step of generation: don't wait for the device
    placeholders = int((input_ids == IMAGE_TOKEN_INDEX).sum())
    if cached and placeholders:
        raise ValueError(
            f"input_ids hold {placeholders} image placeholders, but the cache holds {cached} positions already; pass "
            "the new tokens alone, or inputs_embeds from `splice` for a further image"
        )
    if images is None:
        assign_images([placeholders], [])
        return False
    return placeholders > 0 or not is_step


def assign_images(counts: Sequence[int], features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split images into those that fill placeholders and spare ones of rows without placeholders.

    Args:
        counts: placeholders of each row; if there are none at all, every image is spare.
        features: one tensor per image, in reading order.

    Returns:
        used, in reading order, and spare.

    Raises:
        ValueError: if the number of images fits neither reading.
    """
    if not any(counts):
        return [], list(features)
    if len(features) == sum(counts):
        return list(features), []
    if len(features) != sum(max(count, 1) for count in counts):
        raise ValueError(f"the prompts hold {sum(counts)} image placeholders, but {len(features)} images were given")
    used, spare, start = [], [], 0
    for count in counts:
        stop = start + max(count, 1)
        (used if count else spare).extend(features[start:stop])
        start = stop
    return used, spare
