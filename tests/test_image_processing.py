"""Pixels are the original's, bit for bit, and what is no usable picture is refused by its code."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, features

from llava import image_processing
from llava.image_processing import (
    CLIPPixels,
    ImageError,
    decode_image,
    expand_to_square,
    load_image_processor,
    open_image,
    resolve_image,
    select_best_resolution,
)


def png(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 7), (7, 3), (3, 3), (1, 3), (3, 1), (2, 500)])
def test_pictures_one_or_three_pixels_wide_are_pictures(size):
    width, height = size
    values = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    picture = Image.fromarray(values)
    pixels = CLIPPixels(14)(picture)["pixel_values"]
    assert pixels.shape == (1, 3, 14, 14)
    scale = 14 / min(size)
    resized = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 14) // 2, (resized.height - 14) // 2
    cut = np.asarray(resized.crop((left, top, left + 14, top + 14)), np.float64) / 255
    expected = (cut - image_processing.CLIP_MEAN) / image_processing.CLIP_STD
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_the_right_size_needs_no_resize_nor_crop():
    values = np.random.default_rng(0).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    pixels = CLIPPixels(14, image_mean=(0, 0, 0), image_std=(1, 1, 1))(Image.fromarray(values))["pixel_values"]
    assert torch.equal((pixels[0] * 255).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(values))


def test_several_pictures_make_a_batch():
    pictures = [Image.new("RGB", (20, 10)), Image.new("L", (10, 20))]
    assert CLIPPixels(14).preprocess(pictures, return_tensors="pt")["pixel_values"].shape == (2, 3, 14, 14)


def test_only_torch_tensors():
    with pytest.raises(ValueError, match=r"^return_tensors is 'np'; only 'pt' is supported$"):
        CLIPPixels(14).preprocess(Image.new("RGB", (2, 2)), return_tensors="np")


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
        f"image {tmp_path / 'a.jpg'} not found; check the image folder and the file's name",
    )
    code, message = refusal(open_image, tmp_path)
    assert code == "image_missing"
    assert message.startswith(f"image {tmp_path} can't be read: ")


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


@pytest.mark.parametrize("data", [b"", b"no picture", b"<html></html>", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM\0\0"])
def test_no_picture(data):
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
    monkeypatch.setattr(image_processing, "MAX_IMAGE_PIXELS", 5)
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


def test_names_inside_the_folder(tmp_path):
    assert resolve_image(tmp_path, "a.jpg") == tmp_path / "a.jpg"
    assert resolve_image(tmp_path, "deep/../b.jpg") == tmp_path / "b.jpg"
    assert resolve_image(tmp_path, "..a.jpg") == tmp_path / "..a.jpg"


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "deep/../../a.jpg", "..", "./../a"])
def test_names_that_leave_the_folder(tmp_path, name):
    assert refusal(resolve_image, tmp_path, name) == (
        "path_outside_folder",
        f"image {name!r} leads out of the image folder {tmp_path}; name a file inside",
    )


def test_square():
    picture = Image.new("RGB", (1, 3), (1, 2, 3))
    square = expand_to_square(picture, (9, 9, 9))
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
    with pytest.raises(ValueError, match=r"preprocessor_config.json is no JSON object; fetch the file again"):
        load_image_processor(tmp_path, 336)
