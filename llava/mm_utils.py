"""Image and prompt functions that LLaVA's users import: `process_images`, `tokenizer_image_token` and others."""

from __future__ import annotations

import ast
import base64
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, StoppingCriteria

from llava.clip_image_processor import CLIPPixels
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.image_files.decode import decode_image, to_rgb
from llava.image_files.resize import expand_to_square
from llava.image_processing import pixels_of, split_anyres
from llava.model_names import get_model_name_from_path as get_model_name_from_path
from llava.original_names import lazy_names

__getattr__ = lazy_names(__name__)


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Decode a base64-encoded image, as upright RGB.

    Raises:
        ImageError: if the bytes are no image.
    """
    return decode_image(base64.b64decode(image), "in base64")


def process_images(
    images: Sequence[Image.Image], image_processor: CLIPPixels | BaseImageProcessor, model_cfg: Any
) -> Tensor | list[Tensor]:
    """Turn images into what `model(images=...)` takes.

    Args:
        images: Pillow images of any mode; `to_rgb` makes them RGB first. Without an aspect ratio, whatever else the
            processor takes.
        image_processor: from `load_pretrained_model`, or any of transformers'; of a processor for text and images its
            part for images is used.
        model_cfg: the model's config, of which `image_aspect_ratio` decides: "pad" = centre on a square of the mean
            colour, "anyres" = tiles of `image_grid_pinpoints`, None = crop the middle.

    Returns:
        (N, 3, height, width) float32; for "anyres" (N, tiles, 3, height, width); a list where the shapes differ.

    Raises:
        ImageError: if an image holds floating-point or negative numbers.
        TypeError: if `images` is a single image, or one of them is not a Pillow image where it must be.
        ValueError: if the aspect ratio has another name, or "anyres" has no pinpoints.
    """
    ratio = getattr(model_cfg, "image_aspect_ratio", None)  # any object will do here, as in the original
    processor = getattr(image_processor, "image_processor", image_processor)
    if isinstance(images, Image.Image):
        raise TypeError("images is a single image; pass a list of images")
    if ratio in (None, "square"):
        return pixels_of([to_rgb(image) if isinstance(image, Image.Image) else image for image in images], processor)
    images = [to_rgb(image) for image in images]
    if ratio == "pad":
        colour = tuple(int(mean * 255) for mean in processor.image_mean)
        return pixels_of([expand_to_square(image, colour) for image in images], processor)
    if ratio == "anyres":
        pinpoints = getattr(model_cfg, "image_grid_pinpoints", None)
        if not pinpoints:
            raise ValueError("image_aspect_ratio is 'anyres', but the config has no image_grid_pinpoints; use 'pad'")
        resolutions = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        tiles = [split_anyres(image, processor, [tuple(size) for size in resolutions]) for image in images]
        return torch.stack(tiles) if len({tile.shape for tile in tiles}) == 1 else tiles
    raise ValueError(f"image_aspect_ratio is {ratio!r}; choose pad, square, anyres or None")


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | Tensor:
    """Encode a prompt whose `<image>` marks become `image_token_index`.

    The text between two marks is encoded on its own, as in the original; `<s>` stands once, at the start.

    Args:
        prompt: text with any number of `<image>`.
        tokenizer: anything callable on a text that gives `input_ids`.
        image_token_index: id put in the place of each mark.
        return_tensors: None for a list, "pt" for an int64 tensor of shape (T,).

    Raises:
        ValueError: if `return_tensors` is neither None nor "pt".
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors is {return_tensors!r}; use None or 'pt'")
    first, *others = [tokenizer(chunk).input_ids for chunk in prompt.split(DEFAULT_IMAGE_TOKEN)]
    has_bos = bool(first) and first[0] == tokenizer.bos_token_id
    ids = list(first)
    for chunk in others:
        ids += [image_token_index, *chunk[int(has_bos) :]]
    return torch.tensor(ids, dtype=torch.long) if return_tensors == "pt" else ids


class KeywordsStoppingCriteria(StoppingCriteria):
    """Ends generation of each row once one of the keywords follows its prompt.

    A keyword is found in the text of what was generated, and by its ids: those of special tokens leave no text. Its
    last id must be a generated one; the ids before it may belong to the prompt, as in the original.

    Args:
        keywords: texts that end an answer.
        tokenizer: encodes keywords and decodes what was generated.
        input_ids: (B, T) prompts, with placeholders or without. Ids that don't start with them are generated ones
            alone, as `generate` of ours hands them over.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: PreTrainedTokenizerBase, input_ids: Tensor) -> None:
        self.keywords = [keywords] if isinstance(keywords, str) else list(keywords)
        self.tokenizer = tokenizer
        self.keyword_ids = [self._encode(keyword) for keyword in self.keywords]
        self.prompt_ids = input_ids

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        """Return (B,) bool: whether the row is finished. The original's single bool would end all rows at once."""
        start = self.prompt_ids.shape[1] if self._starts_with_prompts(input_ids) else 0
        texts = self.tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=True)
        done = [
            any(keyword in text for keyword in self.keywords)
            or any(_contains(ids[max(start - len(wanted) + 1, 0) :], wanted) for wanted in self.keyword_ids)
            for ids, text in zip(input_ids.tolist(), texts, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)

    def _encode(self, keyword: str) -> list[int]:
        ids = list(self.tokenizer(keyword).input_ids)
        return ids[1:] if len(ids) > 1 and ids[0] == self.tokenizer.bos_token_id else ids

    def _starts_with_prompts(self, input_ids: Tensor) -> bool:
        rows, length = self.prompt_ids.shape
        if length > input_ids.shape[1] or len(input_ids) % rows:
            return False
        prompts = self.prompt_ids.repeat_interleave(len(input_ids) // rows, dim=0)  # beams of a prompt lie together
        return torch.equal(input_ids[:, :length], prompts.to(input_ids))


def _contains(ids: list[int], wanted: list[int]) -> bool:
    """Return whether `wanted`, if any, stands in `ids`."""
    starts = range(len(ids) - len(wanted) + 1)
    return bool(wanted) and any(ids[start : start + len(wanted)] == wanted for start in starts)
