"""Image preprocessing without a model: load a checkpoint's image processor, anyres tiles, settings for transformers.

Pixels are computed with Pillow and numpy alone: bit for bit the original's, with and without torchvision. Files are
decoded in `llava.image_files`, whose main names can be imported from here. Source: transformers 4.37's
`CLIPImageProcessor`, LLaVA-1.5's anyres.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from llava.clip_image_processor import CLIP_MEAN, CLIP_STD, PREPROCESSOR_CONFIG_FILE, CLIPPixels
from llava.files.json_files import read_settings
from llava.image_files.resize import letterbox

PROCESSOR_CONFIG_FILE = "processor_config.json"
_MAX_SIDE = 10_000  # pixels
_FETCH = "correct it, or fetch the file again"


def load_image_processor(directory: str | Path, image_size: int) -> CLIPPixels:
    """Load the image processor of a checkpoint directory; without settings, CLIP's values at `image_size` pixels.

    The settings are those of transformers' `CLIPImageProcessor` or `LlavaImageProcessor`: in `processor_config.json`
    under `image_processor`, as transformers 5 writes and prefers them, else in `preprocessor_config.json`.

    Raises:
        ValueError: if a file holds no JSON object, or asks for steps that CLIP's preprocessing does not have.
    """
    path, settings = _image_settings(Path(directory))
    _check_image_settings(settings, path)
    off = [key for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize") if settings.get(key) is False]
    size, crop = settings.get("size", image_size), settings.get("crop_size", image_size)
    differs = {
        "resample": settings.get("resample", 3) != 3,
        "rescale_factor": not math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255),
        "size": isinstance(size, dict) and "shortest_edge" not in size,
        "crop_size": isinstance(crop, dict) and crop["height"] != crop["width"],
    }
    reasons = off + [key for key, is_other in differs.items() if is_other]
    if reasons:
        raise ValueError(f"{path}: {', '.join(reasons)} differs from CLIP's preprocessing, which is what runs here")
    return CLIPPixels(
        size if isinstance(size, int) else size["shortest_edge"],
        crop if isinstance(crop, int) else crop["height"],
        settings.get("image_mean", CLIP_MEAN),
        settings.get("image_std", CLIP_STD),
    )


def _check_image_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Check image settings: mean, standard deviation, sizes and flags.

    Raises:
        ValueError: if one has another type, or is out of range.
    """
    for key, low, high in (("image_mean", 0.0, 1.0), ("image_std", 0.001, 10.0)):
        values = settings.get(key, [low] * 3)
        if not isinstance(values, list) or len(values) != 3 or not all(_is_between(low, v, high) for v in values):
            raise ValueError(f"{path}: {key} is {values!r:.60}, not three numbers from {low} to {high}; {_FETCH}")
    for key, sides in (("size", ("shortest_edge", "height", "width")), ("crop_size", ("height", "width"))):
        value = settings.get(key, 1)
        numbers = [value[side] for side in sides if side in value] if isinstance(value, dict) else [value]
        if not numbers or not all(isinstance(number, int) and _is_between(1, number, _MAX_SIDE) for number in numbers):
            raise ValueError(f"{path}: {key} is {value!r:.60}, not 1 to {_MAX_SIDE} pixels; {_FETCH}")
        if key == "crop_size" and isinstance(value, dict) and len(numbers) < 2:
            raise ValueError(f"{path}: {key} is {value!r:.60}, without height or width; {_FETCH}")
    for key, value in settings.items():
        is_number = key in ("resample", "rescale_factor")
        if (is_number and not _is_between(0, value, 1000)) or (key.startswith("do_") and not isinstance(value, bool)):
            raise ValueError(
                f"{path}: {key} is {value!r:.60}, not {'a number' if is_number else 'true or false'}; {_FETCH}"
            )


def _is_between(low: float, value: Any, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def pads_images(directory: str | Path) -> bool | None:
    """Return `do_pad` of a directory's image settings: whether images are padded to squares; None if it is missing.

    Raises:
        ValueError: if a file holds no JSON object.
    """
    return _image_settings(Path(directory))[1].get("do_pad")


def hf_image_processor_settings(processor: CLIPPixels, *, do_pad: bool) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json` for transformers' `LlavaImageProcessor`.

    Loaded by `AutoProcessor.from_pretrained(directory, backend="pil")` (transformers 4: `use_fast=False`) it gives the
    pixels of `process_images` bit for bit. Without that argument transformers takes torchvision where it is installed,
    whose resize differs; no setting in a file selects Pillow.

    Args:
        processor: of the model.
        do_pad: whether the model's `image_aspect_ratio` is "pad".
    """
    return {**processor.to_dict(), "do_pad": do_pad, "image_processor_type": "LlavaImageProcessor"}


def hf_processor_settings(*, patch_size: int, select_feature: str, image_token: str) -> dict[str, Any]:
    """Return the content of `processor_config.json` for transformers' `LlavaProcessor`, which repeats image tokens.

    Args:
        patch_size: of the vision tower, in pixels.
        select_feature: `mm_vision_select_feature` of the model: "patch", or "cls_patch" for the class token as well.
        image_token: mark for an image in a prompt.

    Raises:
        ValueError: if `select_feature` has another name.
    """
    strategies = {"patch": "default", "cls_patch": "full"}
    if select_feature not in strategies:
        raise ValueError(f"mm_vision_select_feature is {select_feature!r}; choose one of {', '.join(strategies)}")
    return {
        "image_token": image_token,
        "num_additional_image_tokens": 1,  # the class token, which the strategy "default" takes away again
        "patch_size": patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": strategies[select_feature],
    }


def _image_settings(directory: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file that holds a directory's image settings, and these without nulls; none without a file."""
    nested, path = directory / PROCESSOR_CONFIG_FILE, directory / PREPROCESSOR_CONFIG_FILE
    settings = read_settings(nested).get("image_processor") if nested.is_file() else None
    if settings is not None:
        path = nested
    else:
        settings = read_settings(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: image_processor is {settings!r:.60}, not an object; {_FETCH}")
    return path, {key: value for key, value in settings.items() if value is not None}


def select_best_resolution(size: tuple[int, int], resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the (width, height) that keeps most of the image, and among equals wastes least."""

    def fit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[0] / size[0], resolution[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=fit)


def split_anyres(
    image: Image.Image, processor: CLIPPixels | BaseImageProcessor, resolutions: Sequence[tuple[int, int]]
) -> Tensor:
    """Return the image squeezed to a square, then its tiles at the best resolution: (1 + tiles, 3, side, side).

    Args:
        image: an RGB image.
        processor: of the model; one without a crop, such as SigLIP's, gives its height as the side of a tile.
        resolutions: (width, height) in pixels that may be chosen.

    Raises:
        ValueError: if the processor makes pixels of no fixed side.
    """
    size = dict(processor.size or {})
    side = (getattr(processor, "crop_size", None) or size).get("height")
    if side is None:
        raise ValueError(
            f"anyres needs the side of a tile, but {type(processor).__name__} has size {size} and no crop; use pad"
        )
    target = select_best_resolution(image.size, resolutions)
    canvas = letterbox(image, target)
    corners = [(x, y) for y in range(0, target[1], side) for x in range(0, target[0], side)]
    tiles = [canvas.crop((x, y, x + side, y + side)) for x, y in corners]
    shortest = size.get("shortest_edge") or side
    return pixels_of([image.resize((shortest, shortest)), *tiles], processor)


def pixels_of(images: Sequence[Image.Image], processor: CLIPPixels | BaseImageProcessor) -> Tensor | list[Tensor]:
    """Return the pixels that any image processor makes of each RGB image, stacked where they have the same shape."""
    pixels = [processor.preprocess(image, return_tensors="pt")["pixel_values"][0] for image in images]
    return torch.stack(pixels) if len({tensor.shape for tensor in pixels}) == 1 else pixels
