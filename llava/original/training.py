"""The original's training data and state functions, for training loops of others."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import llava.conversation as conversation_lib
from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation, SeparatorStyle
from llava.data.dataset import ImageSettings
from llava.data.records import read_records
from llava.data.supervision import encode_segments, place_images, plain_question, without_opening
from llava.image_files.decode import open_image
from llava.image_files.paths import resolve_image
from llava.mm_utils import process_images
from llava.tokenization.llama_tokenizer import LlavaTokenizer
from llava.train.lora import linear_names
from llava.train.saving import whole_tensor

logger = logging.getLogger(__name__)

Turns = Sequence[Mapping[str, str]]


def preprocess_multimodal(sources: Sequence[Turns], data_args: Any) -> Sequence[Turns]:
    """Write each `<image>` as the template wants it, in place.

    Args:
        sources: dialogues `[{"from", "value"}, ...]`.
        data_args: with `is_multimodal` and `mm_use_im_start_end`.
    """
    if getattr(data_args, "is_multimodal", True):
        version = conversation_lib.default_conversation.version
        marks = getattr(data_args, "mm_use_im_start_end", False)
        for turn in (turn for source in sources for turn in source):
            turn["value"] = place_images(turn["value"], version, use_im_start_end=marks)
    return sources


def preprocess(sources: Sequence[Turns], tokenizer: LlavaTokenizer, has_image: bool = False) -> dict[str, Tensor]:
    """Return ids and labels of dialogues in `llava.conversation.default_conversation`'s template.

    Args:
        sources: dialogues, after `preprocess_multimodal`.
        tokenizer: from `load_pretrained_model`.
        has_image: no effect: `<image>` in a text is always a placeholder.

    Returns:
        input_ids and labels, (N, T) int64, padded on the right; no row is cut.

    Raises:
        TypeError: if the tokenizer is another one.
        ValueError: if a dialogue doesn't alternate.
    """
    if not isinstance(tokenizer, LlavaTokenizer):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}; "
            "use llava.tokenization.llama_tokenizer.load_tokenizer(directory), "
            "whose ids are those that LLaVA-1.5 was trained with"
        )
    rows = [encode_segments(_dialogue(source).segments(), tokenizer) for source in sources]
    return {
        "input_ids": _pad([torch.tensor(ids) for ids, _ in rows], tokenizer.pad_token_id or 0),
        "labels": _pad([torch.tensor(labels) for _, labels in rows], IGNORE_INDEX),
    }


def _dialogue(source: Turns) -> Conversation:
    dialogue = conversation_lib.default_conversation.copy()
    dialogue.messages = []
    is_plain = dialogue.sep_style is SeparatorStyle.PLAIN
    if is_plain:
        dialogue.sep, dialogue.sep2 = "", dialogue.stop_text
    for index, turn in enumerate(without_opening(source)):
        if turn["from"] != ("human", "gpt")[index % 2]:
            raise ValueError(f"turn {index + 1} is from {turn['from']!r}; human and gpt take turns")
        text = plain_question(turn["value"]) if is_plain and index % 2 == 0 else turn["value"]
        dialogue.append_message(dialogue.roles[index % 2], text)
    return dialogue


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


class LazySupervisedDataset(Dataset):
    """Rows `{"input_ids": (T,), "labels": (T,), "image": pixels}` of a data file, images read when they are needed.

    Args:
        data_path: JSON list of LLaVA records.
        tokenizer: from `load_pretrained_model`.
        data_args: with `image_folder`, `image_processor`, `image_aspect_ratio` and `is_multimodal`.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if it is not a list of records.
    """

    def __init__(self, data_path: str | Path, tokenizer: LlavaTokenizer, data_args: Any) -> None:
        self.list_data_dict = read_records(data_path)
        self.tokenizer = tokenizer
        self.data_args = data_args

    def __len__(self) -> int:
        return len(self.list_data_dict)

    @property
    def lengths(self) -> list[int]:
        """Words of each row, 128 more with an image."""
        return [_words(record) + 128 * ("image" in record) for record in self.list_data_dict]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each row; negative without an image."""
        return [_words(record) if "image" in record else -_words(record) for record in self.list_data_dict]

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        record = self.list_data_dict[i]
        turns = copy.deepcopy(record["conversations"])
        if "image" in record:
            preprocess_multimodal([turns], self.data_args)
        encoded = preprocess([turns], self.tokenizer, has_image="image" in record)
        row = {key: values[0] for key, values in encoded.items()}
        processor = getattr(self.data_args, "image_processor", None)
        if "image" in record:
            image = open_image(resolve_image(self.data_args.image_folder, record["image"]))
            row["image"] = process_images([image], processor, _settings(self.data_args))[0]
        elif self.data_args.is_multimodal:
            row["image"] = torch.zeros(3, processor.crop_size["height"], processor.crop_size["width"])
        return row


def _words(record: Mapping[str, Any]) -> int:
    return sum(len(turn["value"].split()) for turn in record["conversations"])


def _settings(data_args: Any) -> ImageSettings:
    return ImageSettings(data_args.image_aspect_ratio, getattr(data_args, "image_grid_pinpoints", None))


class DataCollatorForSupervisedDataset:
    """Collator for `LazySupervisedDataset`: a batch padded on the right.

    Args:
        tokenizer: of the rows; what exceeds its `model_max_length` tokens is cut off, and logged.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, instances: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor | list[Tensor]]:
        """Return input_ids, labels (B, T) int64, attention_mask (B, T) bool, and images if the rows have any."""
        limit, pad = self.tokenizer.model_max_length, self.tokenizer.pad_token_id
        longest = max(len(row["input_ids"]) for row in instances)
        if longest > limit:
            logger.warning("a row of %d tokens is cut to model_max_length %d", longest, limit)
        ids = [row["input_ids"][:limit] for row in instances]
        batch = {
            "input_ids": _pad(ids, 0 if pad is None else pad),
            "labels": _pad([row["labels"][:limit] for row in instances], IGNORE_INDEX),
            "attention_mask": _pad([torch.ones(len(row), dtype=torch.bool) for row in ids], False),
        }
        if "image" in instances[0]:
            images = [row["image"] for row in instances]
            same = len({image.shape for image in images}) == 1
            batch["images"] = torch.stack(images) if same else images
        return batch


def make_supervised_data_module(tokenizer: LlavaTokenizer, data_args: Any) -> dict[str, Any]:
    """Return dataset and collator as arguments of a trainer; `data_args.data_path` names the data."""
    return {
        "train_dataset": LazySupervisedDataset(data_args.data_path, tokenizer, data_args),
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }


def smart_tokenizer_and_embedding_resize(special_tokens_dict: Mapping[str, Any], tokenizer: Any, model: Any) -> None:
    """Add special tokens to a tokenizer, and to a model rows for them that are the mean of the others."""
    added = tokenizer.add_special_tokens(dict(special_tokens_dict))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if added:
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            with torch.no_grad():
                embeddings.weight[-added:] = embeddings.weight[:-added].mean(dim=0, keepdim=True)


def find_all_linear_names(model: Any) -> list[str]:
    """Return the names of the linear layers in the LLM's blocks, for LoRA."""
    return linear_names(model)


def maybe_zero_3(param: Tensor, ignore_status: bool = False, name: str | None = None) -> Tensor:
    """Return a parameter on the CPU, whole even where ZeRO-3 keeps parts; every process must call it."""
    return whole_tensor(param)


def get_peft_state_maybe_zero_3(named_params: Iterable[tuple[str, Tensor]], bias: str) -> dict[str, Tensor]:
    """Return an adapter's parameters, with biases as peft's `bias` says.

    Raises:
        ValueError: if `bias` is not none, all or lora_only.
    """
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias is {bias!r}; choose none, all or lora_only")
    params = dict(named_params)
    adapted = {name.split("lora_")[0] + "bias" for name in params if "lora_" in name}

    def belongs(name: str) -> bool:
        is_bias = bias == "all" and "bias" in name
        return "lora_" in name or is_bias or (bias == "lora_only" and name in adapted)

    return {name: whole_tensor(tensor) for name, tensor in params.items() if belongs(name)}


def get_peft_state_non_lora_maybe_zero_3(
    named_params: Iterable[tuple[str, Tensor]], require_grad_only: bool = True
) -> dict[str, Tensor]:
    """Return the parameters outside an adapter, by default those that require gradients."""
    return {
        name: whole_tensor(tensor)
        for name, tensor in named_params
        if "lora_" not in name and (tensor.requires_grad or not require_grad_only)
    }


def get_mm_adapter_state_maybe_zero_3(
    named_params: Iterable[tuple[str, Tensor]], keys_to_match: Sequence[str]
) -> dict[str, Tensor]:
    """Return the parameters with one of `keys_to_match` in their name."""
    return {name: whole_tensor(tensor) for name, tensor in named_params if any(key in name for key in keys_to_match)}


def safe_save_model_for_hf_trainer(trainer: Any, output_dir: str) -> None:
    """Let a trainer save its model."""
    trainer.save_model(output_dir)
