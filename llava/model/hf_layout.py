"""The llava-hf layout: the same weights under transformers' names, with room for `<image>` in the vocabulary.

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

from llava.files import read_settings
from llava.image_processing import pads_images
from llava.model.configuration import CONFIG_FILE, LlavaConfig, config_settings, parse_config
from llava.model.lazy_tensors import LazyTensor, LazyTensors
from llava.model.vision_tower import TOWER_PREFIX, VIT_L_14_336, released_name
from llava.model.weights import open_weights

logger = logging.getLogger(__name__)

RECORD = "llava"
"""Key of the hf `config.json` under which stands what its other keys can't say."""
_DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
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
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_ROWS_MULTIPLE = 64
_STRATEGIES = {"default": "patch", "full": "cls_patch"}


def original_name(name: str) -> str | None:
    """Return a tensor's released name for its name in an hf file of any age; None for what the config gives."""
    if name.endswith(_DERIVED):
        return None
    inner = name.removeprefix("model.")
    if inner.startswith(TOWER_PREFIX.removeprefix("model.")):
        return name
    for theirs, ours in _TO_ORIGINAL:
        if inner.startswith(theirs):
            return released_name(ours + inner.removeprefix(theirs))
    return name


def hf_name(name: str) -> str:
    """Return a tensor's name in the llava-hf directories of the hub, which every version of transformers reads.

    Raises:
        ValueError: if the layout has no place for it.
    """
    for ours, theirs in _TO_HF:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{name} has no place in the llava-hf layout; only LLaVA-1.5 with an mlp2x_gelu projector fits")


def open_hf_weights(directory: str | Path) -> tuple[LlavaConfig, LazyTensors]:
    """Open a directory in the llava-hf layout as if it were in the original's.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if it is no LLaVA-1.5.
    """
    directory = Path(directory)
    settings = read_settings(directory / CONFIG_FILE)
    config = config_from_hf(settings, str(directory / CONFIG_FILE))
    if "image_aspect_ratio" not in settings.get(RECORD, {}):
        config.image_aspect_ratio = "pad" if pads_images(directory) else None
        if config.image_aspect_ratio is None:
            logger.info("%s crops pictures to a square, as its image processor says", directory)
    tensors = open_weights(directory).renamed(original_name)
    return config, cut_vocabulary(tensors, config.vocab_size)


def config_from_hf(settings: Mapping[str, Any], place: str) -> LlavaConfig:
    """Make our config of the content of an hf `config.json`; `place` is for messages.

    Keys that older files leave out have the values that transformers gives them.

    Raises:
        ValueError: if it describes something else than LLaVA-1.5.
    """
    text, vision = dict(settings.get("text_config") or {}), dict(settings["vision_config"])
    expected = {
        "model_type": (settings.get("model_type", "llava"), "llava"),
        "text_config.model_type": (text.pop("model_type", "llama"), "llama"),
        "vision_config.model_type": (vision.get("model_type", "clip_vision_model"), "clip_vision_model"),
        "projector_hidden_act": (settings.get("projector_hidden_act", "gelu"), "gelu"),
        "multimodal_projector_bias": (settings.get("multimodal_projector_bias", True), True),
    }
    wrong = [f"{key} is {found!r}" for key, (found, wanted) in expected.items() if found != wanted]
    layer, strategy = settings.get("vision_feature_layer", -2), settings.get("vision_feature_select_strategy")
    if not isinstance(layer, int):
        wrong.append(f"vision_feature_layer is {layer!r}")
    if strategy not in (None, *_STRATEGIES):
        wrong.append(f"vision_feature_select_strategy is {strategy!r}")
    if wrong:
        raise ValueError(f"{place}: {', '.join(wrong)}, so this is no LLaVA-1.5; use the library it was made for")
    dtype = settings.get("dtype") or settings.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    sizes = {key: vision.get(key, default) for key, default in VIT_L_14_336.items()}
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
        **settings.get(RECORD, {}),
    }
    return parse_config({key: value for key, value in own.items() if key != "quantization_config" or value}, place)


def config_to_hf(config: LlavaConfig, *, image_token_id: int, pad_token_id: int, vocab_size: int) -> dict[str, Any]:
    """Return the content of the hf `config.json` for a config of ours.

    Args:
        config: of a LLaVA-1.5 with its image encoder.
        image_token_id: of `<image>`.
        pad_token_id: of the token that fills up rows.
        vocab_size: rows of the embedding in the hf file.

    Raises:
        ValueError: if the layout can't say what the config says.
    """
    refuse_what_hf_lacks(config)
    ours = config_settings(config)
    known = LlamaConfig().to_dict().keys() - {"architectures", "transformers_version", "model_type", "dtype"}
    text = {key: ours[key] for key in sorted({*known, "rope_theta"}) if key in ours}
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
    told = config_settings(config_from_hf(settings, CONFIG_FILE))
    settings[RECORD] = {key: value for key, value in ours.items() if key not in told or told[key] != value}
    return settings


def refuse_what_hf_lacks(config: LlavaConfig) -> None:
    """Make sure that a model can be said in the llava-hf layout.

    Raises:
        ValueError: if it can't.
    """
    reasons = {
        "it has no image encoder": config.mm_vision_config is None,
        f"its projector is {config.mm_projector_type!r}, not mlp2x_gelu": config.mm_projector_type != "mlp2x_gelu",
        f"its images are cut up ({config.image_aspect_ratio!r})": config.image_aspect_ratio == "anyres",
        "it marks images by <im_start> and <im_end>": config.mm_use_im_start_end,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise ValueError(f"the llava-hf layout can't hold this model: {'; '.join(found)}; use --layout original")


def rows_with_room(vocab_size: int, *token_ids: int) -> int:
    """Return how many rows a vocabulary needs for these tokens: as it is, or filled up to a multiple of 64."""
    needed = max(token_ids) + 1
    return vocab_size if needed <= vocab_size else -(-needed // _ROWS_MULTIPLE) * _ROWS_MULTIPLE


def pad_vocabulary(tensors: LazyTensors, rows: int) -> LazyTensors:
    """Return the tensors with the mean of the rows of embedding and head added until there are `rows`.

    A row of the head that is the mean of the others never wins, and the embedding of `<image>` is never read.
    """
    short = {name: entry for name, entry in _vocabulary(tensors).items() if entry.shape[0] < rows}
    return tensors.overlaid({name: _with_rows(entry, rows, _with_mean_rows) for name, entry in short.items()})


def cut_vocabulary(tensors: LazyTensors, rows: int) -> LazyTensors:
    """Return the tensors with the first `rows` rows of embedding and head; the same where there are no more."""
    long = {name: entry for name, entry in _vocabulary(tensors).items() if entry.shape[0] > rows}
    return tensors.overlaid({name: _with_rows(entry, rows, _first_rows) for name, entry in long.items()})


def _vocabulary(tensors: LazyTensors) -> dict[str, LazyTensor]:
    return {name: tensors.entries[name] for name in _VOCABULARY if name in tensors}


def _with_rows(entry: LazyTensor, rows: int, change: Callable[[LazyTensor, int], Tensor]) -> LazyTensor:
    shape = torch.Size([rows, *entry.shape[1:]])
    return LazyTensor(shape, entry.dtype, functools.partial(change, entry, rows), entry.source)


def _with_mean_rows(entry: LazyTensor, rows: int) -> Tensor:
    weight = entry.read()
    mean = weight.mean(0, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])


def _first_rows(entry: LazyTensor, rows: int) -> Tensor:
    return entry.read()[:rows]
