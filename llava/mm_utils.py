"""What LLaVA's users import for images and prompts: `process_images`, `tokenizer_image_token` and their kin."""

from __future__ import annotations

import ast
import base64
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.image_processing import CLIPPixels, decode_image, expand_to_square, split_anyres


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Decode a base64-encoded picture, as RGB.

    Raises:
        ImageError: if the bytes are no picture.
    """
    return decode_image(base64.b64decode(image), "in base64")


def process_images(images: Sequence[Image.Image], image_processor: CLIPPixels, model_cfg: Any) -> Tensor | list[Tensor]:
    """Turn pictures into what `model(images=...)` takes.

    Args:
        images: RGB pictures.
        image_processor: from `load_pretrained_model`.
        model_cfg: the model's config, of which `image_aspect_ratio` decides: "pad" = centre on a square of the mean
            colour, "anyres" = tiles of `image_grid_pinpoints`, None = crop the middle.

    Returns:
        (N, 3, H, W) float32; for "anyres" (N, tiles, 3, H, W), or a list where the numbers of tiles differ.

    Raises:
        ValueError: if the aspect ratio has another name, or "anyres" has no pinpoints.
    """
    ratio = getattr(model_cfg, "image_aspect_ratio", None)  # any object will do here, as in the original
    if ratio in (None, "square"):
        return image_processor.preprocess(images)["pixel_values"]
    if ratio == "pad":
        colour = tuple(int(mean * 255) for mean in image_processor.image_mean)
        return image_processor.preprocess([expand_to_square(image, colour) for image in images])["pixel_values"]
    if ratio == "anyres":
        pinpoints = getattr(model_cfg, "image_grid_pinpoints", None)
        if not pinpoints:
            raise ValueError("image_aspect_ratio is 'anyres', but the config has no image_grid_pinpoints; use 'pad'")
        resolutions = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        tiles = [split_anyres(image, image_processor, [tuple(size) for size in resolutions]) for image in images]
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


def get_model_name_from_path(model_path: str) -> str:
    """Return a directory's name for logs and answer files; of `run/checkpoint-500`, `run_checkpoint-500`."""
    *parents, name = PurePath(model_path.strip("/")).parts or (Path.cwd().name,)
    return f"{parents[-1]}_{name}" if name.startswith("checkpoint-") and parents else name


class KeywordsStoppingCriteria(StoppingCriteria):
    """Ends generation once every row has one of the keywords behind its prompt.

    Args:
        keywords: texts that end an answer.
        tokenizer: decodes what was generated.
        input_ids: (B, T) prompt; only its length is used.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: PreTrainedTokenizerBase, input_ids: Tensor) -> None:
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.prompt_length = input_ids.shape[1]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return (B,) bool: whether the row is finished."""
        # With embeddings as prompt, generate() hands over the generated ids alone.
        start = self.prompt_length if input_ids.shape[1] > self.prompt_length else 0
        texts = self.tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=True)
        done = [any(keyword in text for keyword in self.keywords) for text in texts]
        return torch.tensor(done, device=input_ids.device)
