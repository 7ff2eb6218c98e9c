"""The llava-hf layout: the same weights under transformers' names, with a row for `<image>` in the vocabulary.

Source: transformers' `LlavaForConditionalGeneration` and the directories of the hub's llava-hf organisation.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from llava.files.json_files import read_settings
from llava.files.terminal_text import show
from llava.image_processing import pads_images
from llava.model.checkpoint.lazy_tensors import DERIVED, LazyTensor, LazyTensors
from llava.model.checkpoint.read_tensors import open_weights
from llava.model.config_values import vision_sizes
from llava.model.configuration import CONFIG_FILE, LlavaConfig, config_settings, parse_config
from llava.model.vision_tower import TOWER_PREFIX, released_name

logger = logging.getLogger(__name__)

RECORD = "llava"
"""Key of the hf `config.json` for settings of ours that its other keys can't express."""
_TO_ORIGINAL = (  # the first that fits, the longer before the shorter
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("language_model.", "model."),
    ("vision_tower.", TOWER_PREFIX),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
)
_TO_HF = (
    (TOWER_PREFIX, "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""Weights with a row for each token."""
_ROWS_MULTIPLE = 64
_STRATEGIES = {"default": "patch", "full": "cls_patch"}


def original_name(name: str) -> str | None:
    """Return the released name of a tensor in a llava-hf file of any version; None for one computed from the config."""
    if name.endswith(DERIVED):
        return None
    inner = name.removeprefix("model.")
    if inner.startswith(TOWER_PREFIX.removeprefix("model.")):
        return name
    for hf_prefix, prefix in _TO_ORIGINAL:
        if inner.startswith(hf_prefix):
            return released_name(prefix + inner.removeprefix(hf_prefix))
    return name


def hf_name(name: str) -> str:
    """Return a tensor's name in the hub's llava-hf checkpoints, which every version of transformers reads.

    Raises:
        ValueError: if the layout has no such tensor.
    """
    for prefix, hf_prefix in _TO_HF:
        if name.startswith(prefix):
            return hf_prefix + name.removeprefix(prefix)
    raise ValueError(f"{name} has no place in the llava-hf layout; only LLaVA-1.5 with an mlp2x_gelu projector fits")


def open_hf_weights(directory: str | Path) -> tuple[LlavaConfig, LazyTensors]:
    """Open a checkpoint in the llava-hf layout, with our config and released names.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if it is not a LLaVA-1.5.
    """
    directory = Path(directory)
    settings = read_settings(directory / CONFIG_FILE)
    config = config_from_hf(settings, str(directory / CONFIG_FILE))
    if "image_aspect_ratio" not in (settings.get(RECORD) or {}):
        config.image_aspect_ratio = "pad" if pads_images(directory) else None
        if config.image_aspect_ratio is None:
            logger.info("%s crops images to a square, as its image processor says", directory)
    tensors = open_weights(directory).renamed(original_name)
    return config, cut_vocabulary(tensors, config.vocab_size)


def config_from_hf(settings: Mapping[str, Any], place: str) -> LlavaConfig:
    """Convert the content of an hf `config.json` to our config; `place` is for messages.

    Keys that older files leave out get transformers' defaults.

    Raises:
        ValueError: if it describes another model than LLaVA-1.5.
    """
    parts = {key: settings.get(key) or {} for key in ("text_config", "vision_config", RECORD)}
    for key, part in parts.items():
        if not isinstance(part, Mapping):
            raise ValueError(f"{place}: {key} is {show(settings[key])}, not an object; fetch the file again")
    text, vision, record = (dict(part) for part in parts.values())
    expected = {
        "model_type": (settings.get("model_type", "llava"), "llava"),
        "text_config.model_type": (text.pop("model_type", "llama"), "llama"),
        "vision_config.model_type": (vision.get("model_type", "clip_vision_model"), "clip_vision_model"),
        "projector_hidden_act": (settings.get("projector_hidden_act", "gelu"), "gelu"),
        "multimodal_projector_bias": (settings.get("multimodal_projector_bias", True), True),
    }
    wrong = [f"{key} is {found!r}" for key, (found, wanted) in expected.items() if found != wanted]
    layer, strategy = settings.get("vision_feature_layer", -2), settings.get("vision_feature_select_strategy")
    if not isinstance(layer, int) or isinstance(layer, bool):
        wrong.append(f"vision_feature_layer is {layer!r}")
    if strategy is not None and strategy not in tuple(_STRATEGIES):
        wrong.append(f"vision_feature_select_strategy is {strategy!r}")
    if wrong:
        raise ValueError(f"{place}: {', '.join(wrong)}, so this is not LLaVA-1.5; use the library it was made for")
    dtype = settings.get("dtype") or settings.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    sizes = vision_sizes(vision, place, "vision_config")
    own = {
        **{key: value for key, value in text.items() if key not in ("architectures", "_name_or_path", "torch_dtype")},
        "dtype": dtype,
        "pad_token_id": settings.get("pad_token_id", text.get("pad_token_id")),
        "mm_vision_config": sizes,
        "mm_hidden_size": sizes["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": _STRATEGIES[strategy or "default"],
        "use_mm_proj": True,
        "quantization_config": settings.get("quantization_config"),
        **record,
    }
    return parse_config({key: value for key, value in own.items() if key != "quantization_config" or value}, place)


def config_to_hf(config: LlavaConfig, *, image_token_id: int, pad_token_id: int, vocab_size: int) -> dict[str, Any]:
    """Convert our config to the content of an hf `config.json`.

    Args:
        config: of a LLaVA-1.5 with its vision tower.
        image_token_id: of `<image>`.
        pad_token_id: may differ from the config's, which may have none.
        vocab_size: rows of the embedding in the hf file.

    Raises:
        ValueError: if the layout can't hold the model.
    """
    refuse_what_hf_lacks(config)
    ours = config_settings(config)
    llama_keys = LlamaConfig().to_dict().keys() - {"architectures", "transformers_version", "model_type", "dtype"}
    text = {key: ours[key] for key in sorted({*llama_keys, "rope_theta", "rope_scaling"}) if key in ours}
    sizes = dict(config.mm_vision_config)
    patches = (sizes["image_size"] // sizes["patch_size"]) ** 2
    is_whole = config.mm_vision_select_feature == "cls_patch"
    settings = {
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": ours["dtype"],
        "ignore_index": -100,
        "image_seq_length": patches + is_whole,
        "image_token_index": image_token_id,
        "model_type": "llava",
        "multimodal_projector_bias": True,
        "pad_token_id": pad_token_id,
        "projector_hidden_act": "gelu",
        "text_config": {**text, "model_type": "llama", "dtype": ours["dtype"], "vocab_size": vocab_size},
        "tie_word_embeddings": False,
        "torch_dtype": ours["dtype"],
        "vision_config": {**sizes, "model_type": "clip_vision_model"},
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": "full" if is_whole else "default",
    }
    known = config_settings(config_from_hf(settings, CONFIG_FILE))
    settings[RECORD] = {key: value for key, value in ours.items() if key not in known or known[key] != value}
    return settings


def refuse_what_hf_lacks(config: LlavaConfig) -> None:
    """Refuse a model that the llava-hf layout can't hold.

    Raises:
        ValueError: with all reasons.
    """
    reasons = {
        "it has no vision tower": config.mm_vision_config is None,
        f"its projector is {config.mm_projector_type!r}, not mlp2x_gelu": config.mm_projector_type != "mlp2x_gelu",
        f"its images are cut into tiles ({config.image_aspect_ratio!r})": config.image_aspect_ratio == "anyres",
        "it marks images by <im_start> and <im_end>": config.mm_use_im_start_end,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise ValueError(f"the llava-hf layout can't hold this model: {'; '.join(found)}; use --layout original")


def rows_with_room(vocab_size: int, *token_ids: int) -> int:
    """Return the rows that a vocabulary needs for these tokens: as it is, or rounded up to a multiple of 64."""
    needed = max(token_ids) + 1
    return vocab_size if needed <= vocab_size else -(-needed // _ROWS_MULTIPLE) * _ROWS_MULTIPLE


def pad_vocabulary(tensors: LazyTensors, rows: int) -> LazyTensors:
    """Return the tensors with embedding and head padded to `rows` rows by the mean of their rows.

    A head's mean row never has the largest logit, and the embedding of `<image>` is never read.
    """
    short = {name for name in VOCABULARY if name in tensors and tensors.entries[name].shape[0] < rows}
    return _with_rows(tensors, short, rows, _pad_rows)


def cut_vocabulary(tensors: LazyTensors, rows: int) -> LazyTensors:
    """Return the tensors with embedding and head cut to at most `rows` rows."""
    long = {name for name in VOCABULARY if name in tensors and tensors.entries[name].shape[0] > rows}
    return _with_rows(tensors, long, rows, lambda entry, rows: entry.read()[:rows])


def _with_rows(
    tensors: LazyTensors, names: set[str], rows: int, change: Callable[[LazyTensor, int], Tensor]
) -> LazyTensors:
    changed = {}
    for name in names:
        entry = tensors.entries[name]
        read = functools.partial(change, entry, rows)
        changed[name] = entry._replace(shape=torch.Size([rows, *entry.shape[1:]]), read=read)
    return tensors.overlaid(changed)


def _pad_rows(entry: LazyTensor, rows: int) -> Tensor:
    weight = entry.read()
    mean = weight.mean(0, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])
