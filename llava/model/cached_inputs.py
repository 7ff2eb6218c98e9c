"""Arguments of a forward pass with a KV cache: the cache's name, the mask over cached positions, position ids.

Decoding loops written for the original count tokens where the KV cache counts spliced positions: their attention mask
has one column per image, the cache one position per patch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaForCausalLM

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""The installed transformers' name for the KV cache: `cache` since 5.24, which drops the older name in 5.40."""


def take_cache(past_key_values: Any, cache: Any) -> Cache | None:
    """Return the KV cache of a call, whichever name it came under.

    Args:
        past_key_values: a `Cache`, (keys, values) per layer as transformers 4 had it, or None.
        cache: the same, under the newer name.

    Raises:
        ValueError: if two are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are both given; pass one of them")
    given = cache if past_key_values is None else past_key_values
    if given is None or isinstance(given, Cache):
        return given
    filled = DynamicCache()
    for layer, (keys, values, *_) in enumerate(given):
        filled.update(keys, values, layer)
    return filled


def cache_argument(cache: Cache | None) -> dict[str, Cache]:
    """Return the keyword argument that hands a KV cache on to transformers; none where there is no cache."""
    return {} if cache is None else {CACHE_ARGUMENT: cache}


def cached_length(cache: Cache | None) -> int:
    """Return the number of positions in a KV cache."""
    return 0 if cache is None else int(cache.get_seq_length())


class SplicedPrompts(NamedTuple):
    """What a KV cache doesn't say about the prompts in it; `note_prompts` stores it on the cache.

    Attributes:
        mask: (B, S) bool, over spliced positions.
        token_mask: (B, T) bool, over ids, one per image.
    """

    mask: Tensor
    token_mask: Tensor

    @property
    def added(self) -> int:
        """S - T, positions that splicing adds."""
        return self.mask.shape[1] - self.token_mask.shape[1]

    def is_counted_by(self, attention_mask: Tensor) -> bool:
        """Tell whether a mask (B, columns) counts ids where it could as well count positions, because T = S."""
        before = attention_mask[:, : self.mask.shape[1]]
        return self.added == 0 and torch.equal(before.bool(), self.token_mask)


def note_prompts(output: Any, mask: Tensor, token_mask: Tensor) -> None:
    """Store on the cache in a model's output, if there is one, how the images of its prompts were spliced."""
    values = output if isinstance(output, tuple) else output.values()
    for cache in (value for value in values if isinstance(value, Cache)):
        cache.spliced_prompts = SplicedPrompts(mask, token_mask)


def noted_prompts(cache: Cache | None, rows: int) -> SplicedPrompts | None:
    """Return what `note_prompts` stored; None if it doesn't fit: batches of another size, caches that were pruned."""
    noted = vars(cache).get("spliced_prompts") if cache is not None else None
    fits = noted is not None and noted.mask.shape[0] == rows and noted.mask.shape[1] <= cached_length(cache)
    return noted if fits else None


def is_left_padded(attention_mask: Tensor) -> bool:
    """Tell whether rows of a mask (B, T) start with padding, and none has padding elsewhere."""
    mask = attention_mask.bool()
    return bool((mask[:, 1:] >= mask[:, :-1]).all() & ~mask[:, :1].all())


def padding_side(attention_mask: Tensor | None, default: str) -> str:
    """Return the side on which spliced rows are padded: that of the mask's padding, else `default`."""
    return "left" if attention_mask is not None and is_left_padded(attention_mask) else default


def mask_with_cache(
    attention_mask: Tensor, cached: int, new: Sequence[int], side: str = "right", noted: SplicedPrompts | None = None
) -> Tensor:
    """Extend a mask that is shorter than the cache and the new tokens together.

    A shorter mask counts an image as one column; the missing columns are image patches, which are never padding.

    Args:
        attention_mask: (B, columns); the last ones belong to the new tokens.
        cached: positions in the KV cache.
        new: (B, T), shape of the new tokens.
        side: of the padding where the mask does not show it, see `padding_side`.
        noted: see `noted_prompts`; None = rows are assumed to have equally many image patches.

    Returns:
        (B, cached + T), of the mask's dtype.

    Raises:
        ValueError: if the mask has another number of rows, fewer columns than new tokens, or more than positions.
    """
    rows, tokens = new
    fits = attention_mask.ndim == 2 and attention_mask.shape[0] == rows
    if not fits or not tokens <= attention_mask.shape[1] <= cached + tokens:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}, but there are {tokens} new tokens in {rows} rows and "
            f"{cached} cached positions; it needs {cached + tokens} columns, or one per image instead of one per patch"
        )
    is_whole = attention_mask.shape[1] == cached + tokens
    if is_whole and not (noted is not None and noted.is_counted_by(attention_mask)):
        return attention_mask
    if noted is not None:
        later = attention_mask[:, -(cached + tokens - noted.mask.shape[1]) :]  # generated and new
        between = attention_mask.new_ones(rows, cached + tokens - noted.mask.shape[1] - later.shape[1])
        return torch.cat([noted.mask.to(attention_mask.dtype), between, later], dim=1)
    before, own = attention_mask.split([attention_mask.shape[1] - tokens, tokens], dim=1)
    before = before[:, before.bool().any(dim=0)]  # splicing drops columns that are padding in every row
    columns = torch.arange(cached, device=before.device)
    if padding_side(before, side) == "left":
        padding = (before == 0).sum(dim=1, keepdim=True)
        extended = (columns >= padding).to(before.dtype)  # (B, cached)
    else:  # padding follows each prompt, before the generated tokens
        extended = torch.cat([before.new_ones(rows, cached - before.shape[1]), before], dim=1)
    return torch.cat([extended, own], dim=1)


def positions_in_rows(attention_mask: Tensor, tokens: int) -> Tensor:
    """Return position ids (B, tokens) of the last columns of a mask (B, S): padding is not counted."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -tokens:]


def fit_to_cache(
    attention_mask: Any, position_ids: Tensor | None, cache: Cache | None, new: Sequence[int], side: str
) -> tuple[Any, Tensor | None]:
    """Return the mask over cached and new positions, and the position ids of the new ones that go with it.

    Args:
        attention_mask: (B, columns), see `mask_with_cache`; None = all tokens after noted prompts count, and without
            noted prompts it stays None. One with other dimensions is returned as it is.
        position_ids: (B, T); counted again if the mask had to be extended: they then lack image patches too.
        cache: filled or not.
        new: (B, T), shape of the new tokens.
        side: of the padding where the mask does not show it.

    Raises:
        ValueError: as `mask_with_cache`, and if there are more or fewer position ids than new tokens.
    """
    if position_ids is not None and position_ids.shape[-1] != new[1]:
        raise ValueError(
            f"position_ids are {tuple(position_ids.shape)}, but there are {new[1]} new tokens; pass one for each"
        )
    noted = noted_prompts(cache, new[0])
    if attention_mask is None and noted is not None:
        attention_mask = noted.mask.new_ones(tuple(new))
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return attention_mask, position_ids
    mask = mask_with_cache(attention_mask, cached_length(cache), new, side, noted)
    if position_ids is None or mask is not attention_mask:
        position_ids = positions_in_rows(mask, new[1])
    return mask, position_ids
