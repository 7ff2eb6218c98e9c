"""LLaVA over packs: training rows in which several suffixes share a prefix, which is computed once.

`llava.data.packing.Pack` defines a pack's arrays, `llava.model.packed.masks` which positions attend to which. The loss
and every gradient are those of the same records in rows of their own.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.model.configuration import LlavaConfig
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.packed.fused_lora import FusedLora, why_not_fused
from llava.model.packed.masks import block_mask, dense_mask, dense_mask_rows
from llava.model.splice import place_features

PACK_ATTENTION = "llava_pack"
"""Name under which transformers knows attention that takes block masks and dense ones."""
QUERY_MULTIPLE = 64
"""The number of last-layer queries and of logits is a multiple of it."""


class PackedLlavaForCausalLM(LlavaLlamaForCausalLM):
    """LLaVA as it is trained: `forward` takes packs, too; everything else is its base class's.

    Attributes:
        has_flex_attention: packs go through FlexAttention instead of SDPA with a dense mask.
        has_compiled_layers: packs go through compiled layers.
        fused_lora: computes the LLM's layers over packs; None = its own modules do.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.has_flex_attention = False
        self.has_compiled_layers = False
        self.fused_lora: FusedLora | None = None

    def use_flex_attention(self) -> None:
        """Compute packs by FlexAttention, whose backward pass needs CUDA; padded rows keep SDPA."""
        AttentionInterface.register(PACK_ATTENTION, _flex_or_sdpa)
        AttentionMaskInterface.register(PACK_ATTENTION, AttentionMaskInterface()["sdpa"])
        self.set_attn_implementation(PACK_ATTENTION)
        self.has_flex_attention = True

    def compile_layers(self, **options: Any) -> None:
        """Compile the LLM's layers for packs; padded rows keep running uncompiled.

        The layers share one compilation; each length of rows takes another one.

        Args:
            options: further ones of `torch.compile`.
        """
        for layer in self.model.layers:
            layer.compile(dynamic=False, **options)
        self.has_compiled_layers = True

    def fuse_lora(self, *, compiled: bool, fp8: bool = False) -> str | None:
        """Compute packs by `FusedLora`; return why the layers can't be fused, None if they are."""
        reason = why_not_fused(self, fp8=fp8)
        if reason is None:
            self.fused_lora = FusedLora(self, compiled=compiled, fp8=fp8)
        return reason

    @contextlib.contextmanager
    def uncompiled_packs(self) -> Iterator[None]:
        """Let packs take dense masks and uncompiled layers: in validation their lengths are too many to compile."""
        had_flex_attention, self.has_flex_attention = self.has_flex_attention, False
        try:
            with _eager(self.has_compiled_layers or self.fused_lora is not None):
                yield
        finally:
            self.has_flex_attention = had_flex_attention

    def train(self, mode: bool = True) -> PackedLlavaForCausalLM:
        """Switch the mode; does nothing if training is on already, as trainers call it in every step."""
        tower = self.get_vision_tower()
        is_frozen_since = tower is not None and tower.training and tower.is_frozen
        return self if mode and self.training and not is_frozen_since else super().train(mode)

    def forward(
        self, input_ids: Tensor | None = None, *args: Any, groups: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """Compute a pack if there are `groups`, see `forward_pack`; else prompts with their images."""
        if groups is not None:
            return self.forward_pack(input_ids, *args, groups=groups, **kwargs)
        with _eager(self.has_compiled_layers):
            return super().forward(input_ids, *args, **kwargs)

    forward.__signature__ = inspect.signature(LlavaLlamaForCausalLM.forward)  # read by transformers' `generate`

    def forward_pack(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor,
        position_ids: Tensor,
        images: Tensor | Sequence[Tensor],
        groups: Tensor,
        suffixes: Tensor,
        supervised: Tensor,
        image_positions: Tensor,
        patches: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the loss of a pack, whose arrays are those of `llava.data.packing.Pack`.

        Args:
            input_ids, labels, position_ids, groups, suffixes: (B, S) int64.
            images: as in `LlavaLlamaForCausalLM.forward`, each once.
            supervised: (supervised,) int64, flat indices of the positions that predict a supervised token.
            image_positions: (image positions,) int64, flat indices.
            patches: (image positions,) int64, index into the concatenated features of all images.
            num_items_in_batch: supervised tokens that the loss is divided by; None = those of the pack.
            kwargs: no effect; what peft hands on besides.

        Returns:
            the loss, and logits (supervised, W).
        """
        features = torch.cat(self._encode_each(images))[patches]  # (image positions, D)
        embeds = self.get_input_embeddings()(input_ids)  # (B, S, D)
        embeds = place_features(embeds, image_positions, features)
        hidden = self._run_layers(embeds, position_ids, groups, suffixes, supervised)  # (queries, D)
        logits = self.lm_head(hidden)[: len(supervised)]  # (supervised, W)
        loss = mean_loss(logits, labels.flatten()[supervised + 1], num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def _run_layers(
        self, embeds: Tensor, position_ids: Tensor, groups: Tensor, suffixes: Tensor, supervised: Tensor
    ) -> Tensor:
        """Return the LLM's output at `supervised` and some more positions, see `pad_queries`, (queries, D)."""
        mask = (block_mask if self.has_flex_attention else dense_mask)(groups, suffixes)
        queries = pad_queries(supervised)
        if self.fused_lora is not None:
            return self.fused_lora(embeds, mask, position_ids, queries, dense_mask_rows(groups, suffixes, queries))
        output = self.model(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)[queries]


def pad_queries(supervised: Tensor) -> Tensor:
    """Return indices with the first one repeated at the end, up to a multiple of `QUERY_MULTIPLE`.

    cuBLAS chooses a kernel for each number of rows it has not met, 4 ms of the host for a product: seen in a profile of
    LoRA training on an H100 (PyTorch 2.11), where each step has another number of supervised tokens.
    """
    return torch.cat([supervised, supervised[:1].expand(-len(supervised) % QUERY_MULTIPLE)])


def mean_loss(logits: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Return the cross entropy of (supervised, W) logits, at least in fp32.

    Args:
        logits: (supervised, W).
        targets: (supervised,) int64.
        num_items_in_batch: the sum is divided by it; None = by the number of targets.
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = nn.functional.cross_entropy(precise, targets, reduction="sum")
    return total / (len(targets) if num_items_in_batch is None else num_items_in_batch)


def _flex_or_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    name = "flex_attention" if isinstance(attention_mask, BlockMask) else "sdpa"
    return AttentionInterface()[name](module, query, key, value, attention_mask, **kwargs)


def _eager(is_compiled: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which compiled layers run uncompiled."""
    return torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
