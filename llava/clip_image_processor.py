"""CLIP image processor with Pillow and numpy alone: the same pixels wherever it runs.

It has the attributes, calls and per-call options of transformers' `CLIPImageProcessor`, whose resize differs where
torchvision is installed. Source: transformers 4.37's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from llava.files.json_files import write_settings
from llava.image_files.decode import to_rgb

PREPROCESSOR_CONFIG_FILE = "preprocessor_config.json"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RESCALE_FACTOR = 1 / 255
_CHANNELS = (1, 3, 4)
_TENSORS = ("pt", "np", None)
_LAYOUTS = ("channels_first", "channels_last", None)

ImageInput = Image.Image | np.ndarray | Tensor


class CLIPPixels:
    """CLIP image processor: shortest edge to `size`, centre crop, scale to 0..1, normalise.

    Has the attributes and calls of transformers' `CLIPImageProcessor` that LLaVA's users rely on; each of `STEPS` may
    be set as an attribute, or for one call.

    Args:
        size: length of the shortest edge, in pixels.
        crop_size: side of the square that is cut out, in pixels; `size` when None.
        image_mean: per channel, of values 0..1.
        image_std: per channel, of values 0..1.
    """

    STEPS = (
        "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
        "image_mean", "image_std", "do_convert_rgb",
    )  # fmt: skip
    model_input_names = ("pixel_values",)

    def __init__(
        self,
        size: int = 336,
        crop_size: int | None = None,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
    ) -> None:
        side = crop_size or size
        self.do_resize = self.do_center_crop = self.do_rescale = self.do_normalize = self.do_convert_rgb = True
        self.size = {"shortest_edge": size}
        self.crop_size = {"height": side, "width": side}
        self.resample = int(Image.Resampling.BICUBIC)
        self.rescale_factor = RESCALE_FACTOR
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(
        self,
        images: ImageInput | Sequence[ImageInput],
        return_tensors: str | None = "pt",
        *,
        data_format: str = "channels_first",
        input_data_format: str | None = None,
        **steps: Any,
    ) -> BatchFeature:
        """Return `pixel_values` of one or several images, as key and attribute.

        Args:
            images: Pillow images; arrays or tensors of bytes, (height, width), (height, width, channels) or (channels,
                height, width), or of floats 0..1 with `do_rescale=False`; a batch of these with one more dimension.
            return_tensors: "pt" or "np" for (N, 3, height, width) float32, None for a list of arrays.
            data_format: "channels_first", or "channels_last" for (height, width, 3).
            input_data_format: of arrays and tensors; None = as their shape says. Where it fits both, arrays have their
                channels last and tensors first.
            steps: of `STEPS`, instead of the attributes; None = the attribute.

        Raises:
            TypeError: if an option is unknown, or an image something else, such as a path.
            ValueError: if a value is unusable, or the images of a tensor differ in size.
        """
        unknown = sorted(steps.keys() - set(self.STEPS))
        if unknown:
            raise TypeError(f"preprocess() got an unexpected keyword argument {unknown[0]!r}; choose {self.STEPS}")
        for name, value, choices in (
            ("return_tensors", return_tensors, _TENSORS),
            ("data_format", data_format, _LAYOUTS[:2]),
            ("input_data_format", input_data_format, _LAYOUTS),
        ):
            if str(getattr(value, "value", value)) not in map(str, choices):
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")
        chosen = {name: getattr(self, name) if steps.get(name) is None else steps[name] for name in self.STEPS}
        pixels = [_pixels(image, input_data_format, SimpleNamespace(**chosen)) for image in _as_list(images)]
        if data_format == "channels_last":
            pixels = [values.transpose(1, 2, 0) for values in pixels]
        return BatchFeature({"pixel_values": _stack(pixels, return_tensors)})

    __call__ = preprocess

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `preprocessor_config.json`, readable by transformers' `CLIPImageProcessor`."""
        return {**{name: getattr(self, name) for name in self.STEPS}, "image_processor_type": "CLIPImageProcessor"}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `preprocessor_config.json` into `directory`."""
        write_settings(self.to_dict(), Path(directory) / PREPROCESSOR_CONFIG_FILE)


def _pixels(image: ImageInput, layout: str | None, steps: SimpleNamespace) -> np.ndarray:
    """Return the pixels of an image, (3, height, width); `steps` has the attributes `CLIPPixels.STEPS`."""
    image, is_scaled = _as_pillow(image, layout, steps.do_rescale)
    image = to_rgb(image)
    if steps.do_resize:
        image = _resize(image, steps.size, steps.resample)
    if steps.do_center_crop:
        image = _crop(image, steps.crop_size)
    factor = RESCALE_FACTOR if is_scaled else steps.rescale_factor if steps.do_rescale else None
    table = _table(factor, (tuple(steps.image_mean), tuple(steps.image_std)) if steps.do_normalize else None)
    values = np.asarray(image)  # (height, width, 3) uint8
    return np.stack([table[values[:, :, channel], channel] for channel in range(3)])


@lru_cache(maxsize=16)
def _table(factor: float | None, norm: tuple[tuple[float, ...], tuple[float, ...]] | None) -> np.ndarray:
    """Return what each byte becomes in each channel, (256, 3): the float32 that computing it for each pixel would give.

    Args:
        factor: bytes are multiplied by it; None = they stay.
        norm: mean and standard deviation per channel; None = no normalisation.
    """
    values = np.arange(256, dtype=np.uint8) if factor is None else (np.arange(256) * factor).astype(np.float32)
    if norm is None:
        return np.repeat(values[:, None], 3, axis=1)
    mean, deviation = (np.array(numbers, np.float32) for numbers in norm)
    return (values[:, None].astype(np.float32) - mean) / deviation


def _as_pillow(image: ImageInput, layout: str | None, do_rescale: bool) -> tuple[Image.Image, bool]:
    """Return an image of bytes, and whether it came as floats 0..1, which are not to be divided by 255 again."""
    if isinstance(image, Image.Image):
        return image, False
    if not isinstance(image, (np.ndarray, Tensor)):
        raise TypeError(f"an image is a {type(image).__name__}; pass Pillow images, arrays or tensors")
    is_tensor = isinstance(image, Tensor)
    values = image.detach().cpu().float().numpy() if is_tensor and image.is_floating_point() else np.asarray(image)
    usual = "channels_first" if is_tensor else "channels_last"
    values = _channels_last(values, str(getattr(layout, "value", layout or usual)), is_fixed=layout is not None)
    is_float = values.dtype.kind == "f"
    least, most = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if is_float and not do_rescale:
        if least < 0 or most > 1:
            raise ValueError(f"an image holds {least:g} to {most:g}; with do_rescale=False floats are from 0 to 1")
        return _from_array(np.rint(values * 255)), True
    if is_float and most <= 1 and most > 0:
        raise ValueError("an image holds floats from 0 to 1, which would be divided by 255; pass do_rescale=False")
    if values.dtype != bool and (not math.isfinite(least + most) or least < 0 or most > 255):
        raise ValueError(f"an image holds {least:g} to {most:g}; pass bytes, 0 to 255, or floats from 0 to 1")
    return _from_array(values * 255 if values.dtype == bool else np.rint(values)), False


def _from_array(values: np.ndarray) -> Image.Image:
    values = values.astype(np.uint8)
    return Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)


def _channels_last(values: np.ndarray, guess: str, *, is_fixed: bool) -> np.ndarray:
    """Return an array as (height, width, channels)."""
    if values.ndim == 2:
        return values[:, :, None]
    first, last = values.shape[0] in _CHANNELS, values.shape[-1] in _CHANNELS
    if values.ndim != 3 or not (first or last):
        raise ValueError(
            f"an image has the shape {values.shape}; pass (height, width), (height, width, channels) or (channels, "
            "height, width)"
        )
    is_first = guess == "channels_first" if is_fixed or (first and last) else first
    return values.transpose(1, 2, 0) if is_first else values


def _as_list(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (Image.Image, str, bytes)):
        return [images]
    return [image for entry in images for image in _as_list(entry)]


def _stack(pixels: list[np.ndarray], return_tensors: str | None) -> Tensor | np.ndarray | list[np.ndarray]:
    if return_tensors is None:
        return pixels
    shapes = {values.shape for values in pixels}
    if len(shapes) > 1:
        raise ValueError(f"images of {len(shapes)} sizes don't fit one tensor; pass return_tensors=None, or crop them")
    stacked = np.stack(pixels)
    return torch.from_numpy(stacked) if str(getattr(return_tensors, "value", return_tensors)) == "pt" else stacked


def _resize(image: Image.Image, size: Any, resample: int) -> Image.Image:
    width, height = image.size
    if isinstance(size, Mapping) and "shortest_edge" not in size:
        target = (size["width"], size["height"])
    else:
        shortest = size["shortest_edge"] if isinstance(size, Mapping) else size
        if width <= height:
            target = (shortest, int(shortest * height / width))
        else:
            target = (int(shortest * width / height), shortest)
    return image if target == image.size else image.resize(target, Image.Resampling(resample))


def _crop(image: Image.Image, crop_size: Any) -> Image.Image:
    """Cut the middle out; what lies outside the image is black."""
    is_map = isinstance(crop_size, Mapping)
    height, width = (crop_size["height"], crop_size["width"]) if is_map else (crop_size, crop_size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    return image if box == (0, 0, *image.size) else image.crop(box)
