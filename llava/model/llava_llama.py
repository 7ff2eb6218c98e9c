"""LLaVA-1.5: vision tower, projector and language model; the latter is transformers' Llama."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.attention.eager import eager_attention, refuse_recomputation
from llava.model.cached_inputs import (
    cache_argument,
    cached_length,
    fit_to_cache,
    note_prompts,
    noted_prompts,
    padding_side,
    take_cache,
)
from llava.model.configuration import LlavaConfig, features_per_image
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel, through_replacement
from llava.model.splice import (
    SplicedInputs,
    assign_images,
    splice_image_features,
    split_tiles,
    takes_images,
    token_mask,
)


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """Llama's body, to which `LlavaLlamaForCausalLM` adds the vision tower and the projector."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        LlamaModel.__init__(self, config)

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """Run the layers as transformers does; `output_attentions=True` takes eager attention for this call.

        Raises:
            ValueError: if activation checkpointing would recompute with another attention.
        """
        is_wanted = bool(kwargs.get("output_attentions", self.config.output_attentions))
        if is_wanted and self.training and torch.is_grad_enabled():
            refuse_recomputation(self)
        with eager_attention(is_wanted):
            return super().forward(*args, **kwargs)


class LlavaLlamaForCausalLM(LlamaForCausalLM, LlavaMetaForCausalLM):
    """Answers questions about images.

    `input_ids` hold `IMAGE_TOKEN_INDEX` where an image belongs; `images` are consumed in reading order. A row without
    placeholders may bring an image too, which is then ignored: the original's collators do so.
    """

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # LlamaForCausalLM's own would build another body
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._input_grads: RemovableHandle | None = None
        self.post_init()
        self.model.build_vision_modules()  # after post_init, whose initial values are Llama's

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *model_args: Any, **kwargs: Any) -> Any:
        """Load a model from any supported directory or hub id, in eval mode, its vision tower frozen.

        Args:
            pretrained_model_name_or_path: of full weights; the vision tower may be where the config says.
            model_args: of a derived class's `__init__`, after the config.
            kwargs: `config`, whose values replace those of the directory; keys of the config; options of
                `load_pretrained_model`. Without `device_map` the model is on the CPU.

        Raises:
            FileNotFoundError: if a file is missing.
            TypeError: if an option is unknown.
            ValueError: if files or options don't fit each other.
        """
        from llava.model.pretrained import load_from_pretrained  # its builder makes models of this class

        return load_from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are checkpointed; read by peft under this name, which transformers has deprecated."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def enable_input_require_grads(self) -> None:
        """Let the token embeddings' output require gradients; transformers would include the vision tower's patches."""
        self.disable_input_require_grads()
        self._input_grads = self.get_input_embeddings().register_forward_hook(_require_grad)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`; no effect if it was not called."""
        if self._input_grads is not None:
            self._input_grads.remove()
            self._input_grads = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the LLM over prompts with their images.

        With a filled KV cache, or ids one token wide, images are ignored: decoding loops pass them at every step.

        Args:
            input_ids: (B, T) int64, with `IMAGE_TOKEN_INDEX` where images go.
            attention_mask: (B, T); with a filled cache one column per cached and new position. One that counts an
                image as a single column is extended.
            labels: (B, T) int64, `IGNORE_INDEX` where nothing is supervised.
            images: (N, 3, height, width), or a list of (3, height, width); tiles of "anyres" as (N, tiles, 3, height,
                width) or a list of (tiles, 3, height, width).
            image_sizes: accepted as in the original; no effect.
            logits_to_keep: number of last positions whose logits are computed; 0 = all. `generate` asks for one.
            past_key_values, cache: older and newer name of transformers' KV cache; tuples of keys and values, too.
            position_ids, inputs_embeds, use_cache, kwargs: as in transformers' Llama; `output_attentions=True` takes
                eager attention for this call.

        Returns:
            logits (B, S, W), the mean loss over supervised tokens if there are labels, the cache. Rows are padded on
            the side where `attention_mask` has its padding; without any, on `config.tokenizer_padding_side`.

        Raises:
            ValueError: if images and placeholders don't match, or mask, position ids and cache.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ValueError("input_ids and inputs_embeds are both missing; pass one of them")
        past, side = take_cache(past_key_values, cache), self.config.tokenizer_padding_side
        has_images = inputs_embeds is None and takes_images(input_ids, images, cached_length(past))
        if has_images:
            side = padding_side(attention_mask, side)
            spliced = self.splice(input_ids, images, labels=labels, attention_mask=attention_mask, padding_side=side)
            inputs = spliced._asdict()  # inputs_embeds (B, S, D)
        else:  # text alone, or tokens that follow a filled cache
            mask, positions = fit_to_cache(attention_mask, position_ids, past, given.shape[:2], side)
            inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "labels": labels}
            inputs |= {"attention_mask": mask, "position_ids": positions}
        settings = {"use_cache": use_cache, "logits_to_keep": logits_to_keep, **cache_argument(past)}
        output = super().forward(**inputs, **settings, **kwargs)  # LLM (B, S, D), head (B, S, W), loss
        if has_images:
            note_prompts(output, spliced.attention_mask, token_mask(input_ids, attention_mask))
        return output

    @through_replacement
    def splice(
        self,
        input_ids: Tensor,
        images: Tensor | Sequence[Tensor],
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str = "right",
    ) -> SplicedInputs:
        """Embed the text, encode and project the images, and splice them; see `splice_image_features`."""
        is_token = token_mask(input_ids, attention_mask)  # (B, T)
        features = self._encode_each(images)  # vision tower and projector: N times (P, D)
        counts = ((input_ids == IMAGE_TOKEN_INDEX) & is_token).sum(dim=1).tolist()
        used, spare = assign_images(counts, features)
        spliced = splice_image_features(
            input_ids,
            used,
            self.get_input_embeddings(),
            labels=labels,
            attention_mask=attention_mask,
            padding_side=padding_side,
        )  # inputs_embeds (B, S, D)
        if not (spare and torch.is_grad_enabled()):
            return spliced
        # An image that no row uses adds zero, but keeps tower and projector in the graph: distributed ranks whose rows
        # have no images reduce the same gradients as the others.
        zero = sum(feature[:0].sum() for feature in spare)
        return spliced._replace(inputs_embeds=spliced.inputs_embeds + zero)

    def _encode_each(self, images: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Return the features of each image, (P, D), or (tiles x P, D) of one in tiles."""
        if len(images) == 0:
            return []
        tiles = split_tiles(images)
        if self.config.mm_patch_merge_type != "flat" and any(image.ndim == 4 for image in images):
            raise ValueError(f"mm_patch_merge_type {self.config.mm_patch_merge_type!r} is not supported; use 'flat'")
        is_batch = isinstance(images, Tensor) and images.ndim == 4
        features = self.encode_images(images if is_batch else torch.cat(tiles))  # (all tiles, P, D)
        return [own.flatten(0, 1) for own in features.split([len(image) for image in tiles])]

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        *,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Continue prompts with their images; arguments as in `forward`, further ones as in transformers' `generate`.

        Returns:
            (B, new tokens) int64: the generated ids alone, with images and without.

        Raises:
            ValueError: as `forward`; if there are images and `inputs_embeds`; if the KV cache holds all of the prompt.
        """
        past = take_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        prompts = inputs if input_ids is None else input_ids
        if kwargs.get("inputs_embeds") is None and prompts is not None:
            mask = kwargs.get("attention_mask")
            spliced = self.splice(prompts, () if images is None else images, attention_mask=mask, padding_side="left")
            length, cached = spliced.inputs_embeds.shape[1], cached_length(past)
            if cached >= length:
                raise ValueError(f"the prompts take {length} positions, the cache holds {cached}; pass whole prompts")
            kwargs |= {"inputs_embeds": spliced.inputs_embeds, "attention_mask": spliced.attention_mask}
            kwargs.pop("position_ids", None)
            prompts = None
        elif images is not None:
            raise ValueError("images need input_ids with placeholders; pass images or inputs_embeds, not both")
        settings = kwargs.get("generation_config") or self.generation_config
        # transformers makes the masks of a static cache here, outside of `forward`.
        with eager_attention(bool(kwargs.get("output_attentions") or settings.output_attentions)):
            return super().generate(prompts, **cache_argument(past), **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the next `forward`; decoding loops of others call it too, with all ids so far.

        Args:
            input_ids: (B, T), cached ones included.
            next_sequence_length: number of new ids; None = all that are not cached, as in transformers 4.
            past_key_values, attention_mask, inputs_embeds, is_first_iteration, cache: as in transformers.
            kwargs: `images` and `image_sizes`, handed on; further ones as in transformers.
        """
        past = take_cache(past_key_values, cache)
        if next_sequence_length is None and not is_first_iteration:  # transformers' own loops say it
            cached = cached_length(past)
            is_first_iteration = not cached
            if cached:
                noted = noted_prompts(past, len(input_ids))
                added = noted.added if noted else self._added_positions(input_ids, kwargs.get("images"))
                next_sequence_length = max(input_ids.shape[1] + added - cached, 1)
        images = {name: kwargs.pop(name) for name in ("images", "image_sizes") if kwargs.get(name) is not None}
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **cache_argument(past),
            **kwargs,
        )
        return inputs | images

    def _added_positions(self, input_ids: Tensor, images: Tensor | Sequence[Tensor] | None) -> int:
        """Return S - T of the row with the most images."""
        placeholders = int((input_ids == IMAGE_TOKEN_INDEX).sum(dim=1).max())
        tiles = len(images[0]) if images is not None and images[0].ndim == 4 else 1
        patches = tiles * features_per_image(self.config, self.config.mm_vision_config) if placeholders else 1
        return placeholders * (patches - 1)


def _require_grad(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    output.requires_grad_(True)


AutoConfig.register(LlavaConfig.model_type, LlavaConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM, exist_ok=True)
