"""Identify content by its first bytes, for files that are named as images and can't be decoded."""

from __future__ import annotations

import re

_CONVERT = "convert it to PNG or JPEG"
_FETCH = "fetch or export it again"
_UNPACK = "unpack it and name the image inside"
_DECODE = "decode it to an image file"
_DECODABLE = (
    (b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF8", "GIF"), (b"BM", "BMP"),
    (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"), (b"\0\0\0\x0cjP  ", "JPEG 2000"),
)  # fmt: skip
"""First bytes of formats that are decoded: a file that begins so and is refused is damaged."""
_SUFFIXES = {
    "JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif", "JPEG 2000": ".jp2", "WEBP": ".webp",
    "PPM": ".ppm",
}  # fmt: skip
_OTHERS = (
    (b"\xff\x0a", "JPEG XL"), (b"\0\0\0\x0cJXL ", "JPEG XL"), (b"8BPS", "Photoshop"), (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"), (b"\xc5\xd0\xd3\xc6", "PostScript"), (b"\0\0\x01\0", "Windows icon"),
    (b"\0\0\x02\0", "Windows cursor"), (b"icns", "macOS icon"), (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"), (b"DDS ", "DDS texture"), (b"SIMPLE  =", "FITS"), (b"\x89HDF", "HDF5"),
    (b"\x93NUMPY", "NumPy array"), (b"PK\x03\x04", "ZIP archive"), (b"\x1f\x8b", "gzip archive"),
    (b"Rar!", "RAR archive"), (b"7z\xbc\xaf", "7z archive"), (b"BZh", "bzip2 archive"), (b"\xfd7zXZ", "xz archive"),
    (b"\x28\xb5\x2f\xfd", "Zstandard archive"), (b"\xd0\xcf\x11\xe0", "Microsoft Office file"), (b"ID3", "MP3 audio"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM video"),
    (b"qoif", "QOI"), (b"FUJIFILM", "camera raw"), (b"PAR1", "Parquet table"), (b"\x80\x04", "pickle"),
    (b"\x80\x05", "pickle"), (b"\xd7\xcd\xc6\x9a", "Windows metafile"),
)  # fmt: skip
_BRANDS = {
    b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"hevc": "HEIC", b"hevx": "HEIC",
    b"mif1": "HEIF", b"msf1": "HEIF", b"avif": "AVIF", b"avis": "AVIF", b"crx ": "camera raw",
}  # fmt: skip
"""Brands of ISO media files; every other one is a video."""
_TEXTS = (
    (r"<svg[\s>]", "SVG drawing", _CONVERT),
    (r"<!doctype html|<html|<head|<body", "web page (HTML)", "the download went wrong, fetch the image itself"),
    (r"<\?xml|<[a-z]+[\s>]", "XML text", _FETCH),
    (r"data:image/", "data URL in base64", _DECODE),
    (r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/=\s]+$", "base64 text of an image", _DECODE),
    (r"[\[{]", "JSON text", _FETCH),
    (r"https?://\S+\s*$", "web address", "download the image it leads to"),
)
_GIT_LFS = b"version https://git-lfs"
_TEXT_BYTES = 1024
_SHOWN = 40


def describe_content(data: bytes) -> tuple[str, str]:
    """Return what bytes that can't be decoded as an image hold, and what to do.

    Example:
        >>> describe_content(b"<html><body>404")
        ('a web page (HTML)', 'the download went wrong, fetch the image itself')
    """
    if not data:
        return "nothing, the file is empty", _FETCH
    if data.startswith(_GIT_LFS):
        return "a Git LFS pointer instead of the image", "run `git lfs pull` where the file comes from"
    if data[:64].lstrip(b"./").startswith((b"annex/objects/", b"git/annex/objects/")):
        return "a git-annex pointer instead of the image", "run `git annex get` where the file comes from"
    kind = _find_decodable(data)
    if kind:
        return f"{kind} data that are damaged, cut off or of an unknown variant", _FETCH
    kind = _find_other(data)
    if kind:
        return f"a file of another kind: {kind}", _UNPACK if kind.endswith("archive") else _CONVERT
    if not data.strip(b"\0"):
        return f"{len(data)} zero bytes", _FETCH
    if not data.strip():
        return "nothing but spaces and line ends", _FETCH
    return _describe_text(data)


def find_suffix(data: bytes) -> str | None:
    """Return the ending of a file name for an image that can be decoded, by its first bytes; None for other content."""
    brand = _BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None
    return ".avif" if brand == "AVIF" else _SUFFIXES.get(_find_decodable(data) or "")


def _find_decodable(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if re.match(rb"P[1-6Ff][\s#]", data):
        return "PPM"
    return next((kind for start, kind in _DECODABLE if data.startswith(start)), None)


def _find_other(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "MP4 or QuickTime video")
    if data[128:132] == b"DICM":
        return "DICOM"
    if data[257:262] == b"ustar":
        return "tar archive"
    if data[:4] == b"RIFF":
        return "AVI video" if data[8:12] == b"AVI " else "RIFF"
    return next((kind for start, kind in _OTHERS if data.startswith(start)), None)


def _describe_text(data: bytes) -> tuple[str, str]:
    start = data[:_TEXT_BYTES]
    encoding = "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = start.decode(encoding, errors="replace").strip()
    if "\0" in text or text.count("\ufffd") > len(text) // 8:
        return f"an unknown format that begins with the bytes {data[:8].hex(' ')}", _FETCH
    for pattern, kind, way_out in _TEXTS:
        finder = re.search if kind.startswith("SVG") else re.match
        if finder(pattern, text, re.IGNORECASE):
            return f"{'an' if kind[0] in 'SX' else 'a'} {kind}", way_out
    return f"text that begins with {text[:_SHOWN]!r}", _FETCH
