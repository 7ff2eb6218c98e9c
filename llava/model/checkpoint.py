"""Checkpoint directories: what one holds, where its parts are, and writing a complete one.

Files decide, names never. `open_checkpoint` turns any supported directory into a config and lazy tensors under their
released names; `builder` makes a model of them, `merge_lora_weights.py` another directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor

from llava.files import read_settings
from llava.image_processing import CLIPPixels, load_image_processor
from llava.model.adapter import ADAPTER_CONFIG_FILE, PROJECTOR_FILE, add_adapter, read_adapter, read_projector
from llava.model.configuration import CONFIG_FILE, LlavaConfig, load_config, save_config
from llava.model.vision_tower import VIT_L_14_336
from llava.model.weights import LazyTensors, find_weight_file, fingerprint, open_weights, write_weights
from llava.tokenization import LlavaTokenizer, load_tokenizer, save_tokenizer

logger = logging.getLogger(__name__)

GENERATION_CONFIG_FILE = "generation_config.json"
TOWER_PREFIX = "model.vision_tower.vision_tower."
DOWNLOADED_FILES = ["*.json", "*.safetensors", "*.bin", "*.model"]


class Layout(Enum):
    """What a directory holds."""

    FULL = "full weights"
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
        base: directory the adapter or projector was put on; None for full weights.
    """

    config: LlavaConfig
    tensors: LazyTensors
    tokenizer: LlavaTokenizer
    image_processor: CLIPPixels | None
    layout: Layout
    base: Path | None


def detect_layout(directory: str | Path) -> Layout:
    """Tell what a directory holds, by its files.

    Raises:
        FileNotFoundError: if it holds nothing that can be loaded.
        ValueError: if it is in the llava-hf layout.
    """
    directory = Path(directory)
    if (directory / ADAPTER_CONFIG_FILE).is_file():
        return Layout.LORA
    has_weights = find_weight_file(directory) is not None
    if (directory / PROJECTOR_FILE).is_file() and not has_weights:
        return Layout.PROJECTOR
    config = directory / CONFIG_FILE
    if config.is_file() and "vision_config" in read_settings(config):
        raise ValueError(f"{directory} is in the llava-hf layout; use a checkpoint in the original's layout")
    if not has_weights:
        found = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
        raise FileNotFoundError(f"{directory} holds no model: no weights, no adapter, no projector (found {found})")
    return Layout.FULL


def resolve_directory(name: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Return a local directory: the path itself, else a hub id's snapshot, from the cache first.

    Args:
        name: path or hub id.
        cache_dir: the hub's cache; None = the usual one.

    Raises:
        FileNotFoundError: if there is no such directory and the hub can't give it.
    """
    if Path(name).is_dir():
        return Path(name)
    with contextlib.suppress(LocalEntryNotFoundError, ValueError):
        return Path(
            snapshot_download(str(name), cache_dir=cache_dir, local_files_only=True, allow_patterns=DOWNLOADED_FILES)
        )
    try:
        return Path(snapshot_download(str(name), cache_dir=cache_dir, allow_patterns=DOWNLOADED_FILES))
    except Exception as error:  # the hub's client raises many kinds; all mean the same here
        raise FileNotFoundError(
            f"{name} is neither a directory nor in the hub's cache, and could not be downloaded ({error}); "
            "give the path of a directory, or download it where there is a network"
        ) from error


def open_checkpoint(
    model_path: str | Path,
    model_base: str | Path | None = None,
    *,
    vision_tower: str | Path | None = None,
    allow_other_base: bool = False,
    with_adapter: bool = True,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Open any supported directory without reading its tensors yet.

    Args:
        model_path: directory or hub id of full weights, a LoRA adapter or a projector.
        model_base: directory or hub id of the weights under an adapter or projector; None = the one recorded there.
        vision_tower: directory or hub id of the image encoder, for weights that come without one.
        allow_other_base: accept a base whose fingerprint differs from the one recorded.
        with_adapter: add LoRA's products to the LLM's weights; False leaves them to `builder.attach_adapter`.
        cache_dir: where hub ids are looked up and downloaded to; None = the hub's usual cache.

    Raises:
        FileNotFoundError: if a directory or file is missing.
        ValueError: if the base is not the one the adapter was trained on, or is superfluous.
    """
    directory = resolve_directory(model_path, cache_dir)
    layout = detect_layout(directory)
    if layout is Layout.FULL:
        if model_base is not None and Path(model_base) != Path(model_path):
            raise ValueError(f"{model_path} holds full weights, so model base {model_base} has no use; leave it out")
        config, tensors, base = load_config(directory), open_weights(directory), None
    else:
        config = load_config(directory)
        base = resolve_directory(model_base or _recorded_base(directory, config), cache_dir)
        config, tensors = _open_on_base(directory, layout, config, base, allow_other_base)
        if layout is Layout.LORA:
            adapter = read_adapter(directory)
            tensors = add_adapter(tensors, adapter if with_adapter else adapter.outside_llm())
    parts = base or directory
    tensors, config, processor_directory = attach_tower(config, tensors, vision_tower, [directory, parts], cache_dir)
    processor = None
    if processor_directory is not None:
        processor = load_image_processor(processor_directory, config.mm_vision_config["image_size"])
    has_tokenizer = (directory / "tokenizer.model").is_file()
    return Checkpoint(config, tensors, load_tokenizer(directory if has_tokenizer else parts), processor, layout, base)


def _recorded_base(directory: Path, config: LlavaConfig) -> str:
    settings_file = directory / ADAPTER_CONFIG_FILE
    settings = read_settings(settings_file) if settings_file.is_file() else {}
    base = config.base_model_name_or_path or settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{directory} needs the weights it was trained on; pass --model-base")
    return base


def _open_on_base(
    directory: Path, layout: Layout, config: LlavaConfig, base: Path, allow_other_base: bool
) -> tuple[LlavaConfig, LazyTensors]:
    if detect_layout(base) is not Layout.FULL:
        raise ValueError(f"model base {base} holds a {detect_layout(base).value}; give the directory of full weights")
    weights = open_weights(base)
    if config.base_model_fingerprint is not None:
        found = fingerprint(weights)
        if found != config.base_model_fingerprint and not allow_other_base:
            raise ValueError(
                f"{directory} was trained on {config.base_model_name_or_path}, fingerprint "
                f"{config.base_model_fingerprint}, but {base} has fingerprint {found}; give that base, or "
                "--allow-other-base to use this one"
            )
    if layout is Layout.LORA:
        return config, weights
    projector = read_projector(directory)
    strangers = [name for name in projector if "mm_projector" not in name]
    if strangers:
        raise ValueError(f"{directory / PROJECTOR_FILE} holds {strangers[0]}; only a projector is supported there")
    return config, weights.overlaid(projector.readers)


def attach_tower(
    config: LlavaConfig,
    tensors: LazyTensors,
    vision_tower: str | Path | None,
    near: list[Path],
    cache_dir: str | Path | None = None,
) -> tuple[LazyTensors, LlavaConfig, Path | None]:
    """Find the image encoder: inside the weights, else where asked, else beside them, else by its name.

    Args:
        config: of the model; `mm_vision_config` is filled in.
        tensors: of the model; the encoder's are added.
        vision_tower: directory or hub id; None = as the config names it.
        near: directories whose neighbours are looked at.
        cache_dir: the hub's cache; None = the usual one.

    Returns:
        tensors, config, and the directory of `preprocessor_config.json`; None where the model has no encoder.

    Raises:
        FileNotFoundError: if there is none to be found.
    """
    inside = any(name.startswith(TOWER_PREFIX) for name in tensors)
    name = str(vision_tower or config.mm_vision_tower or "")
    if not inside and not name:
        return tensors, config, None
    places = [Path(name), *(directory.parent / Path(name).name for directory in near)] if name else []
    beside = next((place for place in places if place.is_dir()), None)
    if inside:
        logger.info("vision tower: inside the checkpoint")
        holder = next((place for place in near if (place / "preprocessor_config.json").is_file()), beside or near[-1])
        sizes = config.mm_vision_config or _tower_sizes(beside, name)
    else:
        holder = beside or resolve_directory(name, cache_dir)
        logger.info("vision tower: %s", holder)
        sizes = _tower_sizes(holder, name)
        found = open_weights(holder)
        tensors = tensors.overlaid(
            {TOWER_PREFIX + key: reader for key, reader in found.readers.items() if key.startswith("vision_model.")}
        )
    config.mm_vision_config = sizes
    config.mm_vision_tower = name or None
    config.mm_hidden_size = config.mm_hidden_size or sizes["hidden_size"]
    return tensors, config, holder


def _tower_sizes(directory: Path | None, name: str) -> dict[str, Any]:
    """Return the encoder's sizes from its `config.json`; OpenAI's ViT-L/14-336 is known without one."""
    path = directory / CONFIG_FILE if directory else None
    if path is not None and path.is_file():
        settings = read_settings(path)
        settings = settings.get("vision_config", settings)
        return {key: settings.get(key, default) for key, default in VIT_L_14_336.items()}
    if "clip-vit-large-patch14-336" in name:
        return dict(VIT_L_14_336)
    raise FileNotFoundError(f"the sizes of vision tower {name!r} are unknown; pass --vision-tower with its directory")


def save_checkpoint(
    tensors: Mapping[str, Tensor],
    config: LlavaConfig,
    tokenizer: LlavaTokenizer,
    image_processor: CLIPPixels,
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
        image_processor: of the model.
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
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # No sampling settings: with them and without do_sample newer libraries refuse to save the model.
    text = json.dumps({key: value for key, value in ids.items() if value is not None}, indent=2) + "\n"
    (Path(directory) / GENERATION_CONFIG_FILE).write_text(text, encoding="utf-8")


def file_name(module_name: str) -> str:
    """Return a parameter's name in released files; newer libraries left out a level of the encoder's."""
    inner = module_name.removeprefix(TOWER_PREFIX)
    is_short = inner != module_name and not inner.startswith("vision_model.")
    return f"{TOWER_PREFIX}vision_model.{inner}" if is_short else module_name


def state_for_file(model: torch.nn.Module, state: Mapping[str, Tensor] | None = None) -> LazyTensors:
    """Return a model's tensors by released name, with those layers of the encoder that are never run.

    Args:
        model: a `LlavaLlamaForCausalLM`.
        state: its state dict where that had to be gathered (ZeRO-3); None = `model.state_dict()`.
    """
    named = {file_name(name): tensor for name, tensor in (state or model.state_dict()).items()}
    named.update(model.get_vision_tower().unused_tensors)
    return LazyTensors({name: functools.partial(named.__getitem__, name) for name in named})
