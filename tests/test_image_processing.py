"""Pixels are the original's, bit for bit, and what is no usable image is refused by its code."""

from __future__ import annotations

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features
from transformers import LlavaImageProcessorPil

from llava import image_processing
from llava.clip_image_processor import CLIPPixels
from llava.image_files import decode
from llava.image_files.decode import decode_image, open_image
from llava.image_files.errors import ImageError
from llava.image_files.resize import expand_to_square
from llava.image_processing import (
    hf_image_processor_settings,
    hf_processor_settings,
    load_image_processor,
    pads_images,
    select_best_resolution,
)
from llava.mm_utils import process_images


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 7), (7, 3), (3, 3), (1, 3), (3, 1), (2, 500)])
def test_images_one_or_three_pixels_wide_are_images(size):
    width, height = size
    values = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    image = Image.fromarray(values)
    pixels = CLIPPixels(14)(image)["pixel_values"]
    assert pixels.shape == (1, 3, 14, 14)
    scale = 14 / min(size)
    resized = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 14) // 2, (resized.height - 14) // 2
    cut = np.asarray(resized.crop((left, top, left + 14, top + 14)), np.float64) / 255
    expected = (cut - image_processing.CLIP_MEAN) / image_processing.CLIP_STD
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_the_right_size_needs_no_resize_nor_crop():
    values = np.random.default_rng(0).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    pixels = CLIPPixels(14, image_mean=(0, 0, 0), image_std=(1, 1, 1))(Image.fromarray(values))["pixel_values"]
    assert torch.equal((pixels[0] * 255).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(values))


def test_several_pictures_make_a_batch():
    images = [Image.new("RGB", (20, 10)), Image.new("L", (10, 20))]
    assert CLIPPixels(14).preprocess(images, return_tensors="pt")["pixel_values"].shape == (2, 3, 14, 14)


def test_settings_round_trip(tmp_path, goldens):
    processor = load_image_processor(goldens / "clip-vit-tiny-patch14-56", 336)
    assert (processor.size, processor.crop_size) == ({"shortest_edge": 56}, {"height": 56, "width": 56})
    processor.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    assert load_image_processor(tmp_path, 336).to_dict() == processor.to_dict()


def test_without_a_file_clips_own_values(tmp_path):
    assert load_image_processor(tmp_path, 336).to_dict() == CLIPPixels(336).to_dict()


def test_sizes_as_plain_numbers(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": 30, "crop_size": 28}')
    processor = load_image_processor(tmp_path, 336)
    assert (processor.size, processor.crop_size) == ({"shortest_edge": 30}, {"height": 28, "width": 28})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_center_crop": False}, "do_center_crop"),
        ({"do_resize": False, "do_normalize": False}, "do_resize, do_normalize"),
        ({"resample": 2}, "resample"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"size": {"height": 336, "width": 336}}, "size"),
        ({"do_resize": False, "crop_size": {"height": 336, "width": 224}}, "do_resize, crop_size"),
    ],
)
def test_other_steps_than_clips_are_refused(tmp_path, settings, reason):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{reason} differs from CLIP's preprocessing, which is what runs here$"):
        load_image_processor(tmp_path, 336)


def test_opens_any_mode_as_rgb(goldens):
    for name in ("alpha.png", "gray.jpg", "palette.png", "tiny.png"):
        assert open_image(goldens / "images" / name).mode == "RGB"


def refusal(call, *arguments):
    with pytest.raises(ImageError) as caught:
        call(*arguments)
    return caught.value.code, str(caught.value)


def test_missing(tmp_path):
    assert refusal(open_image, tmp_path / "a.jpg") == (
        "image_missing",
        f"image {tmp_path / 'a.jpg'} not found, its folder has no images; check the image folder and the file's name",
    )
    assert refusal(open_image, tmp_path) == (
        "image_missing",
        f"image {tmp_path} can't be read: it is a folder, not a file; name a file",
    )


@pytest.mark.parametrize("kept", [0, 1, 20, 50, 0.5, 0.98])
@pytest.mark.parametrize("name", ["landscape.jpg", "portrait.png", "palette.png"])
def test_truncated(goldens, tmp_path, name, kept):
    data = (goldens / "images" / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    code, message = refusal(open_image, path)
    assert code == "image_corrupt"
    assert message.startswith(f"image {path} can't be decoded (")
    assert message.endswith("); fetch or export it again")


@pytest.mark.parametrize("data", [b"", b"no image", b"<html></html>", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM\0\0"])
def test_no_image(data):
    assert refusal(decode_image, data, "x")[0] == "image_corrupt"


def test_damaged_bytes_never_escape_as_another_error(goldens):
    rng = np.random.default_rng(0)
    for name in ("landscape.jpg", "palette.png", "tiny.png", "gray.jpg"):
        data = np.frombuffer((goldens / "images" / name).read_bytes(), np.uint8)
        for _ in range(25):
            damaged = data.copy()
            damaged[rng.integers(0, min(len(data), 400), 4)] = rng.integers(0, 256, 4)
            try:
                assert decode_image(damaged.tobytes(), name).mode == "RGB"
            except ImageError:
                continue


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "TIFF", "WEBP"])
def test_damaged_bytes_of_other_formats(kind):
    stream, rng = io.BytesIO(), np.random.default_rng(1)
    if kind.lower() in ("avif", "webp") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(stream, kind)
    data = np.frombuffer(stream.getvalue(), np.uint8)
    for _ in range(60):
        damaged = data.copy()
        damaged[rng.integers(0, min(len(data), 200), 3)] = rng.integers(0, 256, 3)
        with contextlib.suppress(ImageError):
            assert decode_image(damaged.tobytes(), kind).mode == "RGB"


def test_bomb():
    """A small file that says it is enormous: refused before it is decoded."""
    data = bytearray(png(Image.new("L", (1, 1))))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = __import__("zlib").crc32(bytes(data[12:29])).to_bytes(4, "big")
    code, message = refusal(decode_image, bytes(data), "bomb.png")
    assert code == "image_too_large"
    assert message.startswith("image bomb.png: ")
    assert message.endswith("; make it smaller")


def test_too_large_by_our_own_limit(monkeypatch):
    monkeypatch.setattr(decode, "MAX_IMAGE_PIXELS", 5)
    assert refusal(decode_image, png(Image.new("L", (3, 2))), "a.png") == (
        "image_too_large",
        "image a.png: 3x2 pixels; make it smaller",
    )


@pytest.mark.parametrize("size", [(1, 26_755), (5_001, 1), (26_755, 6)])
def test_thin_pictures_that_would_fill_the_memory(size):
    width, height = size
    assert refusal(decode_image, png(Image.new("L", size)), "thin.png") == (
        "image_too_large",
        f"image thin.png: {width}x{height} pixels; make it smaller",
    )
    assert decode_image(png(Image.new("L", (5_000, 1))), "thin.png").size == (5_000, 1)
    assert decode_image(png(Image.new("L", (6, 26_754))), "long.png").size == (6, 26_754)


def test_square():
    image = Image.new("RGB", (1, 3), (1, 2, 3))
    square = expand_to_square(image, (9, 9, 9))
    assert np.asarray(square)[:, :, 0].tolist() == [[9, 1, 9]] * 3
    assert expand_to_square(square, (0, 0, 0)) is square


def test_best_resolution():
    choices = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    assert select_best_resolution((1000, 300), choices) == (1008, 336)
    assert select_best_resolution((300, 1000), choices) == (336, 1008)
    assert select_best_resolution((600, 600), choices) == (672, 672)
    assert select_best_resolution((100, 100), choices) == (336, 672)


def test_a_broken_preprocessor_config_is_named(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"preprocessor_config.json is not a JSON object; fetch the file again"):
        load_image_processor(tmp_path, 336)


def test_settings_inside_the_processors(tmp_path):
    """As transformers 5 writes them; they count before `preprocessor_config.json`."""
    (tmp_path / "preprocessor_config.json").write_text('{"size": 224, "crop_size": 224}')
    (tmp_path / "processor_config.json").write_text('{"patch_size": 14, "processor_class": "LlavaProcessor"}')
    assert load_image_processor(tmp_path, 336).to_dict() == CLIPPixels(224).to_dict()
    nested = {
        "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56},
        "image_mean": None,
        "do_pad": True,
    }
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested, "patch_size": 14}))
    assert load_image_processor(tmp_path, 336).to_dict() == CLIPPixels(56).to_dict()
    assert pads_images(tmp_path) is True
    nested["resample"] = 2
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    with pytest.raises(ValueError, match=r"processor_config.json: resample differs from CLIP's preprocessing"):
        load_image_processor(tmp_path, 336)


def test_whether_pictures_are_padded(tmp_path, goldens):
    assert pads_images(tmp_path) is None
    assert pads_images(goldens / "clip-vit-tiny-patch14-56") is None
    for do_pad in (False, True):
        settings = hf_image_processor_settings(CLIPPixels(56), do_pad=do_pad)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        assert pads_images(tmp_path) is do_pad
        assert load_image_processor(tmp_path, 336).to_dict() == CLIPPixels(56).to_dict()
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"preprocessor_config.json is not a JSON object"):
        pads_images(tmp_path)


@pytest.mark.parametrize("ratio", ["pad", None])
def test_transformers_computes_the_same_pixels(tmp_path, goldens, ratio):
    settings = hf_image_processor_settings(CLIPPixels(336), do_pad=ratio == "pad")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = LlavaImageProcessorPil.from_pretrained(str(tmp_path))
    images = [Image.open(path) for path in sorted((goldens / "images").iterdir())]
    assert {image.mode for image in images} == {"L", "P", "RGB", "RGBA"}
    rng = np.random.default_rng(0)
    for width, height in ((1, 9), (9, 1), (3, 7), (7, 3), (3, 3), (1, 1)):
        images.append(Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))
    for image in images:
        expected = process_images([image.convert("RGB")], CLIPPixels(336), SimpleNamespace(image_aspect_ratio=ratio))
        assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], expected), image


def test_what_transformers_saves_is_read(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(hf_image_processor_settings(CLIPPixels(336, image_mean=(0.5, 0.5, 0.5)), do_pad=True))
    )
    LlavaImageProcessorPil.from_pretrained(str(tmp_path)).save_pretrained(tmp_path / "again")
    assert load_image_processor(tmp_path / "again", 56).image_mean == [0.5, 0.5, 0.5]
    assert pads_images(tmp_path / "again") is True


def test_settings_of_the_processor():
    settings = hf_processor_settings(patch_size=14, select_feature="patch", image_token="<image>")
    assert settings == {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 14,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    both = hf_processor_settings(patch_size=14, select_feature="cls_patch", image_token="<image>")
    assert both == {**settings, "vision_feature_select_strategy": "full"}
    with pytest.raises(ValueError, match=r"^mm_vision_select_feature is 'cls'; choose one of patch, cls_patch$"):
        hf_processor_settings(patch_size=14, select_feature="cls", image_token="<image>")
