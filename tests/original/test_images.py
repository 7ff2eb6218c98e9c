"""The original's functions on images."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava.clip_image_processor import CLIPPixels
from llava.eval.run_llava import image_parser, load_images
from llava.mm_utils import (
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    process_anyres_image,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
)
from llava.model.llava_arch import unpad_image

PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def test_a_square_around_an_image():
    square = expand2square(Image.new("RGB", (4, 2), "red"), (1, 2, 3))
    assert square.size == (4, 4)
    assert [square.getpixel((0, y)) for y in range(4)] == [(1, 2, 3), (255, 0, 0), (255, 0, 0), (1, 2, 3)]
    assert expand2square(Image.new("L", (2, 4)), 9).getpixel((0, 0)) == 9


@pytest.mark.parametrize("pinpoints", [PINPOINTS, str(PINPOINTS)])
def test_tiles_of_an_image(pinpoints):
    image = Image.effect_noise((60, 28), 50).convert("RGB")
    assert select_best_resolution(image.size, PINPOINTS) == (56, 28)
    assert get_anyres_image_grid_shape(image.size, pinpoints, 28) == (2, 1)
    processor = CLIPPixels(28)
    pixels = process_anyres_image(image, processor, pinpoints)
    settings = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints)
    assert torch.equal(pixels, process_images([image], processor, settings)[0])
    tiles = divide_to_patches(resize_and_pad_image(image, (56, 28)), 28)
    assert torch.equal(pixels[1:], processor.preprocess(tiles)["pixel_values"])


@pytest.mark.parametrize(
    ("size", "shape"), [((20, 10), (2, 3, 6)), ((10, 20), (2, 6, 3)), ((7, 7), (2, 6, 6)), ((600, 1), (2, 0, 6))]
)
def test_features_without_their_padding(size, shape):
    features = torch.arange(2 * 6 * 6).reshape(2, 6, 6)
    found = unpad_image(features, size)
    rows, columns = (6 - found.shape[1]) // 2, (6 - found.shape[2]) // 2
    assert torch.equal(found, features[:, rows : 6 - rows, columns : 6 - columns])
    assert abs(found.shape[1] - shape[1]) <= 1
    assert abs(found.shape[2] - shape[2]) <= 1


def test_files_between_separators(goldens):
    names = [str(goldens / "images" / name) for name in ("square.png", "portrait.png")]
    assert image_parser(SimpleNamespace(image_file="|".join(names), sep="|")) == names
    images = load_images(names)
    assert [image.mode for image in images] == ["RGB", "RGB"]
