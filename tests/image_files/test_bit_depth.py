"""More than 8 bits are scaled by the depth of the file; what has no known range is refused."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from llava.image_files.decode import ImageError, decode_image, to_rgb

GRADIENT = np.linspace(0, 1, 256)[None]


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff(values, *, bits, kind=1, photometric=1, order="<"):
    """A minimal TIFF of one strip."""
    height, width = values.shape
    data = values.tobytes()
    tags = [
        (256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height),
        (279, len(data)), (339, kind),
    ]  # fmt: skip
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 4 if tag in (273, 279) else 3, 1)
        + (struct.pack(f"{order}I", value) if tag in (273, 279) else struct.pack(f"{order}HH", value, 0))
        for tag, value in tags
    )
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return header + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def first_channel(data):
    image = decode_image(data, "a")
    assert image.mode == "RGB"
    values = np.asarray(image)
    assert (values == values[..., :1]).all()
    return values[..., 0]


EXPECTED = np.arange(256)[None]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_files(kind):
    data = encoded(Image.fromarray((GRADIENT * 65535).round().astype(np.uint16)), kind)
    assert np.array_equal(first_channel(data), EXPECTED)


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_of_either_order(order):
    values = (GRADIENT * 65535).round().astype(f"{order}u2")
    assert np.array_equal(first_channel(tiff(values, bits=16, order=order)), EXPECTED)
    inverted = first_channel(tiff(values, bits=16, order=order, photometric=0)) if order == "<" else 255 - EXPECTED
    assert np.array_equal(inverted, 255 - EXPECTED)


def test_12_bits_that_the_file_names():
    values = np.array([[0, 2048, 4095, 1365]], np.uint32)
    packed = np.array(
        [value for low, high in values.reshape(-1, 2) for value in (low >> 4, (low & 15) << 4 | high >> 8, high & 255)],
        np.uint8,
    )
    data = tiff(packed[None], bits=12).replace(
        struct.pack("<HHIHH", 256, 3, 1, 6, 0), struct.pack("<HHIHH", 256, 3, 1, 4, 0)
    )
    assert first_channel(data).tolist() == [[0, 128, 255, 85]]


def test_16_bit_values_that_are_signed():
    values = (GRADIENT * 32767).round().astype("<i2")
    assert np.array_equal(first_channel(tiff(values, bits=16, kind=2)), EXPECTED)


@pytest.mark.parametrize("kind", [1, 2], ids=["unsigned", "signed"])
@pytest.mark.parametrize("white", [255, 65535, None])
def test_32_bits_take_the_smallest_range_that_holds_them(kind, white):
    white = white or 2 ** (33 - kind) - 1
    values = (GRADIENT * white).round().astype("<u4")
    assert np.array_equal(first_channel(tiff(values, bits=32, kind=kind)), EXPECTED)


@pytest.mark.parametrize(("dtype", "bits"), [("<i2", 16), ("<i4", 32)])
def test_negative_values_have_no_known_black(dtype, bits):
    data = tiff(np.array([[-1024, 0, 3071]], dtype), bits=bits, kind=2)
    with pytest.raises(ImageError) as caught:
        decode_image(data, "ct.tif")
    assert caught.value.code == "image_depth"
    assert str(caught.value) == (
        "image ct.tif holds signed numbers from -1024 to 3071, and the file does not say which is black and which is "
        "white; save it with 8 bits, or with 16 bits from 0 to 65535"
    )


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_floats_of_any_width_are_refused(bits):
    data = tiff(np.zeros((2, 2), f"<f{bits // 8}"), bits=bits, kind=3)
    with pytest.raises(ImageError, match=rf"^image a.tif holds {bits}-bit floating-point numbers") as caught:
        decode_image(data, "a.tif")
    assert caught.value.code == "image_depth"


def test_floats_of_other_formats_and_objects_are_refused():
    for call in (
        lambda: decode_image(encoded(Image.new("F", (2, 2)), "PPM"), "a.pfm"),
        lambda: to_rgb(Image.new("F", (2, 2))),
        lambda: to_rgb(Image.fromarray(np.zeros((2, 2), np.float32))),
    ):
        with pytest.raises(ImageError, match=r"holds 32-bit floating-point numbers") as caught:
            call()
        assert caught.value.code == "image_depth"


def test_a_depth_that_pillow_lacks_is_named():
    with pytest.raises(ImageError, match=r"^image a.tif is a TIFF with 64 bits a sample that can't be read") as caught:
        decode_image(tiff(np.zeros((2, 2), "<u8"), bits=64), "a.tif")
    assert caught.value.code == "image_depth"


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_objects_of_16_bits(mode):
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), 65535)
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 255]


def test_objects_of_32_bits():
    for white in (255, 65535, 2**31 - 1):
        image = Image.fromarray((GRADIENT * white).round().astype(np.int32))
        assert np.array_equal(np.asarray(to_rgb(image))[..., 0], EXPECTED)


def test_8_bits_stored_in_16_are_the_same_image():
    values = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    deep = Image.fromarray(values.astype(np.uint16) * 257)
    assert to_rgb(deep).tobytes() == Image.fromarray(values).convert("RGB").tobytes()
