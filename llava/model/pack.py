"""The LLM over packs: rows in which several questions stand behind one prefix, computed once.

What a pack's arrays mean is in `llava.data.packing.Pack`, who sees whom in `llava.model.tree_attention`. The loss and
every gradient are those of the same records in rows of their own.

Letters: `R` rows, `S` positions of a row, `K` supervised tokens, `M` positions of all images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.model.fused_layers import FusedLayers
from llava.model.tree_attention import block_pack_mask, tree_mask, tree_mask_rows

TREE_ATTENTION = "llava_tree"
"""Name under which transformers knows attention that takes FlexAttention's masks and dense ones."""
WANTED = 64
"""Positions of supervised tokens whose output is computed are a multiple of it."""


class PackedLlama(Protocol):
    """A Llama of transformers that says how it runs over packs.

    Attributes:
        model: its body.
        lm_head: gives the logits.
        attends_in_blocks: whether packs go through FlexAttention.
        compiles_packs: whether through compiled layers.
        fused_layers: stands in for the layers; None = they run themselves.
    """

    model: nn.Module
    lm_head: nn.Module
    attends_in_blocks: bool
    compiles_packs: bool
    fused_layers: FusedLayers | None

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Choose attention by the name that transformers knows it by."""


def forward_pack(
    model: PackedLlama,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor,
    layout: Mapping[str, Tensor],
    features: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
) -> CausalLMOutputWithPast:
    """Compute the loss of a pack.

    Args:
        model: whose LLM runs.
        input_ids: (R, S) int64.
        labels: (R, S) int64.
        position_ids: (R, S) int64.
        layout: `groups` and `branches` (R, S), `supervised` (K,), `image_positions` and `patches` (M,), all int64.
        features: of all images, one after the other, (patches of all, D).
        num_items_in_batch: supervised tokens that the loss is divided by; default: those of the pack.

    Returns:
        the loss, and logits (K, W) of the supervised tokens alone.
    """
    embeds = place_features(
        input_ids, layout["image_positions"], features[layout["patches"]], model.get_input_embeddings()
    )
    groups, branches, supervised = layout["groups"], layout["branches"], layout["supervised"]
    mask = (block_pack_mask if model.attends_in_blocks else tree_mask)(groups, branches)
    wanted = in_whole_blocks(supervised)
    if model.fused_layers is not None:
        hidden = model.fused_layers(embeds, mask, position_ids, wanted, tree_mask_rows(groups, branches, wanted))
    else:
        output = model.model(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)[wanted]
    logits = model.lm_head(hidden)[: len(supervised)]  # (K, W)
    loss = mean_loss(logits, labels.flatten()[supervised + 1], num_items_in_batch)
    return CausalLMOutputWithPast(loss=loss, logits=logits)


def in_whole_blocks(supervised: Tensor) -> Tensor:
    """Return indices (K,) with the first one repeated behind them, up to whole blocks of `WANTED`.

    cuBLAS looks for a kernel anew for each number of rows, 4 ms of the host for a product: seen in a profile of LoRA
    training on an H100 (PyTorch 2.11), where each step has another number of supervised tokens.
    """
    return torch.cat([supervised, supervised[:1].expand(-len(supervised) % WANTED)])


def place_features(
    input_ids: Tensor, image_positions: Tensor, features: Tensor, embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return embeddings (R, S, D) of tokens, with (M, D) features at the flat indices `image_positions`."""
    embeds = embed(input_ids)  # (R, S, D)
    return embeds.flatten(0, 1).index_copy(0, image_positions, features.to(embeds)).view_as(embeds)


def mean_loss(logits: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Return the cross entropy of (K, W) logits, at least in fp32, summed and divided by `num_items_in_batch` or K."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = nn.functional.cross_entropy(precise, targets, reduction="sum")
    return total / (len(targets) if num_items_in_batch is None else num_items_in_batch)


def attend_in_blocks(model: PackedLlama) -> None:
    """Let packs go through FlexAttention, which has a backward pass on CUDA alone; other input keeps PyTorch's SDPA."""
    AttentionInterface.register(TREE_ATTENTION, _attention)
    AttentionMaskInterface.register(TREE_ATTENTION, AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(TREE_ATTENTION)
    model.attends_in_blocks = True


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    name = "flex_attention" if isinstance(attention_mask, BlockMask) else "sdpa"
    return AttentionInterface()[name](module, query, key, value, attention_mask, **kwargs)


def compile_layers(model: PackedLlama, **options: Any) -> None:
    """Compile the LLM's layers for packs; other input keeps running uncompiled.

    The layers share what is compiled; each length of rows takes another compilation.

    Args:
        model: with adapters in place.
        options: further ones of `torch.compile`.
    """
    for layer in model.model.layers:
        layer.compile(dynamic=False, **options)
    model.compiles_packs = True


@contextlib.contextmanager
def uncompiled_packs(model: PackedLlama) -> Iterator[None]:
    """Within it packs have dense masks and run uncompiled: those of a validation are of every length."""
    in_blocks, model.attends_in_blocks = model.attends_in_blocks, False
    is_compiled = model.compiles_packs or model.fused_layers is not None
    try:
        with only_packs_compiled(is_compiled):
            yield
    finally:
        model.attends_in_blocks = in_blocks


def only_packs_compiled(is_compiled: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which compiled layers run uncompiled: validation has rows of every length."""
    return torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
