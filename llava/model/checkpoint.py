"""Checkpoint directories: what one holds, where its parts are, and writing a complete one.

Files decide, names never. `open_checkpoint` turns any supported directory into a config and lazy tensors under their
released names; `builder` makes a model of them, `merge_lora_weights.py` another directory.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.files import read_settings
from llava.image_processing import CLIPPixels, load_image_processor
from llava.model.adapter import ADAPTER_CONFIG_FILE, PROJECTOR_FILE, add_adapter, read_adapter, read_projector
from llava.model.configuration import CONFIG_FILE, LlavaConfig, is_hf_config, load_config, save_config
from llava.model.encoder_place import attach_tower
from llava.model.hf_layout import config_from_hf, open_hf_weights
from llava.model.hub import resolve_directory, snapshot_revision
from llava.model.lazy_tensors import LazyTensors, fingerprint
from llava.model.quantization import refuse_quantized
from llava.model.vision_tower import released_name
from llava.model.weight_writer import write_weights
from llava.model.weights import find_weight_file, open_weights
from llava.tokenization import VOCABULARY_FILE, LlavaTokenizer, load_tokenizer, save_tokenizer

logger = logging.getLogger(__name__)

GENERATION_CONFIG_FILE = "generation_config.json"
INTERMEDIATE_DIRECTORY = "checkpoint-"
"""How training's directories of unfinished runs begin; the run's own files are one level up."""


class Layout(Enum):
    """What a directory holds."""

    FULL = "full weights"
    HF = "full weights in the llava-hf layout"
    LORA = "LoRA adapter"
    PROJECTOR = "projector"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Everything needed to build a model.

    Attributes:
        config: sizes included, those of the vision tower too if there is one.
        tensors: by released name (`model.layers...`, `model.mm_projector...`, `model.vision_tower...`,
            `lm_head.weight`).
        tokenizer: of the model.
        image_processor: fits the vision tower; None without one.
        layout: what the directory held.
        directory: where it lies.
        base: directory the adapter or projector was put on; None for full weights.
    """

    config: LlavaConfig
    tensors: LazyTensors
    tokenizer: LlavaTokenizer
    image_processor: CLIPPixels | None
    layout: Layout
    directory: Path
    base: Path | None


def detect_layout(directory: str | Path) -> Layout:
    """Tell what a directory holds, by its files.

    Raises:
        FileNotFoundError: if it holds nothing that can be loaded.
        ValueError: if one of the files it depends on is damaged.
    """
    directory = Path(directory)
    if (directory / ADAPTER_CONFIG_FILE).is_file():
        return Layout.LORA
    has_weights = find_weight_file(directory) is not None
    if (directory / PROJECTOR_FILE).is_file() and not has_weights:
        return Layout.PROJECTOR
    if not has_weights:
        found = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
        raise FileNotFoundError(f"{directory} holds no model: no weights, no adapter, no projector (found {found})")
    config = directory / CONFIG_FILE
    return Layout.HF if config.is_file() and is_hf_config(read_settings(config)) else Layout.FULL


def open_checkpoint(
    model_path: str | Path,
    model_base: str | Path | None = None,
    *,
    vision_tower: str | Path | None = None,
    mm_projector: str | Path | None = None,
    allow_other_base: bool = False,
    with_adapter: bool = True,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Open any supported directory without reading its tensors yet.

    Args:
        model_path: directory or hub id of full weights, a LoRA adapter or a projector.
        model_base: directory or hub id of the weights under an adapter or projector; None = the one recorded there.
        vision_tower: directory or hub id of the image encoder, for weights that come without one.
        mm_projector: file or directory of the projector, for an adapter that comes without the one it was trained with.
        allow_other_base: accept a base whose fingerprint differs from the one recorded.
        with_adapter: add LoRA's products to the LLM's weights; False leaves them to `builder.attach_adapter`.
        cache_dir: where hub ids are looked up and downloaded to; None = the hub's usual cache.

    Raises:
        FileNotFoundError: if a directory or file is missing.
        ValueError: if the base is not the one the adapter was trained on, or is superfluous.
    """
    directory = resolve_directory(model_path, cache_dir)
    layout = detect_layout(directory)
    base = None
    if layout in (Layout.FULL, Layout.HF):
        if model_base is not None and Path(model_base) != Path(model_path):
            raise ValueError(f"{model_path} holds full weights, so model base {model_base} has no use; leave it out")
        config, tensors = _open_full(directory, layout)
        if config.base_model_name_or_path is None and snapshot_revision(directory):
            config.base_model_name_or_path = str(model_path)
            config.base_model_revision = snapshot_revision(directory)
    else:
        config = _config_beside(directory)
        named = model_base or _recorded_base(directory, config)
        revision = config.base_model_revision if model_base is None else None
        base = resolve_directory(named, cache_dir, revision=revision)
        config, tensors = _open_base(directory, config, base, named, allow_other_base)
    parts = base or directory
    tensors, config, processor_directory = attach_tower(config, tensors, vision_tower, [directory, parts], cache_dir)
    if base is not None:  # behind the encoder, which adapters of the original change too
        tensors = _put_on_base(directory, layout, config, tensors, mm_projector, with_adapter=with_adapter)
    processor = None
    if processor_directory is not None:
        processor = load_image_processor(processor_directory, config.mm_vision_config["image_size"])
    rows = config.vocab_size if layout is Layout.HF else None
    tokenizer = load_tokenizer(directory if _has_tokenizer(directory) else parts, rows=rows)
    return Checkpoint(config, tensors, tokenizer, processor, layout, directory, base)


def read_config(directory: Path) -> LlavaConfig:
    """Read the config of a directory in any layout; the sizes of an encoder elsewhere are not in it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another architecture.
    """
    path = directory / CONFIG_FILE
    settings = read_settings(path) if path.is_file() else {}
    return config_from_hf(settings, str(path)) if is_hf_config(settings) else load_config(directory)


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (VOCABULARY_FILE, "tokenizer.json"))


def _open_full(directory: Path, layout: Layout) -> tuple[LlavaConfig, LazyTensors]:
    if layout is Layout.HF:
        return open_hf_weights(directory)
    return load_config(directory), open_weights(directory).renamed(released_name)


def _config_beside(directory: Path) -> LlavaConfig | None:
    """Return the config of an adapter or projector; the original's unfinished runs have it one level up, or nowhere."""
    places = [directory, directory.parent] if directory.name.startswith(INTERMEDIATE_DIRECTORY) else [directory]
    place = next((place for place in places if (place / CONFIG_FILE).is_file()), None)
    return None if place is None else load_config(place)


def _recorded_base(directory: Path, config: LlavaConfig | None) -> str:
    settings_file = directory / ADAPTER_CONFIG_FILE
    settings = read_settings(settings_file) if settings_file.is_file() else {}
    base = (config and config.base_model_name_or_path) or settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{directory} needs the weights it was trained on; pass --model-base")
    return base


def _open_base(
    directory: Path, config: LlavaConfig | None, base: Path, named: str | Path, allow_other_base: bool
) -> tuple[LlavaConfig, LazyTensors]:
    """Open the weights under an adapter or projector; the config says from now on which they are."""
    layout = detect_layout(base)
    if layout not in (Layout.FULL, Layout.HF):
        raise ValueError(f"model base {base} holds a {layout.value}; give the directory of full weights")
    base_config, weights = _open_full(base, layout)
    refuse_quantized(base_config, base, "the base of an adapter or projector")
    if config is None:
        logger.info("%s has no %s; that of %s is used", directory, CONFIG_FILE, base)
        config = base_config
        recorded = None
    else:
        recorded = config.base_model_fingerprint
    found = fingerprint(weights)
    if recorded is not None and found != recorded and not allow_other_base:
        raise ValueError(
            f"{directory} was trained on {config.base_model_name_or_path}, fingerprint {recorded}, but {base} has "
            f"fingerprint {found}; give that base, or --allow-other-base to use this one"
        )
    config.base_model_name_or_path, config.base_model_revision = str(named), snapshot_revision(base)
    config.base_model_fingerprint = found
    config.merged_adapter_fingerprint = base_config.merged_adapter_fingerprint
    return config, weights


def _put_on_base(
    directory: Path,
    layout: Layout,
    config: LlavaConfig,
    weights: LazyTensors,
    mm_projector: str | Path | None,
    *,
    with_adapter: bool,
) -> LazyTensors:
    if layout is Layout.LORA:
        adapter = read_adapter(directory, mm_projector)
        identity = adapter.fingerprint()
        if identity == config.merged_adapter_fingerprint:
            raise ValueError(
                f"{directory} is merged into {config.base_model_name_or_path} already; use that as it is, or give the "
                "base from before the merge"
            )
        if not with_adapter:
            return add_adapter(weights, adapter.outside_llm())
        config.merged_adapter_fingerprint = identity
        return add_adapter(weights, adapter)
    projector = read_projector(directory)
    strangers = [name for name in projector if "mm_projector" not in name]
    if strangers:
        raise ValueError(f"{directory / PROJECTOR_FILE} holds {strangers[0]}; only a projector is supported there")
    return weights.overlaid(projector.entries)


def save_checkpoint(
    tensors: LazyTensors,
    config: LlavaConfig,
    tokenizer: LlavaTokenizer,
    image_processor: CLIPPixels | None,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    **write_options: Any,
) -> None:
    """Write a complete directory in the released layout, into an existing empty directory.

    Args:
        tensors: by released name, the vision tower's too; see `state_for_file`.
        config: of the model.
        tokenizer: of the model.
        image_processor: of the model; None without image encoder.
        directory: exists and is empty.
        dtype: of the tensors in the file; None = as they are.
        write_options: further ones of `write_weights`.
    """
    write_weights(tensors, directory, dtype=dtype, **write_options)
    if dtype is not None:
        config = LlavaConfig.from_dict({**config.to_dict(), "dtype": str(dtype).removeprefix("torch.")})
    save_settings(config, tokenizer, image_processor, directory)


def save_settings(
    config: LlavaConfig, tokenizer: LlavaTokenizer, image_processor: CLIPPixels | None, directory: str | Path
) -> None:
    """Write everything of a checkpoint but its weights."""
    save_config(config, directory)
    save_tokenizer(tokenizer, directory)
    if image_processor is not None:
        image_processor.save_pretrained(directory)
    save_generation_config(tokenizer, directory, pad_token_id=tokenizer.pad_token_id)


def save_generation_config(tokenizer: LlavaTokenizer, directory: str | Path, *, pad_token_id: int | None) -> None:
    """Write `generation_config.json`: with sampling settings and without do_sample newer libraries refuse to save."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad_token_id}
    text = json.dumps({key: value for key, value in ids.items() if value is not None}, indent=2) + "\n"
    (Path(directory) / GENERATION_CONFIG_FILE).write_text(text, encoding="utf-8")


def state_for_file(model: torch.nn.Module, state: Mapping[str, Tensor] | None = None) -> LazyTensors:
    """Return a model's tensors by released name, with those layers of the encoder that are never run.

    Args:
        model: a `LlavaLlamaForCausalLM`.
        state: its state dict where that had to be gathered (ZeRO-3); None = `model.state_dict()`.
    """
    named = {released_name(name): tensor for name, tensor in (state or model.state_dict()).items()}
    return LazyTensors.of({**named, **model.get_vision_tower().unused_tensors})
