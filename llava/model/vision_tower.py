"""CLIP's image encoder up to the layer LLaVA reads."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.image_processing import CLIPPixels
from llava.model.attention_kernels import without_plans

TOWER_PREFIX = "model.vision_tower.vision_tower."
"""Of the encoder's tensors in a checkpoint."""
VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""Sizes of `openai/clip-vit-large-patch14-336`, LLaVA-1.5's encoder."""


class CLIPVisionTower(nn.Module):
    """Patch features of pictures, (N, 3, H, W) -> (N, P, V).

    Only the layers up to the selected one are built. The tensors of those behind it stay in `unused_tensors`, by their
    name in the file, so that a saved checkpoint is as complete as the one that was loaded. `image_processor` makes the
    pixels.

    Args:
        vision_config: keys of `CLIPVisionConfig`, with the number of layers of the whole encoder.
        select_layer: index into [embeddings, layer 1, ..., layer L] whose output is taken; negative counts from the
            end.
        select_feature: "patch" drops the class token, "cls_patch" keeps it.

    Raises:
        ValueError: if the layer or feature does not exist.
    """

    def __init__(self, vision_config: Mapping[str, Any], select_layer: int = -2, select_feature: str = "patch") -> None:
        super().__init__()
        if select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"mm_vision_select_feature is {select_feature!r}; choose patch or cls_patch")
        layers = vision_config["num_hidden_layers"]
        depth = select_layer if select_layer >= 0 else layers + 1 + select_layer
        if not 0 <= depth <= layers:
            raise ValueError(f"mm_vision_select_layer {select_layer} does not exist in an encoder of {layers} layers")
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.config = CLIPVisionConfig(**{**vision_config, "num_hidden_layers": depth})
        self.vision_tower = CLIPVisionModel(self.config)
        self.unused_tensors: dict[str, Tensor] = {}
        self.image_processor: CLIPPixels | None = None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode pictures in the tower's own dtype, in training too; no number of them costs any planning."""
        if self.device.type != "meta":  # weights that stay in their files come to the pixels
            pixel_values = pixel_values.to(self.device)
        with without_plans(), _as_without_autocast(pixel_values.device.type, self.dtype):
            features = self.vision_tower(pixel_values.to(self.dtype)).last_hidden_state  # (N, 1 + P, V)
        return features[:, 1:] if self.select_feature == "patch" else features

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vision_tower.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.vision_tower.dtype

    @property
    def hidden_size(self) -> int:
        """V, width of the features."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Rows, and columns, of patches."""
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """P, patches of a picture."""
        return self.num_patches_per_side**2


def _as_without_autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return a context for weights in half precision, whose norms autocast would compute in fp32 between two casts."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device, enabled=False) if is_half else contextlib.nullcontext()


def released_name(name: str) -> str:
    """Return a tensor's name in released files; newer libraries leave out a level of the encoder's."""
    inner = name.removeprefix(TOWER_PREFIX)
    is_short = inner != name and not inner.startswith("vision_model.")
    return f"{TOWER_PREFIX}vision_model.{inner}" if is_short else name
