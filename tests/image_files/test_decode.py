"""Every image file becomes upright 8-bit RGB or an `ImageError`, and ordinary ones exactly Pillow's pixels."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin, features

from llava.image_files import decode
from llava.image_files.decode import FORMATS, ImageError, decode_image, find_traits, open_image, to_rgb

VALUES = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
ORIENTATIONS = (1, 2, 3, 4, 5, 6, 7, 8)
LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100}, "JPEG": {}}


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def rotated_file(kind, orientation, image=None):
    """A file of a kind whose EXIF says how it has to be turned."""
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = image or Image.fromarray(VALUES)
    if kind == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x0112] = orientation
        return encoded(image, kind, tiffinfo=tags)
    return encoded(image, kind, exif=exif, **LOSSLESS[kind])


def refusal(call, *arguments):
    with pytest.raises(ImageError) as caught:
        call(*arguments)
    return caught.value.code, str(caught.value)


class TestOrientation:
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("kind", sorted(LOSSLESS))
    def test_as_pillow_turns_it(self, kind, orientation):
        data = rotated_file(kind, orientation)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        image = decode_image(data, "a")
        assert image.size == ((6, 9) if orientation >= 5 else (9, 6))
        assert np.array_equal(np.asarray(image), np.asarray(expected))

    def test_a_quarter_to_the_right(self):
        image = decode_image(rotated_file("PNG", 6), "a")
        assert np.array_equal(np.asarray(image), np.rot90(VALUES, -1))

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16"])
    def test_in_every_mode(self, mode):
        image = Image.fromarray(VALUES[..., 0].astype(np.uint16) * 257)
        image = image if mode == "I;16" else Image.fromarray(VALUES).convert(mode)
        upright = np.asarray(to_rgb(image))
        assert np.array_equal(np.asarray(decode_image(rotated_file("PNG", 3, image), "a")), upright[::-1, ::-1])

    def test_orientation_in_xmp(self):
        xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="3"/></x:xmpmeta>'
        data = encoded(Image.fromarray(VALUES), "WEBP", lossless=True, exact=True, xmp=xmp)
        assert np.array_equal(np.asarray(decode_image(data, "a")), VALUES[::-1, ::-1])

    def test_it_is_applied_once(self):
        image = decode_image(rotated_file("PNG", 6), "a")
        assert image.getexif().get(0x0112) is None
        assert ImageOps.exif_transpose(image).tobytes() == image.tobytes()
        assert to_rgb(image) is image

    def test_an_opened_file_is_treated_as_the_file_and_its_converted_pixels_as_they_stand(self):
        data = rotated_file("PNG", 6)
        opened = Image.open(io.BytesIO(data))
        assert to_rgb(opened).tobytes() == decode_image(data, "a").tobytes()
        by_hand = Image.open(io.BytesIO(data)).rotate(-90, expand=True)  # its metadata still say 6
        assert to_rgb(by_hand).tobytes() == decode_image(data, "a").tobytes()

    @pytest.mark.parametrize(
        "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"\xff" * 20, b"Exif\0\0MM"]
    )
    def test_damaged_metadata_leave_the_pixels_alone(self, exif):
        data = encoded(Image.fromarray(VALUES), "PNG", exif=exif)
        assert np.array_equal(np.asarray(decode_image(data, "a")), VALUES)

    @pytest.mark.parametrize("orientation", [0, 9, 65535])
    def test_an_orientation_that_does_not_exist(self, orientation):
        assert np.array_equal(np.asarray(decode_image(rotated_file("PNG", orientation), "a")), VALUES)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_what_pillow_makes_of_them(mode):
    image = Image.fromarray(VALUES)
    image = (
        Image.new("LAB", (9, 6), (120, 130, 140)) if mode == "LAB" else image.convert("L" if mode == "PA" else "RGB")
    )
    image = image.convert({"PA": "PA"}.get(mode, mode)) if mode != "LAB" else image
    assert to_rgb(image).mode == "RGB"
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize(("mode", "full"), [("RGBa", "RGBA"), ("La", "LA")])
def test_premultiplied_alpha(mode, full):
    image = Image.fromarray(VALUES).convert(full)
    assert to_rgb(image.convert(mode)).tobytes() == image.convert("RGB").tobytes()


def test_transparency_is_dropped_as_in_the_original():
    logo = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert decode_image(encoded(logo, "PNG"), "a").getpixel((0, 0)) == (10, 20, 30)


class TestTraits:
    @pytest.fixture
    def traits(self, tmp_path):
        def find(data):
            path = tmp_path / "image"
            path.write_bytes(data)
            return find_traits(path)

        return find

    @pytest.mark.parametrize("kind", sorted(LOSSLESS))
    def test_rotated(self, traits, kind):
        assert traits(rotated_file(kind, 6)) == ["rotated_by_exif"]
        assert traits(rotated_file(kind, 1)) == []

    def test_transparent(self, traits):
        clear, full = Image.new("RGBA", (4, 4), (0, 0, 0, 0)), Image.new("RGBA", (4, 4), (0, 0, 0, 255))
        assert traits(encoded(clear, "PNG")) == traits(encoded(clear.convert("LA"), "PNG")) == ["transparent"]
        assert traits(encoded(full, "PNG")) == []
        palette = Image.new("P", (4, 4))
        assert traits(encoded(palette, "PNG", transparency=0)) == ["transparent"]
        assert traits(encoded(palette, "PNG", transparency=bytes([128]))) == ["transparent"]
        assert traits(encoded(palette, "GIF", transparency=0)) == ["transparent"]
        assert traits(encoded(palette, "PNG", transparency=7)) == []
        assert traits(encoded(Image.new("RGB", (4, 4)), "PNG", transparency=(0, 0, 0))) == ["transparent"]

    def test_deep(self, traits):
        bright = Image.fromarray(np.full((4, 4), 60_000, np.uint16))
        dark = Image.fromarray(np.full((4, 4), 4_095, np.uint16))
        assert traits(encoded(bright, "PNG")) == traits(encoded(bright, "TIFF")) == ["scaled_to_8_bit"]
        assert traits(encoded(dark, "PNG")) == ["scaled_to_8_bit", "nearly_black"]

    @pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF"])
    def test_several_frames(self, traits, kind):
        first, second = Image.new("L", (4, 4), 7), Image.new("L", (4, 4), 99)
        data = encoded(first, kind, save_all=True, append_images=[second])
        assert traits(data) == ["several_frames"]
        assert decode_image(data, "a").getpixel((0, 0)) == (7, 7, 7)

    def test_the_goldens_have_none(self, goldens):
        assert [find_traits(path) for path in (goldens / "images").iterdir()] == [[]] * 8


class TestFiles:
    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_a_named_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "a.jpg")
        assert refusal(open_image, tmp_path / "a.jpg") == (
            "image_missing",
            f"image {tmp_path / 'a.jpg'} can't be read: it is a named pipe, not a file; name a file",
        )

    @pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no devices")
    def test_a_link_to_a_device_has_no_end(self, tmp_path):
        (tmp_path / "a.jpg").symlink_to("/dev/zero")
        code, message = refusal(open_image, tmp_path / "a.jpg")
        assert (code, message.rpartition(": ")[2]) == ("image_missing", "it is a device, not a file; name a file")

    def test_a_link_to_itself(self, tmp_path):
        (tmp_path / "a.jpg").symlink_to(tmp_path / "a.jpg")
        code, message = refusal(open_image, tmp_path / "a.jpg")
        assert code == "image_missing"
        assert message.startswith(f"image {tmp_path / 'a.jpg'} can't be read: ")

    def test_a_huge_file_is_not_read(self, tmp_path):
        with (tmp_path / "a.jpg").open("wb") as stream:
            stream.truncate(decode.MAX_IMAGE_BYTES + 1)  # takes no room
        assert refusal(open_image, tmp_path / "a.jpg") == (
            "image_too_large",
            f"image {tmp_path / 'a.jpg'} has more than 200 MB; make it smaller",
        )

    @pytest.mark.parametrize("name", ["a\0b.jpg", "x" * 300 + ".jpg", "photo.png/x.jpg"])
    def test_impossible_names(self, tmp_path, name):
        Image.new("L", (4, 4)).save(tmp_path / "photo.png")
        assert refusal(open_image, tmp_path / name)[0] == "image_missing"

    def test_a_name_in_the_home_directory(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        Image.fromarray(VALUES).save(tmp_path / "a.png")
        assert np.array_equal(np.asarray(open_image("~/a.png")), VALUES)


class TestErrors:
    @pytest.mark.parametrize("kind", ["EPS", "PCX", "SGI", "TGA", "SPIDER", "ICO", "XBM"])
    def test_other_formats_are_not_decoded(self, kind):
        mode = {"SPIDER": "F", "XBM": "1"}.get(kind, "L")
        data = encoded(Image.new(mode, (16, 16)), kind)
        assert refusal(decode_image, data, "a")[0] == "image_corrupt"

    @pytest.mark.parametrize("kind", FORMATS)
    def test_the_named_formats_are_decoded(self, kind):
        feature = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}.get(kind)
        if feature and not features.check(feature):
            pytest.skip(f"this Pillow has no {kind}")
        assert decode_image(encoded(Image.fromarray(VALUES), kind), "a").size == (9, 6)

    @pytest.mark.parametrize(
        "error",
        [TypeError("x"), AttributeError("x"), KeyError("x"), ZeroDivisionError("x"), MemoryError(), RecursionError()],
    )
    def test_whatever_a_decoder_raises(self, monkeypatch, error):
        def fail(self):
            raise error

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
        code, message = refusal(decode_image, encoded(Image.fromarray(VALUES), "PNG"), "a.png")
        assert code == "image_corrupt"
        assert message == (f"image a.png can't be decoded ({type(error).__name__}: {error}); fetch or export it again")

    def test_no_address_of_memory(self):
        error = ImageError("image_corrupt", f"{io.BytesIO()!r} and {object()!r}")
        assert str(error) == "<_io.BytesIO object> and <object object>"

    def test_no_character_that_a_terminal_obeys(self):
        error = ImageError("image_missing", "image \x1b[2J\udc80\n.jpg, größe 犬.png")
        assert str(error) == "image \\x1b[2J\\udc80\\n.jpg, größe 犬.png"

    @pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"II*\0\x08\0\0\0", bytes(50)])
    def test_the_same_message_each_time(self, data):
        assert refusal(decode_image, data, "a") == refusal(decode_image, data, "a")
        assert not re.search("0x[0-9a-f]{6}", refusal(decode_image, data, "a")[1])
