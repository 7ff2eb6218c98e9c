"""The original's mixins: vision tower and projector in a language model, and images in its prompts.

Research code derives from them, calls `prepare_inputs_labels_for_multimodal`, or replaces that method to drop or merge
image features; `LlavaLlamaForCausalLM` goes through such a replacement.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX
from llava.image_processing import load_image_processor
from llava.model.adapter.non_lora import read_projector
from llava.model.checkpoint.find_vision_tower import attach_tower
from llava.model.checkpoint.lazy_tensors import LazyTensors
from llava.model.configuration import LlavaConfig
from llava.model.projector import build_projector
from llava.model.splice import SplicedInputs, pad_rows, token_mask
from llava.model.vision_tower import TOWER_PREFIX, CLIPVisionTower, released_name
from llava.original_names import lazy_names

Prepared = tuple[Tensor | None, Tensor | None, Tensor | None, Any, Tensor | None, Tensor | None]
"""input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels."""

__getattr__ = lazy_names(__name__)


class LlavaMetaModel:
    """Vision tower and projector of an LLM's body; precedes a transformers model among the base classes."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.build_vision_modules()

    def build_vision_modules(self) -> None:
        """Add the vision tower and the projector that the config describes, if any."""
        config = self.config
        if getattr(config, "mm_vision_config", None) is not None:  # configs of other code lack it
            tower = CLIPVisionTower(
                config.mm_vision_config,
                config.mm_vision_select_layer,
                config.mm_vision_select_feature,
                name=config.mm_vision_tower,
            )
            self.vision_tower = tower
            self.mm_projector = build_projector(
                config.mm_projector_type, config.mm_hidden_size or tower.hidden_size, config.hidden_size
            )

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """Return the vision tower; None in an LLM without one."""
        return getattr(self, "vision_tower", None)

    def initialize_vision_modules(self, model_args: Any, fsdp: Any = None) -> None:
        """Add a vision tower and a projector if the model has none, as the original's training does.

        Args:
            model_args: with `vision_tower`, `mm_vision_select_layer`, `mm_vision_select_feature`, `mm_projector_type`,
                and `pretrain_mm_mlp_adapter`, a projector's file or None.
            fsdp: no effect.

        Raises:
            FileNotFoundError: if the tower is not found.
            ValueError: if a value is unknown, or the projector's file doesn't fit.
        """
        if self.get_vision_tower() is None:
            self.vision_tower = build_vision_tower(model_args)
        tower, config = self.get_vision_tower(), self.config
        config.mm_vision_tower, config.mm_vision_config = tower.vision_tower_name, tower.sizes
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = getattr(model_args, "mm_vision_select_feature", "patch")
        config.mm_hidden_size, config.use_mm_proj = tower.hidden_size, True
        config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
        if getattr(self, "mm_projector", None) is None:
            self.mm_projector = build_projector(config.mm_projector_type, tower.hidden_size, config.hidden_size)
        self.mm_projector.requires_grad_(True)
        if getattr(model_args, "pretrain_mm_mlp_adapter", None):
            stored = read_projector(model_args.pretrain_mm_mlp_adapter)
            self.mm_projector.load_state_dict({name.split("mm_projector.")[1]: stored[name] for name in stored})


class LlavaMetaForCausalLM:
    """Images in the prompts of a language model whose body is a `LlavaMetaModel`."""

    def get_model(self) -> nn.Module:
        """Return the body, which holds `vision_tower` and `mm_projector` too."""
        return self.model

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """Return the vision tower; None in an LLM without one."""
        return self.get_model().get_vision_tower()

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return the features of images as the LLM takes them, (N, 3, height, width) -> (N, P, D)."""
        features = self.get_vision_tower()(pixel_values)  # (N, P, V)
        projector = self.get_model().mm_projector
        return projector(features.to(next(projector.parameters()).dtype))  # (N, P, D)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Tensor | Sequence[Tensor] | None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Prepared:
        """Put the images into the prompts' embeddings.

        Args:
            input_ids: (B, T) int64, with `IMAGE_TOKEN_INDEX` where images go.
            position_ids: only whether they are given matters.
            attention_mask: (B, T).
            past_key_values: returned.
            labels: (B, T) int64.
            images: as in `LlavaLlamaForCausalLM.forward`; without any, or for a single token, nothing changes.
            image_sizes: no effect.

        Returns:
            None, position_ids (B, S), attention_mask (B, S) of the given dtype, past_key_values, inputs_embeds
            (B, S, D), labels (B, S); None where the argument is. Padding is on `config.tokenizer_padding_side`. Unlike
            in the original no row is truncated to `tokenizer_model_max_length`.

        Raises:
            TypeError: if the model does not derive from `LlavaLlamaForCausalLM`.
        """
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        splice = getattr(type(self), "splice", None)
        if splice is None:
            raise TypeError(
                f"{type(self).__name__} can't put images into prompts; derive it from LlavaLlamaForCausalLM"
            )
        spliced = getattr(splice, "__wrapped__", splice)(  # not through a replacement of this method
            self,
            input_ids,
            images,
            attention_mask=attention_mask,
            labels=labels,
            padding_side=self.config.tokenizer_padding_side,
        )
        positions = None if position_ids is None else spliced.position_ids
        mask = None if attention_mask is None else spliced.attention_mask.to(attention_mask.dtype)
        return None, positions, mask, past_key_values, spliced.inputs_embeds, spliced.labels

    def initialize_vision_tokenizer(self, model_args: Any, tokenizer: Any) -> None:
        """Do nothing, as the original for LLaVA-1.5's flags: the weights come with their tokens.

        Raises:
            ValueError: if the flags request tokens that the weights do not have.
        """
        for flag in ("mm_use_im_patch_token", "mm_use_im_start_end"):
            if getattr(model_args, flag, False) and not getattr(self.config, flag, False):
                raise ValueError(f"{flag} is True, but LLaVA-1.5 has no such tokens; pass False")


_PREPARE = LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal


def through_replacement(splice: Callable[..., SplicedInputs]) -> Callable[..., SplicedInputs]:
    """Decorate `splice` so that a replaced `prepare_inputs_labels_for_multimodal` makes the LLM's inputs."""

    @functools.wraps(splice)
    def spliced(self: Any, input_ids: Tensor, images: Tensor | Sequence[Tensor], **options: Any) -> SplicedInputs:
        prepare = self.prepare_inputs_labels_for_multimodal
        if getattr(prepare, "__func__", None) is _PREPARE or len(images) == 0:
            return splice(self, input_ids, images, **options)
        mask = token_mask(input_ids, options.get("attention_mask"))
        labels = options.get("labels")
        _, _, mask, _, embeds, new_labels = prepare(input_ids, None, mask, None, labels, images)
        keep = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
        targets = torch.full(embeds.shape[:2], IGNORE_INDEX, device=embeds.device) if labels is None else new_labels
        rows = [(row[kept], own[kept]) for row, own, kept in zip(embeds, targets, keep, strict=True)]
        return pad_rows(rows, options.get("padding_side", "right"), with_labels=labels is not None)

    return spliced


def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> CLIPVisionTower:
    """Load a vision tower, frozen and with its image processor.

    Args:
        vision_tower_cfg: with `mm_vision_tower` or `vision_tower` (directory or hub id), `mm_vision_select_layer` and
            `mm_vision_select_feature`.
        kwargs: no effect; the original's `delay_load`.

    Raises:
        FileNotFoundError: if it is not found.
        ValueError: if there is no such layer or feature, or a tower over several scales (`s2`) is requested.
    """
    name = getattr(vision_tower_cfg, "mm_vision_tower", None) or getattr(vision_tower_cfg, "vision_tower", None)
    if getattr(vision_tower_cfg, "s2", False):
        raise ValueError("s2 is True, but towers over several scales are not supported; use the plain tower")
    if not name:
        raise ValueError(
            "mm_vision_tower is not set; name a directory or hub id such as openai/clip-vit-large-patch14-336"
        )
    config = LlavaConfig()
    tensors, config, holder = attach_tower(config, LazyTensors.of({}), name, [])
    tower = CLIPVisionTower(
        config.mm_vision_config,
        getattr(vision_tower_cfg, "mm_vision_select_layer", -2),
        getattr(vision_tower_cfg, "mm_vision_select_feature", "patch"),
        name=str(name),
    )
    names = {key: released_name(f"{TOWER_PREFIX.removesuffix('vision_tower.')}{key}") for key in tower.state_dict()}
    tower.load_state_dict({key: tensors[stored] for key, stored in names.items()})
    tower.image_processor = load_image_processor(holder, config.mm_vision_config["image_size"])
    return tower.requires_grad_(False).eval()
