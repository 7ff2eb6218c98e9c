"""Write a checkpoint in the original's layout or in llava-hf's, tensor by tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlavaConfig as HfConfig
from transformers import LlavaForConditionalGeneration

from llava.clip_image_processor import PREPROCESSOR_CONFIG_FILE
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.files.json_files import write_settings
from llava.image_processing import PROCESSOR_CONFIG_FILE, hf_image_processor_settings, hf_processor_settings
from llava.model.checkpoint.checkpoint import Checkpoint, save_checkpoint, save_generation_config
from llava.model.checkpoint.hf_layout import (
    config_to_hf,
    hf_name,
    original_name,
    pad_vocabulary,
    refuse_what_hf_lacks,
    rows_with_room,
)
from llava.model.checkpoint.lazy_tensors import LazyTensors
from llava.model.checkpoint.quantized import StoredPart
from llava.model.checkpoint.strict_load import check_fit
from llava.model.checkpoint.write_tensors import write_weights
from llava.model.configuration import CONFIG_FILE, dtype_name
from llava.tokenization.llama_tokenizer import LlavaTokenizer, write_hf_tokenizer


def write_original(
    checkpoint: Checkpoint, directory: Path, dtype: torch.dtype | None, progress: Callable[[int], object] | None = None
) -> None:
    """Write a complete checkpoint in the original's layout into an empty directory; arguments as in `write_hf`."""
    save_checkpoint(
        checkpoint.tensors,
        checkpoint.config,
        checkpoint.tokenizer,
        checkpoint.image_processor,
        directory,
        dtype=dtype,
        progress=progress,
    )


def write_hf(
    checkpoint: Checkpoint,
    directory: Path,
    dtype: torch.dtype | None,
    chat_template: str,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a complete checkpoint in the llava-hf layout into an empty directory.

    Args:
        checkpoint: from `open_checkpoint`, whose weights fit its config.
        directory: exists and is empty.
        dtype: of floating-point tensors in the file; None = as they are.
        chat_template: Jinja text of the weights' prompt template.
        progress: called with the bytes of each tensor written.

    Raises:
        ValueError: if the layout can't hold the model, or transformers' model has other tensors.
    """
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    refuse_what_hf_lacks(config)
    image_token_id, pad_token_id = special_rows(tokenizer)
    rows = rows_with_room(config.vocab_size, image_token_id, pad_token_id)
    settings = config_to_hf(config, image_token_id=image_token_id, pad_token_id=pad_token_id, vocab_size=rows)
    if dtype is not None:
        name = dtype_name(dtype)
        settings = {**settings, "dtype": name, "torch_dtype": name}
        settings["text_config"] = {**settings["text_config"], "dtype": name}
    tensors = pad_vocabulary(checkpoint.tensors.renamed(original_name), rows)
    _check_complete(tensors, settings)
    write_weights(tensors.renamed(hf_name), directory, dtype=dtype, progress=progress)
    write_settings(settings, directory / CONFIG_FILE)
    write_hf_tokenizer(
        tokenizer, directory, image_token_id=image_token_id, pad_token_id=pad_token_id, chat_template=chat_template
    )
    do_pad = config.image_aspect_ratio == "pad"
    write_settings(
        hf_image_processor_settings(checkpoint.image_processor, do_pad=do_pad), directory / PREPROCESSOR_CONFIG_FILE
    )
    processor = hf_processor_settings(
        patch_size=config.mm_vision_config["patch_size"],
        select_feature=config.mm_vision_select_feature,
        image_token=DEFAULT_IMAGE_TOKEN,
    )
    write_settings(processor, directory / PROCESSOR_CONFIG_FILE)
    save_generation_config(tokenizer, directory, pad_token_id=pad_token_id)


def special_rows(tokenizer: LlavaTokenizer) -> tuple[int, int]:
    """Return the ids of `<image>` and of padding: the tokenizer's, else the next free ones."""
    known = tokenizer.get_vocab()
    image_token_id = known.get(DEFAULT_IMAGE_TOKEN, len(tokenizer))
    free = max(len(tokenizer), image_token_id + 1)
    return image_token_id, free if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _check_complete(tensors: LazyTensors, settings: dict) -> None:
    """Compare names and shapes with the model that transformers makes of the settings."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(HfConfig.from_dict(copy.deepcopy(settings)))  # which it changes
    shapes = {original_name(name): parameter.shape for name, parameter in model.named_parameters()}
    check_fit({name: {name: StoredPart(shape, None)} for name, shape in shapes.items()}, tensors, set())
