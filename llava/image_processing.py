"""From an image file to the pixels CLIP sees, with Pillow and numpy alone, bit for bit as in the original.

transformers' processor takes another resize where torchvision is installed; this one is the same everywhere, and reads
a picture one pixel wide as a picture. Source: transformers 4.37's `CLIPImageProcessor`, LLaVA-1.5's `expand2square`
and anyres.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import BatchFeature

from llava.files import read_settings, write_settings

PREPROCESSOR_CONFIG_FILE = "preprocessor_config.json"
PROCESSOR_CONFIG_FILE = "processor_config.json"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_IMAGE_PIXELS = 178_956_970
"""Larger pictures are refused: decoded they need over half a gigabyte. Twice Pillow's own limit for a warning."""

MAX_IMAGE_SIDE = 26_754
"""Longer pictures are refused too: padded to a square they need over two gigabytes, however thin they are."""
MAX_ELONGATION = 5_000
"""So are pictures so many times longer than wide: with the shorter side at 336 pixels they need over a gigabyte."""


class ImageError(ValueError):
    """A picture that can't be used.

    Attributes:
        code: `image_missing`, `image_corrupt`, `image_too_large` or `path_outside_folder`; goes into error records.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CLIPPixels:
    """CLIP's preprocessing: shortest edge to `size`, centre crop, scale to 0..1, normalise.

    Has the attributes and calls of transformers' `CLIPImageProcessor` that LLaVA's users rely on.

    Args:
        size: length of the shortest edge, in pixels.
        crop_size: side of the square that is cut out, in pixels; `size` when None.
        image_mean: per channel, of values 0..1.
        image_std: per channel, of values 0..1.
    """

    def __init__(
        self,
        size: int = 336,
        crop_size: int | None = None,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
    ) -> None:
        side = crop_size or size
        self.size = {"shortest_edge": size}
        self.crop_size = {"height": side, "width": side}
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        scaled = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]
        # One row per byte value: indexing gives the same float32 as scaling and normalising each pixel would.
        self._normalised = (scaled - np.array(image_mean, np.float32)) / np.array(image_std, np.float32)

    def preprocess(self, images: Image.Image | Sequence[Image.Image], return_tensors: str = "pt") -> BatchFeature:
        """Return `pixel_values`, (N, 3, crop, crop) float32, of one or several pictures, as key and attribute.

        Raises:
            ValueError: if `return_tensors` is not "pt".
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}; only 'pt' is supported")
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        return BatchFeature({"pixel_values": torch.stack([self._pixels(picture) for picture in pictures])})

    __call__ = preprocess

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `preprocessor_config.json`, readable by transformers' `CLIPImageProcessor`."""
        return {
            "crop_size": self.crop_size,
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": self.image_mean,
            "image_processor_type": "CLIPImageProcessor",
            "image_std": self.image_std,
            "resample": int(Image.Resampling.BICUBIC),
            "rescale_factor": 1 / 255,
            "size": self.size,
        }

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `preprocessor_config.json` into `directory`."""
        write_settings(self.to_dict(), Path(directory) / PREPROCESSOR_CONFIG_FILE)

    def _pixels(self, picture: Image.Image) -> Tensor:
        picture = picture.convert("RGB")
        shortest, side = self.size["shortest_edge"], self.crop_size["height"]
        width, height = picture.size
        scale = shortest / min(width, height)
        resized = (
            (shortest, int(shortest * height / width))
            if width <= height
            else (int(shortest * width / height), shortest)
        )
        if scale != 1 or resized != picture.size:
            picture = picture.resize(resized, Image.Resampling.BICUBIC)
        left, top = (resized[0] - side) // 2, (resized[1] - side) // 2
        if (left, top) != (0, 0) or resized != (side, side):
            picture = picture.crop((left, top, left + side, top + side))
        values = np.asarray(picture)  # (crop, crop, 3) uint8
        channels = [self._normalised[values[:, :, channel], channel] for channel in range(3)]
        return torch.from_numpy(np.stack(channels))  # (3, crop, crop)


def load_image_processor(directory: str | Path, image_size: int) -> CLIPPixels:
    """Read a directory's image settings; without any, CLIP's values at `image_size` pixels.

    They are those of transformers' `CLIPImageProcessor` or `LlavaImageProcessor`: in `processor_config.json` under
    `image_processor`, as transformers 5 writes them and prefers them, else in `preprocessor_config.json`. Whether they
    pad says `pads_images`.

    Raises:
        ValueError: if a file holds no JSON object, or asks for steps that CLIP's preprocessing does not have.
    """
    path, settings = _image_settings(Path(directory))
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


def pads_images(directory: str | Path) -> bool | None:
    """Tell whether a directory's image settings pad pictures to squares (`do_pad`); None where they don't say.

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
    return path, {key: value for key, value in settings.items() if value is not None}


def open_image(path: str | Path) -> Image.Image:
    """Decode an image file completely, as RGB.

    Raises:
        ImageError: if the file is missing, too large to decode, truncated or no picture.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ImageError(
            "image_missing", f"image {path} not found; check the image folder and the file's name"
        ) from None
    except (OSError, ValueError) as error:
        raise ImageError("image_missing", f"image {path} can't be read: {error}") from error
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image from memory completely, as RGB; `name` is for messages.

    Raises:
        ImageError: if it is too large to decode, truncated or no picture.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            is_thin = max(width, height) > min(MAX_IMAGE_SIDE, MAX_ELONGATION * min(width, height))
            if width * height > MAX_IMAGE_PIXELS or is_thin:
                raise ImageError("image_too_large", f"image {name}: {width}x{height} pixels; make it smaller")
            return picture.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_large", f"image {name}: {error}; make it smaller") from error
    except ImageError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, RuntimeError) as error:
        raise ImageError(
            "image_corrupt", f"image {name} can't be decoded ({error}); fetch or export it again"
        ) from error


def resolve_image(folder: str | Path, name: str) -> Path:
    """Return the path of an image named in a data file, which must stay inside the image folder.

    Raises:
        ImageError: if the name leads out of the folder.
    """
    relative = Path(os.path.normpath(name))
    if relative.is_absolute() or os.pardir in relative.parts:
        raise ImageError(
            "path_outside_folder", f"image {name!r} leads out of the image folder {folder}; name a file inside"
        )
    return Path(folder) / relative


def expand_to_square(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre a picture on a square as large as its longer side; `colour` (0..255) fills the rest."""
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    square = Image.new(picture.mode, (side, side), colour)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def select_best_resolution(size: tuple[int, int], resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the (width, height) that keeps most of the picture, and among equals wastes least."""

    def fit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[0] / size[0], resolution[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=fit)


def split_anyres(picture: Image.Image, processor: CLIPPixels, resolutions: Sequence[tuple[int, int]]) -> Tensor:
    """Return the picture squeezed to a square, then its tiles at the best resolution: (1 + tiles, 3, side, side)."""
    target = select_best_resolution(picture.size, resolutions)
    canvas = _letterbox(picture, target)
    side = processor.crop_size["height"]
    corners = [(x, y) for y in range(0, target[1], side) for x in range(0, target[0], side)]
    tiles = [canvas.crop((x, y, x + side, y + side)) for x, y in corners]
    shortest = processor.size["shortest_edge"]
    return processor.preprocess([picture.resize((shortest, shortest)), *tiles])["pixel_values"]


def _letterbox(picture: Image.Image, target: tuple[int, int]) -> Image.Image:
    scale_width, scale_height = target[0] / picture.width, target[1] / picture.height
    if scale_width < scale_height:
        size = (target[0], min(math.ceil(picture.height * scale_width), target[1]))
    else:
        size = (min(math.ceil(picture.width * scale_height), target[0]), target[1])
    canvas = Image.new("RGB", target, (0, 0, 0))
    canvas.paste(picture.resize(size), ((target[0] - size[0]) // 2, (target[1] - size[1]) // 2))
    return canvas
