"""CLIP's image processor: transformers' pixels for every per-call option, for images, arrays and tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from llava.clip_image_processor import CLIPPixels

SIDE = 24
HF = getattr(transformers, "CLIPImageProcessorPil", None)
OPTIONS = [
    {},
    {"do_resize": False},
    {"do_resize": False, "do_center_crop": False},
    {"size": {"height": 40, "width": 30}, "do_center_crop": False},
    {"size": {"shortest_edge": 20}},
    {"crop_size": {"height": 33, "width": 40}},
    {"resample": 2},
    {"rescale_factor": 1 / 127.5},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"image_mean": [0.5] * 3, "image_std": [0.25] * 3},
]


@pytest.fixture
def processor():
    return CLIPPixels(SIDE)


def rgb_image(width=50, height=30):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.skipif(HF is None, reason="this version of transformers has no Pillow processor under that name")
@pytest.mark.parametrize("size", [(50, 30), (30, 50), (24, 24), (9, 13)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_per_call_options_are_those_of_transformers(processor, options, size):
    reference = HF(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    image = rgb_image(*size)
    expected = reference(image, return_tensors="np", **options)["pixel_values"]
    found = processor(image, return_tensors="np", **options)["pixel_values"]
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_options_of_a_call_leave_the_processor_as_it_is(processor):
    before = processor(rgb_image())["pixel_values"]
    other = processor(rgb_image(), do_normalize=False, size=12, crop_size=12)["pixel_values"]
    assert other.shape == (1, 3, 12, 12)
    assert 0 <= other.min() <= other.max() <= 1
    assert torch.equal(processor(rgb_image(), size=None)["pixel_values"], before)


def test_attributes_are_read_at_each_call(processor):
    before = processor(rgb_image())["pixel_values"]
    processor.image_mean = [0.0, 0.0, 0.0]
    processor.image_std = [1.0, 1.0, 1.0]
    processor.crop_size["height"] = processor.crop_size["width"] = 10
    after = processor(rgb_image())["pixel_values"]
    assert after.shape == (1, 3, 10, 10)
    assert not torch.equal(after, before[:, :, 7:17, 7:17])
    assert processor.to_dict()["image_mean"] == [0.0, 0.0, 0.0]


def test_attributes_of_transformers():
    processor = CLIPPixels(SIDE, 20)
    assert processor.rescale_factor == pytest.approx(1 / 255)
    assert processor.do_resize is processor.do_center_crop is processor.do_rescale is processor.do_normalize is True
    assert (processor.size, processor.crop_size) == ({"shortest_edge": SIDE}, {"height": 20, "width": 20})
    assert processor.resample == Image.Resampling.BICUBIC
    assert processor.to_dict()["image_processor_type"] == "CLIPImageProcessor"


def as_array(image):
    return np.asarray(image)


def as_tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


FORMS = {
    "array": as_array,
    "array, channels first": lambda image: as_array(image).transpose(2, 0, 1),
    "array of int64": lambda image: as_array(image).astype(np.int64),
    "array of floats to 255": lambda image: as_array(image).astype(np.float32),
    "tensor": as_tensor,
    "tensor, channels last": lambda image: as_tensor(image).permute(1, 2, 0),
    "list": lambda image: [image],
    "nested list": lambda image: [[as_array(image)]],
    "batch of arrays": lambda image: as_array(image)[None],
    "batch of tensors": lambda image: as_tensor(image)[None],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_an_image(processor, form):
    image = rgb_image()
    assert torch.equal(processor(FORMS[form](image))["pixel_values"], processor(image)["pixel_values"])


def test_floats_to_one_say_so(processor):
    image = rgb_image()
    expected = processor(image)["pixel_values"]
    for scaled in (as_array(image) / 255, as_tensor(image) / 255, (as_tensor(image) / 255).double()):
        assert torch.equal(processor(scaled, do_rescale=False)["pixel_values"], expected)
        with pytest.raises(ValueError, match=r"holds floats from 0 to 1, which would be divided by 255; pass do_resc"):
            processor(scaled)


def test_grey_and_black_and_white_arrays(processor):
    grey = np.arange(30 * 30, dtype=np.uint8).reshape(30, 30)
    expected = processor(Image.fromarray(grey))["pixel_values"]
    for form in (grey, grey[:, :, None], grey[None]):
        assert torch.equal(processor(form)["pixel_values"], expected)
    assert torch.equal(
        processor(grey > 100)["pixel_values"],
        processor(Image.fromarray((grey > 100).astype(np.uint8) * 255))["pixel_values"],
    )


@pytest.mark.parametrize("shape", [(3, 40, 3), (3, 3, 3), (1, 7, 3)])
def test_images_a_few_pixels_high(processor, shape):
    """A shape that fits both layouts: arrays have their channels last, tensors first, unless the caller says."""
    values = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    expected = processor(Image.fromarray(values))["pixel_values"]
    assert torch.equal(processor(values)["pixel_values"], expected)
    first = torch.from_numpy(values.transpose(2, 0, 1).copy())
    assert torch.equal(processor(first)["pixel_values"], expected)
    assert torch.equal(processor(first.numpy(), input_data_format="channels_first")["pixel_values"], expected)


def test_forms_of_the_result(processor):
    images = [rgb_image(), rgb_image(30, 50)]
    tensor = processor(images)["pixel_values"]
    assert (tensor.shape, tensor.dtype) == ((2, 3, SIDE, SIDE), torch.float32)
    array = processor(images, return_tensors="np")["pixel_values"]
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, tensor.numpy())
    listed = processor.preprocess(images, return_tensors=None).pixel_values
    assert [type(values) for values in listed] == [np.ndarray, np.ndarray]
    last = processor(images, data_format="channels_last")["pixel_values"]
    assert torch.equal(last, tensor.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("image", "options", "error", "message"),
    [
        ("photo.jpg", {}, TypeError, r"^an image is a str; pass Pillow images, arrays or tensors$"),
        (rgb_image(), {"spam": 1}, TypeError, r"^preprocess\(\) got an unexpected keyword argument 'spam'; choose"),
        (
            rgb_image(),
            {"return_tensors": "tf"},
            ValueError,
            r"^return_tensors is 'tf'; choose one of 'pt', 'np', None$",
        ),
        (
            rgb_image(),
            {"data_format": "hwc"},
            ValueError,
            r"^data_format is 'hwc'; choose one of 'channels_first', 'ch",
        ),
        (np.zeros((2, 5, 7)), {}, ValueError, r"^an image has the shape \(2, 5, 7\); pass \(height, width\), "),
        (np.full((4, 4, 3), 300), {}, ValueError, r"^an image holds 300 to 300; pass bytes, 0 to 255, or floats from"),
        (np.full((4, 4, 3), np.nan), {}, ValueError, r"^an image holds nan to nan"),
        (np.full((4, 4, 3), 7.0), {"do_rescale": False}, ValueError, r"^an image holds 7 to 7; with do_rescale=False"),
        (
            [rgb_image(), rgb_image(9, 9)],
            {"do_center_crop": False},
            ValueError,
            r"^images of 2 sizes don't fit one tensor",
        ),
    ],
)
def test_what_is_refused(processor, image, options, error, message):
    with pytest.raises(error, match=message):
        processor(image, **options)
