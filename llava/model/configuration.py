"""`config.json` of a LLaVA checkpoint: Llama's keys and the `mm_*` ones, each declared here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from llava.files import read_settings

CONFIG_FILE = "config.json"

ARCHITECTURE = "LlavaLlamaForCausalLM"


class LlavaConfig(LlamaConfig):
    """Sizes and choices of a LLaVA model.

    Attributes:
        mm_vision_tower: name, hub id or directory of the image encoder, as the original records it.
        mm_vision_config: sizes of the image encoder (`CLIPVisionConfig` as a dictionary); None = an LLM without eyes
            yet.
        mm_hidden_size: width of the image features, before the projector.
        mm_projector_type: "linear" or "mlp2x_gelu".
        mm_vision_select_layer: whose output becomes the features; -2 = the last but one.
        mm_vision_select_feature: "patch" drops the class token, "cls_patch" keeps it.
        image_aspect_ratio: "pad", "square", "anyres" or None; see `mm_utils.process_images`.
        tokenizer_model_max_length: longest row in training, in tokens, image patches included.
        conversation_template: prompt template the weights were trained with; None = not recorded.
        base_model_name_or_path: where the weights came from.
        base_model_revision: commit on the hub they were read at; None for a directory of another origin.
        base_model_fingerprint: of those weights; see `lazy_tensors.fingerprint`.
        base_model_bits: in which the base was held while an adapter was trained on it: 16, 8 or 4.
        merged_adapter_fingerprint: of the adapter that was merged into these weights; None = none was.
        mm_vision_tower_revision: commit on the hub the image encoder was read at.
    """

    model_type = "llava_llama"

    mm_vision_tower: str | None = None
    mm_vision_config: dict | None = None
    mm_hidden_size: int | None = None
    mm_projector_type: str = "linear"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_patch_merge_type: str = "flat"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    mm_projector_lr: float | None = None
    mm_vision_tower_lr: float | None = None
    image_aspect_ratio: str | None = None
    image_grid_pinpoints: list | str | None = None
    use_mm_proj: bool = False
    tune_mm_mlp_adapter: bool = False
    freeze_mm_mlp_adapter: bool = False
    unfreeze_mm_vision_tower: bool = False
    tokenizer_model_max_length: int | None = None
    tokenizer_padding_side: str = "right"
    conversation_template: str | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_fingerprint: str | None = None
    base_model_bits: int = 16
    merged_adapter_fingerprint: str | None = None
    mm_vision_tower_revision: str | None = None


def load_config(directory: str | Path) -> LlavaConfig:
    """Read `config.json` of the original or ours.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no JSON object or of another architecture.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a model directory needs it: fetch the directory again")
    settings = read_settings(path)
    return parse_config(settings, str(path))


def parse_config(settings: Mapping[str, Any], place: str) -> LlavaConfig:
    """Make a config of the content of an original or our own `config.json`; `place` is for messages.

    Raises:
        ValueError: if it is of another architecture.
    """
    settings = dict(settings)
    kind = settings.pop("model_type", "llama")
    if kind not in ("llava", LlavaConfig.model_type, "llama") or is_hf_config(settings):
        found = "the llava-hf layout" if is_hf_config(settings) else f"model_type {kind!r}"
        raise ValueError(f"{place}: {found} is not expected here; use a LLaVA-1.5 checkpoint in the original's layout")
    settings.pop("transformers_version", None)
    settings.setdefault("dtype", settings.pop("torch_dtype", None))
    return LlavaConfig(**settings)


def is_hf_config(settings: Mapping[str, Any]) -> bool:
    """Tell whether the content of a `config.json` describes the llava-hf layout."""
    return "vision_config" in settings


def config_settings(config: LlavaConfig) -> dict[str, Any]:
    """Return the content of `config.json`, with the original's keys, so that older and newer libraries read it."""
    settings: dict[str, Any] = config.to_dict()
    settings.pop("_name_or_path", None)
    settings["architectures"] = [ARCHITECTURE]
    settings["rope_theta"] = (config.rope_parameters or {}).get("rope_theta", 10000.0)
    settings["torch_dtype"] = settings.get("dtype")
    return json.loads(json.dumps(settings, default=str))


def save_config(config: LlavaConfig, directory: str | Path) -> None:
    """Write `config.json`."""
    text = json.dumps(config_settings(config), indent=2, sort_keys=True) + "\n"
    (Path(directory) / CONFIG_FILE).write_text(text, encoding="utf-8")


def features_per_image(config: LlavaConfig, vision: Mapping[str, Any]) -> int:
    """Return the number of positions that a picture, or each of its tiles, takes in the LLM.

    Args:
        config: whose features are taken, with the class token or without.
        vision: sizes of the image encoder.
    """
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return patches + (config.mm_vision_select_feature == "cls_patch")
