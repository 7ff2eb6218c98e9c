"""Writing a checkpoint in either layout, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import accelerate
import torch
from transformers import LlavaConfig as HfConfig
from transformers import LlavaForConditionalGeneration

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.files import write_settings
from llava.image_processing import PREPROCESSOR_CONFIG_FILE, hf_image_processor_settings, hf_processor_settings
from llava.model.builder import check_complete, check_fit
from llava.model.checkpoint import Checkpoint, save_checkpoint, save_generation_config
from llava.model.configuration import CONFIG_FILE
from llava.model.hf_layout import config_to_hf, hf_name, original_name, pad_vocabulary, rows_with_room
from llava.model.lazy_tensors import LazyTensors
from llava.model.quantized_files import StoredPart
from llava.model.weight_writer import write_weights
from llava.tokenization import LlavaTokenizer, write_hf_tokenizer

PROCESSOR_CONFIG_FILE = "processor_config.json"


def write_original(
    checkpoint: Checkpoint, directory: Path, dtype: torch.dtype | None, progress: Callable[[int], object] | None = None
) -> None:
    """Write a complete directory in the original's layout into an empty one; `dtype` None leaves the weights' own.

    Raises:
        ValueError: if tensors are missing, unexpected or of the wrong shape.
    """
    check_complete(checkpoint)
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
    """Write a complete directory in the llava-hf layout into an empty one.

    Args:
        checkpoint: from `open_checkpoint`.
        directory: exists and is empty.
        dtype: of floating-point tensors in the file; None = as they are.
        chat_template: Jinja text of the weights' prompt template.
        progress: called with the bytes of each tensor written.

    Raises:
        ValueError: if the layout can't hold the model, or tensors are missing.
    """
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    image_token_id, pad_token_id = special_rows(tokenizer)
    rows = rows_with_room(config.vocab_size, image_token_id, pad_token_id)
    settings = config_to_hf(config, image_token_id=image_token_id, pad_token_id=pad_token_id, vocab_size=rows)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
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
    """Return the rows of the vocabulary for `<image>` and for padding: those it has, else the next free one."""
    known = tokenizer.get_vocab()
    image_token_id = known.get(DEFAULT_IMAGE_TOKEN, len(tokenizer))
    free = max(len(tokenizer), image_token_id + 1)
    return image_token_id, free if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _check_complete(tensors: LazyTensors, settings: dict) -> None:
    """Compare names and shapes with those of the model that transformers makes of the settings."""
    with accelerate.init_empty_weights():
        model = LlavaForConditionalGeneration(HfConfig.from_dict(settings))
    shapes = {original_name(name): parameter.shape for name, parameter in model.named_parameters()}
    check_fit({name: {name: StoredPart(shape, None)} for name, shape in shapes.items()}, tensors, set())
