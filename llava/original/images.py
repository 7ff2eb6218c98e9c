"""The original's image functions: padding, anyres tiles, loading."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from llava.image_files.resize import expand_to_square, letterbox
from llava.image_processing import select_best_resolution as best_resolution
from llava.image_processing import split_anyres
from llava.inference.load_image import load_image

Pinpoints = Sequence[tuple[int, int]] | str
"""Resolutions (width, height) in pixels, or their text in a config."""


def expand2square(pil_img: Image.Image, background_color: tuple[int, int, int] | int) -> Image.Image:
    """Centre an image on a square as large as its longer side."""
    return expand_to_square(pil_img, background_color)


def select_best_resolution(
    original_size: tuple[int, int], possible_resolutions: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Return the (width, height) that keeps most of an image, and among equals wastes least."""
    return best_resolution(original_size, [tuple(size) for size in possible_resolutions])


def resize_and_pad_image(image: Image.Image, target_resolution: tuple[int, int]) -> Image.Image:
    """Resize an image into (width, height), its aspect ratio kept, and fill the rest with black."""
    return letterbox(image, tuple(target_resolution))


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Return the square tiles of an image, row by row; `patch_size` in pixels."""
    corners = [(x, y) for y in range(0, image.height, patch_size) for x in range(0, image.width, patch_size)]
    return [image.crop((x, y, x + patch_size, y + patch_size)) for x, y in corners]


def get_anyres_image_grid_shape(
    image_size: tuple[int, int], grid_pinpoints: Pinpoints, patch_size: int
) -> tuple[int, int]:
    """Return how many tiles of `patch_size` pixels an image takes: columns, rows."""
    width, height = select_best_resolution(image_size, _resolutions(grid_pinpoints))
    return width // patch_size, height // patch_size


def process_anyres_image(image: Image.Image, processor: Any, grid_pinpoints: Pinpoints) -> Tensor:
    """Return the pixels of the whole image and of its tiles, (1 + tiles, 3, side, side)."""
    return split_anyres(image, processor, [tuple(size) for size in _resolutions(grid_pinpoints)])


def unpad_image(tensor: Tensor, original_size: tuple[int, int]) -> Tensor:
    """Cut the padding off features (C, rows, columns) of an image of `original_size` (width, height) in pixels."""
    width, height = original_size
    rows, columns = tensor.shape[1:]
    if width / height > columns / rows:
        margin = (rows - int(height * columns / width)) // 2
        return tensor[:, margin : rows - margin, :]
    margin = (columns - int(width * rows / height)) // 2
    return tensor[:, :, margin : columns - margin]


def image_parser(args: Any) -> list[str]:
    """Return the locations in `args.image_file`, which `args.sep` separates."""
    return args.image_file.split(args.sep)


def load_images(image_files: Sequence[str]) -> list[Image.Image]:
    """Return the images at paths or http(s) addresses, as RGB.

    Raises:
        ImageError: if one is missing or can't be decoded.
    """
    return [load_image(location) for location in image_files]


def _resolutions(pinpoints: Pinpoints) -> Sequence[tuple[int, int]]:
    return ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
