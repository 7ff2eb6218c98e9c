"""LLaVA-1.5: an image encoder, a projector and Llama, with transformers' Llama underneath."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.configuration import LlavaConfig
from llava.model.fused_layers import FusedLayers
from llava.model.pack import forward_pack, only_packs_compiled
from llava.model.projector import build_projector
from llava.model.splice import SplicedInputs, splice_image_features
from llava.model.vision_tower import CLIPVisionTower


class LlavaLlamaForCausalLM(LlamaForCausalLM):
    """Answers questions about images.

    `input_ids` hold `IMAGE_TOKEN_INDEX` where an image belongs; `images` are consumed in reading order. A row of text
    alone may bring an image too, which is then ignored: the original's collators do so. `attends_in_blocks` says
    whether packs go through FlexAttention, `compiles_packs` whether through compiled layers, and
    `fused_layers` replaces the layers for packs; `llava.train.packs` sets them.
    """

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.attends_in_blocks = False
        self.compiles_packs = False
        self.fused_layers: FusedLayers | None = None
        if config.mm_vision_config is not None:
            tower = CLIPVisionTower(
                config.mm_vision_config, config.mm_vision_select_layer, config.mm_vision_select_feature
            )
            self.model.vision_tower = tower
            self.model.mm_projector = build_projector(
                config.mm_projector_type, config.mm_hidden_size or tower.hidden_size, config.hidden_size
            )

    def get_model(self) -> torch.nn.Module:
        """Return the Llama body, which holds `vision_tower` and `mm_projector` too."""
        return self.model

    def get_vision_tower(self) -> CLIPVisionTower:
        """Return the image encoder."""
        return self.model.vision_tower

    def train(self, mode: bool = True) -> LlavaLlamaForCausalLM:
        """Switch the mode; nothing is done where training is on already, as trainers ask for it in every step."""
        return self if mode and self.training else super().train(mode)

    def encode_images(self, pixel_values: Tensor, tower_features: Tensor | None = None) -> Tensor:
        """Return the features of pictures as the LLM sees them, (N, 3, H, W) -> (N, P, D).

        Args:
            pixel_values: (N, 3, H, W).
            tower_features: what the image encoder gives for them, (N, P, V), if that is known.
        """
        features = self.model.vision_tower(pixel_values) if tower_features is None else tower_features
        projector = self.model.mm_projector
        return projector(features.to(next(projector.parameters()).dtype))  # (N, P, D)

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
        layout: Mapping[str, Tensor] | None = None,
        tower_features: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the LLM over prompts with their images.

        Args:
            input_ids: (B, T) int64, with `IMAGE_TOKEN_INDEX` where images go.
            attention_mask: (B, T).
            labels: (B, T) int64, `IGNORE_INDEX` where nothing is supervised.
            images: (N, 3, H, W), or a list of (3, H, W); tiles of "anyres" as (N, tiles, 3, H, W) or a list of
                (tiles, 3, H, W).
            image_sizes: accepted as in the original; nothing depends on it.
            logits_to_keep: compute the last so many positions' logits alone; 0 = all. `generate` asks for one.
            layout: of a pack, whose input_ids, labels and position_ids are spliced already; see `forward_pack`.
            tower_features: of images (N, 3, H, W), see `encode_images`.
            position_ids, past_key_values, inputs_embeds, use_cache, kwargs: as in transformers' Llama.

        Returns:
            logits (B, S, W) over the spliced sequence, the mean loss over supervised tokens if there are labels, the
            cache. Of a pack the logits of supervised tokens alone.

        Raises:
            ValueError: if images and placeholders don't match.
        """
        if layout is not None:
            features = torch.cat(self._encode_each(images, tower_features))
            items = kwargs.get("num_items_in_batch")
            return forward_pack(self, input_ids, labels, position_ids, layout, features, num_items_in_batch=items)
        if images is not None and inputs_embeds is None:
            spliced = self.splice(
                input_ids, images, attention_mask=attention_mask, labels=labels, tower_features=tower_features
            )
            input_ids, inputs_embeds = None, spliced.inputs_embeds
            attention_mask, labels, position_ids = spliced.attention_mask, spliced.labels, spliced.position_ids
        elif input_ids is not None and input_ids.shape[1] > 1:  # a single token is a step of generation
            assign_images([int((input_ids == IMAGE_TOKEN_INDEX).sum())], [])
        with only_packs_compiled(self.compiles_packs):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )

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
            (B, new tokens) int64: with images the generated ids alone, without them behind the prompt's.
        """
        prompts = inputs if input_ids is None else input_ids
        if images is None:
            return super().generate(prompts, **kwargs)
        spliced = self.splice(prompts, images, attention_mask=kwargs.pop("attention_mask", None), padding_side="left")
        kwargs.pop("position_ids", None)
        return super().generate(inputs_embeds=spliced.inputs_embeds, attention_mask=spliced.attention_mask, **kwargs)

    def splice(
        self,
        input_ids: Tensor,
        images: Tensor | Sequence[Tensor],
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str = "right",
        tower_features: Tensor | None = None,
    ) -> SplicedInputs:
        """Encode the images and put them into the prompts' embeddings; see `splice_image_features`."""
        features = self._encode_each(images, tower_features)
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        counts = ((input_ids == IMAGE_TOKEN_INDEX) & keep).sum(dim=1).tolist()
        used, spare = assign_images(counts, features)
        spliced = splice_image_features(
            input_ids,
            used,
            self.get_input_embeddings(),
            labels=labels,
            attention_mask=attention_mask,
            padding_side=padding_side,
        )
        if not (spare and torch.is_grad_enabled()):
            return spliced
        # An image that no row uses adds nothing, but keeps tower and projector in the graph: ranks with text alone stay
        # in step with the others.
        nothing = sum(feature[:0].sum() for feature in spare)
        return spliced._replace(inputs_embeds=spliced.inputs_embeds + nothing)

    def _encode_each(self, images: Tensor | Sequence[Tensor], tower_features: Tensor | None = None) -> list[Tensor]:
        """Return one (patches, D) tensor per image; the tiles of an image follow each other."""
        if len(images) == 0:
            return []
        if images[0].ndim == 3:
            batch = images if isinstance(images, Tensor) else torch.stack(list(images))
            return list(self.encode_images(batch, tower_features))
        if self.config.mm_patch_merge_type != "flat":
            raise ValueError(f"mm_patch_merge_type {self.config.mm_patch_merge_type!r} is not supported; use 'flat'")
        features = self.encode_images(torch.cat(list(images)))  # (all tiles, P, D)
        return [tiles.flatten(0, 1) for tiles in features.split([len(image) for image in images])]


def assign_images(counts: Sequence[int], features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split images into those that fill placeholders and those that rows without one bring along.

    Args:
        counts: placeholders of each row; where there are none at all, every image is spare.
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
