"""Pad and resize Pillow images: to a square, into a box, or as the original's Gradio clients show them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping

from PIL import Image

from llava.image_files.decode import to_rgb

_CLIP_MEAN = (122, 116, 104)  # 0..255


def expand_to_square(image: Image.Image, colour: tuple[int, int, int] | int) -> Image.Image:
    """Centre an image on a square as large as its longer side; `colour` (0..255) fills the rest."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def letterbox(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """Resize an image into (width, height), its aspect ratio kept, and fill the rest with black."""
    scale_width, scale_height = target[0] / image.width, target[1] / image.height
    if scale_width < scale_height:
        size = (target[0], min(math.ceil(image.height * scale_width), target[1]))
    else:
        size = (min(math.ceil(image.width * scale_height), target[0]), target[1])
    canvas = Image.new("RGB", target, (0, 0, 0))
    canvas.paste(image.resize(size), ((target[0] - size[0]) // 2, (target[1] - size[1]) // 2))
    return canvas


_MODES: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "Pad": lambda image: expand_to_square(image, _CLIP_MEAN),
    "Resize": lambda image: image.resize((336, 336)),
    "Crop": lambda image: image,
    "Default": lambda image: image,
}


def show_image(
    image: Image.Image,
    mode: str,
    *,
    return_pil: bool = False,
    image_format: str = "PNG",
    max_len: int = 1344,
    min_len: int = 672,
) -> Image.Image | str:
    """Return an image of a chat message as a Gradio client shows it, at most `max_len` pixels long.

    Args:
        image: of a message.
        mode: Pad, Resize (to 336 x 336), Crop or Default; the last two leave it.
        return_pil: an image, instead of a file in base64.
        image_format: of that file.
        max_len: in pixels.
        min_len: longest shorter side of an image that is made smaller, in pixels.

    Raises:
        ValueError: if the mode is unknown.
    """
    if mode not in _MODES:
        raise ValueError(f"image mode is {mode!r}; choose {', '.join(_MODES)}")
    image = _MODES[mode](to_rgb(image))
    if max(image.size) > max_len:
        elongation = max(image.size) / min(image.size)
        shorter = max(int(min(max_len / elongation, min_len, *image.size)), 1)
        longer = min(int(shorter * elongation), max_len)
        image = image.resize((shorter, longer) if image.height > image.width else (longer, shorter))
    if return_pil:
        return image
    stream = io.BytesIO()
    image.save(stream, format=image_format)
    return base64.b64encode(stream.getvalue()).decode()
