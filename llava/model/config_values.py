"""Validation of a `config.json`: type and range of each value, before a model is built from it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava.files.terminal_text import show
from llava.model.vision_tower import VIT_L_14_336

_MAX_PATCHES = 10_000  # of an image; LLaVA-1.5 has 576


class _Range(NamedTuple):
    """Numbers that a key may have; integers if `is_whole`."""

    low: float
    high: float
    is_whole: bool = True

    def holds(self, value: Any) -> bool:
        """Tell whether a value is in the range."""
        is_number = isinstance(value, int if self.is_whole else (int, float)) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a {'whole ' if self.is_whole else ''}number from {self.low:g} to {self.high:g}"


_EPSILON = _Range(1e-12, 1e-2, is_whole=False)
_LLM = {
    "vocab_size": _Range(1, 10_000_000),
    "hidden_size": _Range(1, 1_000_000),
    "intermediate_size": _Range(1, 10_000_000),
    "num_hidden_layers": _Range(1, 1000),
    "num_attention_heads": _Range(1, 10_000),
    "num_key_value_heads": _Range(1, 10_000),
    "head_dim": _Range(0, 10_000),
    "max_position_embeddings": _Range(1, 1_000_000_000),
    "pretraining_tp": _Range(1, 1000),
    "rms_norm_eps": _EPSILON,
    "initializer_range": _Range(0, 10, is_whole=False),
    "attention_dropout": _Range(0, 1, is_whole=False),
    "rope_theta": _Range(2, 1e12, is_whole=False),
    "partial_rotary_factor": _Range(1, 1, is_whole=False),
    "mm_hidden_size": _Range(1, 1_000_000),
    "mm_vision_select_layer": _Range(-1000, 1000),
    "tokenizer_model_max_length": _Range(1, 1_000_000_000),
    "base_model_bits": _Range(4, 16),
    "mm_projector_lr": _Range(0, 1000, is_whole=False),
    "mm_vision_tower_lr": _Range(0, 1000, is_whole=False),
}
_KINDS: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (
        (
            "mm_vision_tower", "mm_projector_type", "mm_vision_select_feature", "mm_patch_merge_type",
            "image_aspect_ratio", "tokenizer_padding_side", "conversation_template", "base_model_name_or_path",
            "base_model_revision", "base_model_fingerprint", "merged_adapter_fingerprint", "mm_vision_tower_revision",
        ),
        str,
        "a text",
    ),
    (
        (
            "mm_use_im_start_end", "mm_use_im_patch_token", "use_mm_proj", "tune_mm_mlp_adapter",
            "freeze_mm_mlp_adapter", "unfreeze_mm_vision_tower",
        ),
        bool,
        "true or false",
    ),
    (("mm_hidden_size", "mm_projector_lr", "mm_vision_tower_lr", "tokenizer_model_max_length"), int | float,
     "a number"),
)  # fmt: skip
"""Types of the keys that `LlavaConfig` adds; transformers checks those of `LlamaConfig`."""
_VISION = {
    "hidden_size": _Range(1, 16_384),
    "intermediate_size": _Range(1, 1_000_000),
    "num_hidden_layers": _Range(1, 1000),
    "num_attention_heads": _Range(1, 1000),
    "image_size": _Range(1, 10_000),
    "patch_size": _Range(1, 64),
    "projection_dim": _Range(1, 1_000_000),
    "layer_norm_eps": _EPSILON,
}
_FACTOR = _Range(1e-6, 1e6, is_whole=False)
_ROPE = {
    "rope_theta": _LLM["rope_theta"],
    "partial_rotary_factor": _LLM["partial_rotary_factor"],
    "factor": _Range(1, 1e6, is_whole=False),
    "original_max_position_embeddings": _LLM["max_position_embeddings"],
    **dict.fromkeys(
        ("attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "mscale"), _FACTOR
    ),
    "mscale_all_dim": _Range(0, 1e6, is_whole=False),
}
_SIDE = _Range(1, 4096)  # pixels of an image that is cut into tiles
_MAX_PINPOINTS = 10_000  # characters
_ROPE_LISTS = ("short_factor", "long_factor")
_NOT_LLAMAS = (
    "sliding_window", "attention_chunk_size", "num_kv_shared_layers", "text_config", "decoder",
    "generator", "text_encoder", "audio_config",
)  # fmt: skip
"""Keys that are set in configs of other language models than Llama's."""


def check_values(settings: Mapping[str, Any], place: str) -> None:
    """Check the numbers of a `config.json`, and that it describes a LLaVA.

    transformers checks the types of `LlamaConfig`'s keys.

    Raises:
        ValueError: with the file `place`, the key and its value.
    """
    _check_numbers(settings, _LLM, place)
    for keys, kind, words in _KINDS:
        for key in keys:
            if not isinstance(settings.get(key), kind | None):
                raise _unfit(place, key, settings[key], words)
    for key in ("rope_scaling", "rope_parameters"):
        _check_rope_values(settings.get(key), place, key)
    dtype = settings.get("dtype")
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if dtype is not None and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise _unfit(place, "dtype", dtype, "the name of a dtype, such as float16")
    foreign = next((key for key in _NOT_LLAMAS if settings.get(key) is not None), None)
    if foreign or any(kind != "full_attention" for kind in _listed(settings.get("layer_types"), place)):
        foreign = foreign or "layer_types"
        raise ValueError(
            f"{place}: {foreign} is {show(settings[foreign])}, which Llama's language model does not have; use a "
            "LLaVA-1.5 checkpoint"
        )
    heads, groups = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    width, head_width = settings.get("hidden_size"), settings.get("head_dim")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise _unfit(place, "num_key_value_heads", groups, f"a divisor of num_attention_heads, {heads}")
    if isinstance(heads, int) and isinstance(width, int) and head_width is None and width % heads:
        raise _unfit(place, "num_attention_heads", heads, f"a divisor of hidden_size, {width}")
    if isinstance(head_width, int) and head_width % 2:
        raise _unfit(place, "head_dim", head_width, "an even number")
    _check_pinpoints(settings.get("image_grid_pinpoints"), place)


def check_token_ids(settings: Mapping[str, Any], vocab_size: int, place: str) -> None:
    """Check that the ids of begin, end and padding are in the vocabulary, or -1 for none.

    Raises:
        ValueError: if one is not.
    """
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(key)
        for token_id in value if isinstance(value, list) else [value]:
            if isinstance(token_id, int) and not -1 <= token_id < vocab_size:
                raise _unfit(place, key, token_id, f"an id below vocab_size, {vocab_size}")


def vision_sizes(settings: Any, place: str, key: str) -> dict[str, Any]:
    """Return the sizes of a vision tower; missing ones are ViT-L/14-336's.

    Args:
        settings: keys of `CLIPVisionConfig`.
        place: path for messages.
        key: name of the settings in this file, for messages.

    Raises:
        ValueError: if a size is out of range, or sizes don't fit each other.
    """
    if not isinstance(settings, Mapping):
        raise _unfit(place, key, settings, "an object")
    sizes = {name: settings.get(name, default) for name, default in VIT_L_14_336.items()}
    place = f"{place}: {key}"
    for name, allowed in _VISION.items():
        if not allowed.holds(sizes[name]):
            raise _unfit(place, name, sizes[name], str(allowed))
    if not is_activation(sizes["hidden_act"]):
        raise _unfit(place, "hidden_act", sizes["hidden_act"], "an activation of transformers, such as quick_gelu")
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise _unfit(place, "num_attention_heads", sizes["num_attention_heads"], f"a divisor of {sizes['hidden_size']}")
    if not 1 <= (sizes["image_size"] // sizes["patch_size"]) ** 2 <= _MAX_PATCHES:
        raise _unfit(place, "image_size", sizes["image_size"], f"1 to 100 patches of {sizes['patch_size']} pixels")
    return sizes


def check_rope(rope: Mapping[str, Any], place: str) -> None:
    """Check that a type of rotary embedding is known and has its parameters.

    Raises:
        ValueError: if not.
    """
    kind, factor = rope["rope_type"], rope.get("factor")
    is_known = isinstance(kind, str) and (kind == "default" or kind in ROPE_INIT_FUNCTIONS)
    if not is_known or (kind not in ("default", "longrope") and not isinstance(factor, int | float)):
        raise ValueError(
            f"{place}: rope_scaling has type {show(kind)} and factor {show(factor)}; known types are "
            f"{', '.join(ROPE_INIT_FUNCTIONS)}, with a number as factor"
        )
    needed = {"llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    needed["longrope"] = (*_ROPE_LISTS, "original_max_position_embeddings")
    missing = [key for key in needed.get(kind, ()) if rope.get(key) is None]
    if missing:
        raise ValueError(f"{place}: rope_scaling of type {kind} lacks {missing[0]}; fetch the file again")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise _unfit(place, "high_freq_factor", rope["high_freq_factor"], "above low_freq_factor")


def is_activation(name: Any) -> bool:
    """Tell whether transformers has an activation of this name."""
    return isinstance(name, str) and name in ACT2FN


def _check_numbers(settings: Mapping[str, Any], ranges: Mapping[str, _Range], place: str) -> None:
    for key, allowed in ranges.items():
        value = settings.get(key)
        if isinstance(value, int | float) and not allowed.holds(value):
            raise _unfit(place, key, value, str(allowed))


def _check_rope_values(rope: Any, place: str, key: str) -> None:
    if not isinstance(rope, Mapping):
        return
    for name, value in rope.items():
        if name in _ROPE and value is not None and not _ROPE[name].holds(value):
            raise _unfit(place, f"{key}.{name}", value, str(_ROPE[name]))
        if name in _ROPE_LISTS and value is not None:
            numbers = value if isinstance(value, list) else [None]
            if not all(_FACTOR.holds(number) for number in numbers):
                raise _unfit(place, f"{key}.{name}", value, f"a list of numbers, each {_FACTOR}")
        if isinstance(value, dict):
            raise _unfit(place, f"{key}.{name}", value, "a number")


def _check_pinpoints(pinpoints: Any, place: str) -> None:
    pairs = pinpoints
    if isinstance(pinpoints, str):
        try:
            pairs = ast.literal_eval(pinpoints[:_MAX_PINPOINTS])
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pairs = [None]
    if not isinstance(pairs, list | tuple | None) or not all(map(_is_resolution, pairs or ())):
        raise _unfit(place, "image_grid_pinpoints", pinpoints, f"a list of [width, height], each {_SIDE}")


def _is_resolution(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_SIDE.holds, pair))


def _listed(value: Any, place: str) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise _unfit(place, "layer_types", value, "a list")
    return value or []


def _unfit(place: str, key: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{place}: {key} is {show(value)}, not {expected}; correct it, or fetch the file again")
