"""The vision tower: CLIP's encoder up to the layer whose output LLaVA takes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava.clip_image_processor import CLIPPixels
from llava.model.attention.eager import AttentionOfCall, eager_attention
from llava.model.attention.sdpa_backends import attend_without_cudnn

TOWER_PREFIX = "model.vision_tower.vision_tower."
"""Prefix of the vision tower's tensors in a checkpoint."""
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
"""Sizes of `openai/clip-vit-large-patch14-336`, LLaVA-1.5's vision tower."""


class TowerConfig(AttentionOfCall, CLIPVisionConfig):
    """Sizes of the encoder, and its attention for one call."""


class CLIPEncoder(CLIPVisionModel):
    """CLIP's encoder, which returns attention weights on request."""

    config_class = TowerConfig

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode pixels as transformers does; `output_attentions=True` takes eager attention for this call."""
        with eager_attention(bool(kwargs.get("output_attentions"))):
            return super().forward(*args, **kwargs)

    @property
    def vision_model(self) -> CLIPEncoder:
        """The encoder itself: older versions of transformers have this level, and research code goes through it."""
        return self


class CLIPVisionTower(nn.Module):
    """Patch features of images, (N, 3, height, width) -> (N, P, V).

    Only the layers up to the selected one are built. The tensors of later ones are kept in `unused_tensors`, by their
    name in the file, so that a saved checkpoint is as complete as the loaded one. `image_processor` makes the pixels.

    A frozen tower, none of whose parameters requires a gradient, stays in eval mode and computes without gradients
    whatever the mode of the model, so that it keeps no activations and needs no activation checkpointing.

    Args:
        vision_config: keys of `CLIPVisionConfig`, with the number of layers of the whole encoder.
        select_layer: index into [embeddings, layer 1, ..., last layer]; negative counts from the end.
        select_feature: "patch" drops the class token, "cls_patch" keeps it.
        name: as the config records it.

    Attributes:
        select_layer: counted from the embeddings, so that it is the same index in the hidden states of this encoder and
            of the whole one.
        sizes: keys of `CLIPVisionConfig` of the whole encoder.
        vision_tower_name: as `name`.
        is_loaded: True, as in the original after loading.

    Raises:
        ValueError: if the layer or feature does not exist.
    """

    is_loaded = True

    def __init__(
        self,
        vision_config: Mapping[str, Any],
        select_layer: int = -2,
        select_feature: str = "patch",
        *,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"mm_vision_select_feature is {select_feature!r}; choose patch or cls_patch")
        layers = vision_config["num_hidden_layers"]
        depth = select_layer if select_layer >= 0 else layers + 1 + select_layer
        if not 0 <= depth <= layers:
            raise ValueError(f"mm_vision_select_layer {select_layer} does not exist in an encoder of {layers} layers")
        self.vision_tower_name = name
        self.sizes = dict(vision_config)
        self.select_layer = depth
        self.select_feature = select_feature
        self.config = TowerConfig(**{**vision_config, "num_hidden_layers": depth})
        self.vision_tower = CLIPEncoder(self.config)
        attend_without_cudnn(self.vision_tower)
        self.unused_tensors: dict[str, Tensor] = {}
        self.image_processor: CLIPPixels | None = None

    def forward(self, pixel_values: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Encode images in the tower's own dtype, in training too; gradients reach the pixels if these require them.

        Args:
            pixel_values: (N, 3, height, width), or a list of (3, height, width) for a list of (1, P, V).
        """
        if not isinstance(pixel_values, Tensor):
            return [self(pixels[None]) for pixels in pixel_values]
        if self.device.type != "meta":  # offloaded weights are moved to the pixels
            pixel_values = pixel_values.to(self.device)
        needs_grad = torch.is_grad_enabled() and (pixel_values.requires_grad or not self.is_frozen)
        with torch.set_grad_enabled(needs_grad), _as_without_autocast(pixel_values.device.type, self.dtype):
            features = self.vision_tower(pixel_values.to(self.dtype)).last_hidden_state  # (N, 1 + P, V)
        return features[:, 1:] if self.select_feature == "patch" else features

    def train(self, mode: bool = True) -> CLIPVisionTower:
        """Switch the mode; a frozen tower stays in eval mode."""
        return super().train(mode and not self.is_frozen)

    @property
    def is_frozen(self) -> bool:
        """Whether no parameter requires a gradient."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def feature_select(self, image_forward_outs: Any) -> Tensor:
        """Return the features selected from the encoder's hidden states, (N, P, V), as in the original."""
        features = image_forward_outs.hidden_states[self.select_layer]
        return features[:, 1:] if self.select_feature == "patch" else features

    def load_model(self, device_map: Any = None) -> None:
        """Do nothing: the weights are loaded with the model's."""

    @property
    def dummy_feature(self) -> Tensor:
        """A zero feature, (1, V)."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.vision_tower.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.vision_tower.dtype

    @property
    def hidden_size(self) -> int:
        """V, width of the features."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of an image."""
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """P, patches of an image."""
        return self.num_patches_per_side**2


def _as_without_autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast for half-precision weights: it would cast norms to fp32 and back."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device, enabled=False) if is_half else contextlib.nullcontext()


def released_name(name: str) -> str:
    """Return a tensor's name in released files; newer transformers omits the level `vision_model`."""
    inner = name.removeprefix(TOWER_PREFIX)
    is_short = inner != name and not inner.startswith("vision_model.")
    return f"{TOWER_PREFIX}vision_model.{inner}" if is_short else name
