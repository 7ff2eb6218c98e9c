"""Scale integer images of more than 8 bits to 8; refuse floating-point images.

`Image.convert("RGB")` cuts such values off at 255, which makes an X-ray or a depth map plain white.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, TiffImagePlugin

from llava.image_files.errors import ImageError

BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO = 0
_SIGNED, _FLOAT = 2, 3
_16_BIT_FORMATS = ("PNG", "PPM", "JPEG2000")
"""Formats whose deep images Pillow gives in 16 bits, whatever the file's own maximum; mode I in some versions."""


def is_deep(image: Image.Image) -> bool:
    """Return whether an image has integers of more than 8 bits."""
    return image.mode.startswith("I")


def scale_to_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Return an integer image of more than 8 bits in mode L: 0 becomes 0, the depth's largest value 255.

    The depth is the file's: tag BitsPerSample of a TIFF (12 bits are 0..4095), 16 bits in other formats and in Pillow's
    modes I;16. 32 bits are hardly ever filled, so values up to 255 are taken for 8 bits, up to 65535 for 16, and only
    larger ones for 32; the same holds for mode I without a file. A TIFF that says "white is zero" is inverted.

    Args:
        image: of mode I, I;16, I;16L, I;16B or I;16N.
        name: for messages.

    Raises:
        ImageError: `image_depth` if there are negative values, for then black is not known.
    """
    values, white = _values_and_white(image)
    low = int(values.min())
    if low < 0:
        raise ImageError(
            "image_depth",
            f"image {name} holds signed numbers from {low} to {int(values.max())}, and the file does not say which is "
            "black and which is white; save it with 8 bits, or with 16 bits from 0 to 65535",
        )
    if white <= 65535:
        table = ((np.arange(white + 1) * 255 + white // 2) // white).astype(np.uint8)
        scaled = table[np.minimum(values, white)]
    else:
        scaled = np.rint(values * (255 / white)).astype(np.uint8)
    tags = getattr(image, "tag_v2", {})
    return Image.fromarray(255 - scaled if tags.get(PHOTOMETRIC) == _WHITE_IS_ZERO else scaled)


def brightest_share(image: Image.Image) -> float:
    """Return the largest value of a deep image as a share of its white, 0..1."""
    values, white = _values_and_white(image)
    return float(values.max()) / white


def refuse_float(name: str, bits: int = 32) -> ImageError:
    """Return the error of a floating-point image."""
    return ImageError(
        "image_depth",
        f"image {name} holds {bits}-bit floating-point numbers, and no file says which is black and which is white; "
        "save it with 8 bits, or with 16 bits from 0 to 65535",
    )


def find_tiff_depth(data: bytes, name: str) -> ImageError | None:
    """Return the error of a TIFF that Pillow refuses for its depth; None if that is not the reason."""
    try:
        stream = io.BytesIO(data)
        tags = TiffImagePlugin.ImageFileDirectory_v2(stream.read(8))
        stream.seek(tags.next)
        tags.load(stream)
        bits, kind = int(tags[BITS_PER_SAMPLE][0]), tags.get(SAMPLE_FORMAT, (1,))[0]
    except Exception:  # Pillow's readers of damaged files raise anything
        return None
    if kind == _FLOAT:
        return refuse_float(name, bits)
    if bits <= 8:
        return None
    return ImageError(
        "image_depth", f"image {name} is a TIFF with {bits} bits a sample that can't be read; save it with 8 bits"
    )


def _values_and_white(image: Image.Image) -> tuple[np.ndarray, int]:
    """Return the values (height, width) of an integer image, and the one that stands for white."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        bits, is_signed = int(tags.get(BITS_PER_SAMPLE, (1,))[0]), tags.get(SAMPLE_FORMAT, (1,))[0] == _SIGNED
    elif image.mode != "I" or image.format in _16_BIT_FORMATS:
        bits, is_signed = 16, False
    else:
        bits, is_signed = 32, True
    if bits <= 16:
        return values, 2 ** (bits - is_signed) - 1
    if not is_signed:
        values = values.view(np.uint32)  # Pillow has no unsigned mode of 32 bits
    high = values.max()
    return values, next(white for white in (255, 65535, 2 ** (bits - is_signed) - 1) if high <= white)
