"""Open a checkpoint of any supported layout, and write a complete one.

The files decide what a directory is, never its name. `open_checkpoint` returns a config and lazy tensors under their
released names: `builder` makes a model of them, the merge program another checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.clip_image_processor import CLIPPixels
from llava.constants import CHECKPOINT_PREFIX, DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.files.json_files import read_settings, write_settings
from llava.image_processing import load_image_processor
from llava.model.adapter.adapter_config import ADAPTER_CONFIG_FILE
from llava.model.adapter.lora import read_adapter, refuse_partial
from llava.model.adapter.merge import add_adapter, fit_to_base
from llava.model.adapter.non_lora import PROJECTOR_FILE, read_projector
from llava.model.adapter.recorded_base import check_base, recorded_base, warn_of_other_base
from llava.model.checkpoint.directory_contents import describe_lack
from llava.model.checkpoint.find_vision_tower import attach_tower
from llava.model.checkpoint.hf_layout import config_from_hf, open_hf_weights
from llava.model.checkpoint.hub import resolve_directory, snapshot_revision
from llava.model.checkpoint.lazy_tensors import LazyTensors, is_same_fingerprint
from llava.model.checkpoint.read_tensors import find_weight_file, open_weights
from llava.model.checkpoint.strict_load import check_sizes
from llava.model.checkpoint.write_tensors import write_weights
from llava.model.configuration import CONFIG_FILE, LlavaConfig, dtype_name, is_hf_config, load_config, save_config
from llava.model.quantization import forget_quantization, refuse_quantized
from llava.model.vision_tower import released_name
from llava.tokenization.llama_tokenizer import VOCABULARY_FILE, LlavaTokenizer, load_tokenizer, save_tokenizer
from llava.tokenization.tokenizer_json import TOKENIZER_JSON_FILE

logger = logging.getLogger(__name__)

GENERATION_CONFIG_FILE = "generation_config.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Layout(Enum):
    """Kind of a checkpoint."""

    FULL = "full weights"
    HF = "full weights in the llava-hf layout"
    LORA = "LoRA adapter"
    PROJECTOR = "projector"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Everything needed to build a model."""

    config: LlavaConfig  # with the sizes of the vision tower, if there is one
    tensors: LazyTensors  # by released name, such as `model.mm_projector.0.weight`, `lm_head.weight`
    tokenizer: LlavaTokenizer | None  # None where it was not requested
    image_processor: CLIPPixels | None  # None without a vision tower
    layout: Layout
    directory: Path
    base: Path | None  # directory of the weights under an adapter or projector; None for full weights


def detect_layout(directory: str | Path) -> Layout:
    """Detect the layout of a checkpoint by its files.

    Raises:
        FileNotFoundError: if the directory holds nothing that can be loaded.
        ValueError: if its `config.json` is damaged.
    """
    directory = Path(directory)
    if (directory / ADAPTER_CONFIG_FILE).is_file():
        return Layout.LORA
    has_weights = find_weight_file(directory) is not None
    if (directory / PROJECTOR_FILE).is_file() and not has_weights:
        return Layout.PROJECTOR
    if not has_weights:
        raise FileNotFoundError(describe_lack(directory))
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
    with_tokenizer: bool = True,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Open any supported checkpoint without reading its tensors yet.

    Args:
        model_path: directory or hub id of full weights, a LoRA adapter or a projector.
        model_base: directory or hub id of the base of an adapter or projector; None = the one recorded there.
        vision_tower: directory or hub id, for weights that come without a vision tower.
        mm_projector: file or directory of the projector, for an adapter that comes without the one it was trained with.
        allow_other_base: accept a base whose fingerprint differs from the one recorded.
        with_adapter: merge LoRA's products; False leaves them to `builder.attach_adapter`.
        with_tokenizer: load the tokenizer; with False its files may be missing.
        cache_dir: the hub's cache; None = the usual one.

    Raises:
        FileNotFoundError: if a directory or file is missing.
        ValueError: if the base is not the one the adapter was trained on, or full weights are given a base.
    """
    directory = resolve_directory(model_path, cache_dir)
    layout = detect_layout(directory)
    base, parts = None, directory
    if layout in (Layout.FULL, Layout.HF):
        if model_base is not None and Path(model_base) != Path(model_path):
            raise ValueError(f"{model_path} holds full weights, so model base {model_base} has no use; leave it out")
        config, tensors = _open_full(directory, layout)
        if config.base_model_name_or_path is None and snapshot_revision(directory):
            config.base_model_name_or_path = str(model_path)
            config.base_model_revision = snapshot_revision(directory)
    else:
        config = find_config(directory)
        named, base = _find_base(directory, config, model_base, cache_dir)
        expected, parts = None if config is None or allow_other_base else config.base_model_fingerprint, base
        config, tensors = _open_base(directory, config, base)
    tensors, config, processor_directory = attach_tower(config, tensors, vision_tower, [directory, parts], cache_dir)
    if base is not None:  # after the vision tower, which adapters of the original change too
        found = check_base(directory, config.base_model_name_or_path, base, tensors, expected)
        config.base_model_name_or_path, config.base_model_revision = str(named), snapshot_revision(base)
        config.base_model_fingerprint = found
        tensors = _put_on_base(directory, layout, config, tensors, mm_projector, with_adapter=with_adapter)
    check_sizes(config, tensors)
    processor = None
    if processor_directory is not None:
        processor = load_image_processor(processor_directory, config.mm_vision_config["image_size"])
    tokenizer = open_tokenizer(directory if _has_tokenizer(directory) else parts, config) if with_tokenizer else None
    return Checkpoint(config, tensors, tokenizer, processor, layout, directory, base)


def open_tokenizer(directory: Path, config: LlavaConfig) -> LlavaTokenizer:
    """Load a checkpoint's tokenizer, with the image tokens that its config names.

    As in the original, image tokens that its files don't list get the next free ids: `<im_patch>`, which no prompt has,
    then `<im_start>` and `<im_end>`.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if its files are damaged, or the embedding has no rows for `<im_start>` and `<im_end>`.
    """
    config_file = directory / CONFIG_FILE
    is_hf = config_file.is_file() and is_hf_config(read_settings(config_file))
    is_cut = is_hf or (directory / ADAPTER_CONFIG_FILE).is_file()  # an adapter of another program may add tokens
    tokenizer = load_tokenizer(directory, rows=config.vocab_size if is_cut else None)
    marks = [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN] if config.mm_use_im_start_end else []
    patch = [DEFAULT_IMAGE_PATCH_TOKEN] if config.mm_use_im_patch_token else []
    if patch and not marks and len(tokenizer) >= config.vocab_size:
        patch = []  # it would have no row, and needs none
    tokenizer.add_tokens([*patch, *marks], special_tokens=True)
    _check_rows(tokenizer, config, directory)
    ids = tokenizer.convert_tokens_to_ids(marks)
    if marks and max(ids) >= config.vocab_size:
        raise ValueError(
            f"{directory}: mm_use_im_start_end is true in {CONFIG_FILE}, but {marks[0]} and {marks[1]} would have ids "
            f"{ids} and the vocabulary ends at {config.vocab_size - 1}; use the tokenizer saved with the weights, or "
            "set it to false for weights trained without these tokens"
        )
    return tokenizer


def _check_rows(tokenizer: LlavaTokenizer, config: LlavaConfig, directory: Path) -> None:
    """Make sure that the embedding has a row for every id of the tokenizer."""
    needed = max(tokenizer.vocab_size - 1, *(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id))
    if needed >= config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has ids up to {needed} for text, and the vocabulary of the weights ends at "
            f"{config.vocab_size - 1}; use the tokenizer saved with the weights"
        )


def read_config(directory: Path) -> LlavaConfig:
    """Read the config of a checkpoint in any layout, without the sizes of a vision tower that lies elsewhere.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another architecture.
    """
    path = directory / CONFIG_FILE
    if not path.is_file() and (directory / ADAPTER_CONFIG_FILE).is_file():
        base = recorded_base(directory, None)[0] or "which it doesn't name"
        raise FileNotFoundError(f"{directory} is an adapter without {CONFIG_FILE}; give its base instead, {base}")
    settings = read_settings(path) if path.is_file() else {}
    return config_from_hf(settings, str(path)) if is_hf_config(settings) else load_config(directory)


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (VOCABULARY_FILE, TOKENIZER_JSON_FILE))


def _open_full(directory: Path, layout: Layout) -> tuple[LlavaConfig, LazyTensors]:
    if layout is Layout.HF:
        config, tensors = open_hf_weights(directory)
    else:
        config, tensors = load_config(directory), open_weights(directory).renamed(released_name)
    if config.tie_word_embeddings and _HEAD not in tensors and _EMBEDDING in tensors:
        logger.info("%s: the head is the embedding (tie_word_embeddings); it is read as a weight of its own", directory)
        tensors = tensors.overlaid({_HEAD: tensors.entries[_EMBEDDING]})
    config.tie_word_embeddings = False  # names are compared and written one by one
    return config, tensors


def find_config(directory: Path) -> LlavaConfig | None:
    """Return the config of an adapter or projector; the original's `checkpoint-N` has it one level up, or nowhere."""
    places = [directory, directory.parent] if directory.name.startswith(CHECKPOINT_PREFIX) else [directory]
    place = next((place for place in places if (place / CONFIG_FILE).is_file()), None)
    return None if place is None else read_config(place)


def _find_base(
    directory: Path, config: LlavaConfig | None, model_base: str | Path | None, cache_dir: str | Path | None
) -> tuple[str | Path, Path]:
    """Return name and directory of the base that was given, else of the one that an adapter or projector records."""
    recorded, revision = recorded_base(directory, config)
    named = model_base or recorded
    if not named:
        raise ValueError(f"{directory} needs the weights it was trained on; pass --model-base")
    base = resolve_directory(named, cache_dir, revision=None if model_base else revision)
    if config is None or config.base_model_fingerprint is None:
        warn_of_other_base(directory, recorded, named, base)
    return named, base


def _open_base(directory: Path, config: LlavaConfig | None, base: Path) -> tuple[LlavaConfig, LazyTensors]:
    """Open the weights under an adapter or projector."""
    layout = detect_layout(base)
    if layout not in (Layout.FULL, Layout.HF):
        raise ValueError(f"model base {base} holds a {layout.value}; give the directory of full weights")
    base_config, weights = _open_full(base, layout)
    refuse_quantized(base_config, base, "the base of an adapter or projector")
    if config is None:
        logger.info("%s has no %s; that of %s is used", directory, CONFIG_FILE, base)
        config = base_config
    else:
        config.mm_vision_config = config.mm_vision_config or base_config.mm_vision_config
        forget_quantization(config)
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
        merged, found = config.merged_adapter_fingerprint, adapter.fingerprint()
        if merged is not None and is_same_fingerprint(merged, found):
            raise ValueError(
                f"{directory} is merged into {config.base_model_name_or_path} already; use that as it is, or give the "
                "base from before the merge"
            )
        refuse_partial(adapter, weights)
        if not with_adapter:
            return weights.overlaid(fit_to_base(adapter, weights).replaced.entries)
        if not adapter.trains_projector:
            logger.warning("%s holds no projector, so the one of %s is kept", directory, config.base_model_name_or_path)
        config.merged_adapter_fingerprint = found
        return add_adapter(weights, adapter)
    without = weights.renamed(lambda name: None if "mm_projector." in name else name)  # it may be of another type
    return without.overlaid(read_projector(directory).entries)


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
    """Write a complete checkpoint in the released layout into an existing empty directory.

    Args:
        tensors: by released name, with the vision tower's; see `state_for_file`.
        config: of the model.
        tokenizer: of the model.
        image_processor: of the model; None without a vision tower.
        directory: exists and is empty.
        dtype: of the tensors in the file; None = as they are.
        write_options: of `write_weights`.
    """
    write_weights(tensors, directory, dtype=dtype, **write_options)
    if dtype is not None:
        config = LlavaConfig.from_dict({**config.to_dict(), "dtype": dtype_name(dtype)})
    save_settings(config, tokenizer, image_processor, directory)


def save_settings(
    config: LlavaConfig, tokenizer: LlavaTokenizer, image_processor: CLIPPixels | None, directory: str | Path
) -> None:
    """Write the files of a checkpoint other than its weights."""
    save_config(config, directory)
    save_tokenizer(tokenizer, directory)
    if image_processor is not None:
        image_processor.save_pretrained(directory)
    save_generation_config(tokenizer, directory, pad_token_id=tokenizer.pad_token_id)


def save_generation_config(tokenizer: LlavaTokenizer, directory: str | Path, *, pad_token_id: int | None) -> None:
    """Write `generation_config.json` without sampling settings, some of which transformers refuses to save."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad_token_id}
    known = {key: value for key, value in ids.items() if value is not None}
    write_settings(known, Path(directory) / GENERATION_CONFIG_FILE)


def state_for_file(model: torch.nn.Module, state: Mapping[str, Tensor] | None = None) -> LazyTensors:
    """Return a model's tensors by released name, with the vision tower's layers that are never run.

    Args:
        model: a `LlavaLlamaForCausalLM`.
        state: state dict, where it had to be gathered (ZeRO-3); None = `model.state_dict()`.
    """
    named = {released_name(name): tensor for name, tensor in (state or model.state_dict()).items()}
    tower = model.get_vision_tower()
    return LazyTensors.of({**named, **(tower.unused_tensors if tower is not None else {})})
