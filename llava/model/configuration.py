"""`config.json` of a LLaVA checkpoint: Llama's keys and LLaVA's `mm_*` keys."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from llava.files.json_files import parse_json, read_settings
from llava.files.terminal_text import show
from llava.model.attention.eager import AttentionOfCall
from llava.model.config_values import (
    check_rope,
    check_token_ids,
    check_values,
    is_activation,
    vision_sizes,
)

CONFIG_FILE = "config.json"

ARCHITECTURE = "LlavaLlamaForCausalLM"
_OTHER_TYPES = ("llava", "llama")  # model_type of released LLaVA-1.5 checkpoints, and of an LLM alone
_KINDS_OF_VALUES = {"mm_vision_select_layer": int, "mm_vision_config": dict, "quantization_config": dict}
_OTHER_KINDS = {
    "llava_mistral": "LLaVA-1.6 with Mistral's language model; LLaVA-1.5's is Llama's",
    "llava_qwen": "LLaVA-NeXT or OneVision with Qwen's language model; LLaVA-1.5's is Llama's",
    "llava_mpt": "LLaVA with MPT's language model; LLaVA-1.5's is Llama's",
    "llava_next": "LLaVA-1.6",
    "llava_onevision": "LLaVA-OneVision",
    "mistral": "a language model of Mistral; LLaVA-1.5's is Llama's",
    "qwen2": "a language model of Qwen; LLaVA-1.5's is Llama's",
    "clip": "a vision tower; pass it as --vision-tower",
    "clip_vision_model": "a vision tower; pass it as --vision-tower",
    "siglip": "a vision tower, and LLaVA-1.5's is CLIP",
    "siglip_vision_model": "a vision tower, and LLaVA-1.5's is CLIP",
}
"""Models that other values of `model_type` name."""
_ROPE_TYPES_OF_SCALED_LENGTH = ("default", "llama3", "longrope")
"""Types of rotary embedding whose `max_position_embeddings` is the context length, unscaled."""


class LlavaConfig(AttentionOfCall, LlamaConfig):
    """Sizes and choices of a LLaVA model.

    Attributes:
        mm_vision_tower: name, hub id or directory of the vision tower, as the original records it.
        mm_vision_config: sizes of the vision tower (`CLIPVisionConfig` as a dictionary); None = an LLM without one.
        mm_hidden_size: V.
        mm_projector_type: "linear" or "mlp2x_gelu".
        mm_vision_select_layer: layer whose output becomes the features; -2 = the last but one.
        mm_vision_select_feature: "patch" drops the class token, "cls_patch" keeps it.
        image_aspect_ratio: "pad", "square", "anyres" or None; see `mm_utils.process_images`.
        tokenizer_model_max_length: longest row in training, in positions (text tokens and patches).
        conversation_template: prompt template the weights were trained with; None = not recorded.
        base_model_name_or_path: checkpoint that training started from.
        base_model_revision: its commit on the hub; None for a directory of another origin.
        base_model_fingerprint: of its weights; see `lazy_tensors.fingerprint`.
        base_model_bits: precision of the base while an adapter was trained on it: 16, 8 or 4.
        merged_adapter_fingerprint: of the adapter merged into these weights; None = no adapter.
        mm_vision_tower_revision: commit of the vision tower on the hub.
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

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read `config.json` for `from_pretrained`; the original's or a bare Llama's becomes a `LlavaConfig`.

        peft reads the base's config by it whenever it saves an adapter.
        """
        settings, options = super().get_config_dict(*args, **kwargs)
        if settings.get("model_type") in _OTHER_TYPES and not is_hf_config(settings):
            settings = {**settings, "model_type": cls.model_type}
        return settings, options

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what transformers' `save_pretrained` writes, with the RoPE scaling that transformers 4 reads."""
        return {**super().to_diff_dict(), **_rope_of_transformers_4(self)}


_KNOWN = {*(field.name for field in dataclasses.fields(LlavaConfig)), "rope_scaling", "torch_dtype"}
_OWN = ("mm_", "use_mm_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "tokenizer_", "base_model_")
_OF_CALLS = (
    "output_hidden_states", "output_attentions", "return_dict", "use_return_dict", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "num_labels", "problem_type", "torchscript", "attn_implementation",
    "experts_implementation", "name_or_path", "add_cross_attention",
)  # fmt: skip


def load_config(directory: str | Path) -> LlavaConfig:
    """Read the `config.json` of a directory in the original's layout or ours.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is not a JSON object or of another architecture.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a model directory needs it: fetch the directory again")
    settings = read_settings(path)
    return parse_config(settings, str(path))


def parse_config(settings: Mapping[str, Any], place: str) -> LlavaConfig:
    """Parse the content of an original or our own `config.json`; `place` is its path, for messages.

    Raises:
        ValueError: if it is of another architecture.
    """
    settings = copy.deepcopy(dict(settings))  # transformers changes rope_scaling in place
    kind = settings.pop("model_type", "llama")
    if not isinstance(kind, str):
        raise ValueError(f"{place}: model_type is {show(kind)}, not a text; fetch the file again")
    if kind not in (LlavaConfig.model_type, *_OTHER_TYPES) or is_hf_config(settings):
        found = "the llava-hf layout" if is_hf_config(settings) else f"model_type {kind!r}"
        known = f" (this is {_OTHER_KINDS[kind]})" if kind in _OTHER_KINDS else ""
        raise ValueError(
            f"{place}: {found} is not expected here; use a LLaVA-1.5 checkpoint in the original's layout{known}"
        )
    if str(settings.get("mm_patch_merge_type") or "flat") != "flat":
        raise ValueError(
            f"{place}: mm_patch_merge_type {settings['mm_patch_merge_type']!r} is LLaVA-1.6's (LLaVA-NeXT), which "
            "arranges image features otherwise; this code runs LLaVA-1.5: use its weights, or the code that these were "
            "made for"
        )
    settings.pop("transformers_version", None)
    settings.setdefault("dtype", settings.pop("torch_dtype", None))
    settings = {
        key: value
        for key, value in settings.items()
        if not _is_of_library(key) and not (value is None and key.startswith(_OWN))  # null = not set
    }
    check_values(settings, place)
    if settings.get("mm_vision_config"):
        settings["mm_vision_config"] = vision_sizes(settings["mm_vision_config"], place, "mm_vision_config")
    try:
        config = LlavaConfig(**settings)
    except (StrictDataclassError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{place} holds a value of the wrong kind ({reason}); correct it, or fetch the file again"
        ) from error
    config.rope_parameters.pop("type", None)  # older files' name of "rope_type"
    check_rope(config.rope_parameters, place)
    wrong = [key for key, kinds in _KINDS_OF_VALUES.items() if not isinstance(settings.get(key), kinds | None)]
    wrong += [] if is_activation(config.hidden_act) else ["hidden_act"]
    if wrong:
        raise ValueError(f"{place}: {wrong[0]} is {show(settings[wrong[0]])}; correct it, or fetch the file again")
    check_token_ids(settings, config.vocab_size, place)
    return config


def _is_of_library(key: str) -> bool:
    """Tell whether a key is transformers' own: what its calls return, or a name of its code."""
    return key in _OF_CALLS or key.startswith("_") or (hasattr(LlavaConfig, key) and key not in _KNOWN)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a config, such as `float16`."""
    return str(dtype).removeprefix("torch.")


def is_hf_config(settings: Mapping[str, Any]) -> bool:
    """Tell whether the content of a `config.json` describes the llava-hf layout."""
    return "vision_config" in settings


def config_settings(config: LlavaConfig) -> dict[str, Any]:
    """Return the content of `config.json`, with the original's keys, readable by older and newer libraries."""
    settings: dict[str, Any] = config.to_dict()
    settings.pop("_name_or_path", None)
    settings["architectures"] = [ARCHITECTURE]
    settings |= _rope_of_transformers_4(config)
    settings["torch_dtype"] = settings.get("dtype")
    return parse_json(json.dumps(settings, default=str))


def save_config(config: LlavaConfig, directory: str | Path) -> None:
    """Write `config.json`."""
    text = json.dumps(config_settings(config), indent=2, sort_keys=True) + "\n"
    (Path(directory) / CONFIG_FILE).write_text(text, encoding="utf-8")


def _rope_of_transformers_4(config: LlavaConfig) -> dict[str, Any]:
    theta = (config.rope_parameters or {}).get("rope_theta", 10000.0)
    return {"rope_theta": theta, "rope_scaling": rope_scaling(config)}


def rope_scaling(config: LlavaConfig) -> dict[str, Any] | None:
    """Return `rope_scaling` for transformers 4, which has no `rope_parameters`; None for unscaled positions.

    transformers 5 reads it too, before `rope_parameters`; both are equivalent. Before 4.43 only "linear" and "dynamic"
    existed, with exactly the keys `type` and `factor`, a float.
    """
    rope = {key: value for key, value in (config.rope_parameters or {}).items() if value is not None}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        return {"type": kind, "factor": float(rope["factor"])}
    return {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}


def context_length(config: LlavaConfig) -> int:
    """Return the context length: positions of prompt, image patches and answer together.

    `max_position_embeddings` is the length before scaling ("linear", "dynamic", Vicuna-16k's 4096 with factor 4), or
    `original_max_position_embeddings` is ("yarn"); for "llama3" and "longrope" it is the scaled length.
    Source: vLLM's and FastChat's rule.
    """
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") in _ROPE_TYPES_OF_SCALED_LENGTH:
        return config.max_position_embeddings
    before = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return max(config.max_position_embeddings, int(before * (rope.get("factor") or 1)))


def features_per_image(config: LlavaConfig, vision: Mapping[str, Any]) -> int:
    """Return the positions of an image, or of each of its tiles, in the LLM.

    Args:
        config: says whether the class token is kept.
        vision: sizes of the vision tower.
    """
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return patches + (config.mm_vision_select_feature == "cls_patch")
