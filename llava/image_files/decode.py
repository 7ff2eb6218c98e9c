"""Decode an image to upright 8-bit RGB: the one way from a file to pixels, for training, answers, chat and reports.

Rules, also in `IMAGE_RULES`: the EXIF orientation is applied; integers of more than 8 bits are scaled; of several
frames the first is used; an alpha channel is dropped, as in the original and in transformers, so that the colour
beneath a transparent pixel is seen.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageFile, UnidentifiedImageError

from llava.files.home_directory import expand_home
from llava.files.regular_files import describe_non_file
from llava.files.terminal_text import format_size
from llava.image_files.bit_depth import brightest_share, find_tiff_depth, is_deep, refuse_float, scale_to_8_bit
from llava.image_files.errors import ImageError
from llava.image_files.file_kinds import describe_content
from llava.image_files.paths import explain_missing

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Pillow's names of the formats that are decoded. No EPS, which starts Ghostscript."""
MAX_IMAGE_BYTES = 200_000_000
"""Largest file or download, in bytes."""
MAX_IMAGE_PIXELS = 178_956_970
"""Larger images are refused: decoded they need over half a gigabyte. Twice Pillow's own limit for a warning."""
MAX_IMAGE_SIDE = 26_754
"""Longest side in pixels: padded to a square, a longer image needs over two gigabytes, however thin it is."""
MAX_ELONGATION = 5_000
"""Largest ratio of the sides: with the shorter side at 336 pixels, a longer image needs over a gigabyte."""
IMAGE_RULES = {"exif_orientation": "applied", "deep_integers": "scaled to 8 bits", "alpha": "dropped"}
"""How files become pixels, for the manifest of a run."""

TRAITS = {
    "rotated_by_exif": "turned upright by their EXIF orientation",
    "transparent": "have transparent pixels; transparency is dropped, and the colour beneath is seen",
    "scaled_to_8_bit": "have more than 8 bits a pixel and are scaled to 8",
    "nearly_black": "have more than 8 bits a pixel and fill less than an eighth of the range, so they become nearly "
    "black; export them with the full range",
    "several_frames": "have several frames; the first is used",
}
"""What an image may have that changes how it is seen, and how a report words it."""
_NEARLY_BLACK = 1 / 8

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Where Pillow finds the orientation; removed once it is looked at, or another reader would apply it again."""
_WITH_ALPHA = {"RGBa": "RGBA", "La": "LA"}  # premultiplied, which Pillow can't convert in one step


def open_image(path: str | Path) -> Image.Image:
    """Decode an image file completely, as upright 8-bit RGB; a leading `~` is the home directory.

    Raises:
        ImageError: if the file is missing, no regular file, too large, truncated, no image, or of unknown range.
    """
    return decode_image(_read_file(Path(expand_home(path))), str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image from memory completely, as upright 8-bit RGB; `name` is for messages.

    Raises:
        ImageError: if it is too large to decode, truncated, no image, or of unknown range.
    """
    with _opened(data, name) as image:
        return to_rgb(image, name)


def find_traits(path: Path) -> list[str]:
    """Decode an image file completely and return which of `TRAITS` it has.

    Raises:
        ImageError: as `open_image`.
    """
    with _opened(_read_file(path), str(path)) as image:
        has = {
            "several_frames": image.format != "MPO" and getattr(image, "is_animated", False),  # MPO: an inset, a map
            "rotated_by_exif": _orientation(image) in _UPRIGHT,  # before loading: a TIFF is turned while it is loaded
        }
        to_rgb(image, str(path))
        has["transparent"] = _is_transparent(image)
        has["scaled_to_8_bit"] = is_deep(image)
        has["nearly_black"] = is_deep(image) and brightest_share(image) < _NEARLY_BLACK
    return [trait for trait in TRAITS if has[trait]]


def to_rgb(image: Image.Image, name: str = "given as an object") -> Image.Image:
    """Return any Pillow image as 8-bit RGB; one that is RGB already is returned as it is.

    What `Image.open` returned is treated as its file is, so its EXIF orientation is applied. The pixels of every other
    object are taken as they stand, for whoever converted or rotated it may have turned it upright before.

    Args:
        image: of any mode.
        name: for messages.

    Raises:
        ImageError: `image_depth` if it holds floating-point or negative numbers.
        TypeError: if it is something else, such as a path.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"an image is a {type(image).__name__}; pass Pillow images, such as Image.open(path)")
    if not isinstance(image, ImageFile.ImageFile):
        return image if image.mode == "RGB" else _convert(image, name)
    image.load()
    orientation = _orientation(image)
    rgb = _convert(image, name)
    for key in _METADATA:
        rgb.info.pop(key, None)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _convert(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise refuse_float(name)
    if is_deep(image):
        return scale_to_8_bit(image, name).convert("RGB")
    if image.mode in _WITH_ALPHA:
        image = image.convert(_WITH_ALPHA[image.mode])
    if isinstance(image.info.get("transparency"), bytes):  # of a palette: Pillow drops it too, with a warning
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none or the metadata are damaged: the pixels are whole then."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's readers of damaged metadata raise anything
        return 1
    return orientation if isinstance(orientation, int) else 1


def _is_transparent(image: Image.Image) -> bool:
    has_alpha = image.mode in ("RGBA", "LA", "PA", *_WITH_ALPHA)
    if not has_alpha and ("transparency" not in image.info or image.mode not in ("1", "L", "P", "RGB")):
        return False
    return image.convert("RGBA").getchannel("A").getextrema()[0] < 255


@contextlib.contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """Open an image from memory; whatever decoding raises in the block becomes an `ImageError`."""
    try:
        with Image.open(io.BytesIO(data), formats=_installed_formats()) as image:
            width, height = image.size
            is_thin = max(width, height) > min(MAX_IMAGE_SIDE, MAX_ELONGATION * min(width, height))
            if width * height > MAX_IMAGE_PIXELS or is_thin:
                raise ImageError("image_too_large", f"image {name}: {width}x{height} pixels; make it smaller")
            yield image
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_large", f"image {name}: {error}; make it smaller") from error
    except UnidentifiedImageError:
        raise _explain_undecodable(data, name) from None
    except Exception as error:  # decoders of damaged files raise anything
        reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise ImageError(
            "image_corrupt", f"image {name} can't be decoded ({reason}); fetch or export it again"
        ) from error


def _explain_undecodable(data: bytes, name: str) -> ImageError:
    depth = find_tiff_depth(data, name)
    if depth is not None:
        return depth
    content, way_out = describe_content(data)
    return ImageError("image_corrupt", f"image {name} can't be decoded (it holds {content}); {way_out}")


@functools.cache
def _installed_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that the installed Pillow knows; AVIF came with 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _read_file(path: Path) -> bytes:
    """Return the content of a regular file of at most `MAX_IMAGE_BYTES`: others may hang, or have no end."""
    try:
        kind = describe_non_file(path.stat().st_mode)
        if kind:
            raise ImageError("image_missing", f"image {path} can't be read: it is {kind}, not a file; name a file")
        with path.open("rb") as stream:
            data = stream.read(MAX_IMAGE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(
            "image_missing",
            f"image {path} not found, {explain_missing(path)}; check the image folder and the file's name",
        ) from None
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(
            "image_missing", f"image {path} can't be read: {reason}; check the path and its permissions"
        ) from error
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError(
            "image_too_large", f"image {path} has more than {format_size(MAX_IMAGE_BYTES)}; make it smaller"
        )
    return data
