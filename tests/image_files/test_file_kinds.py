"""A file that is no image is named by its first bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from llava.image_files.decode import ImageError, decode_image
from llava.image_files.file_kinds import describe_content

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
AGAIN, CONVERT, UNPACK = (
    "fetch or export it again", "convert it to PNG or JPEG", "unpack it and name the image inside",
)  # fmt: skip

KINDS = [
    (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "a file of another kind: HEIC", CONVERT),
    (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "a file of another kind: HEIF", CONVERT),
    (b"\0\0\0\x18ftypisom\0\0\0\0", "a file of another kind: MP4 or QuickTime video", CONVERT),
    (b'<svg xmlns="http://www.w3.org/2000/svg">', "an SVG drawing", CONVERT),
    (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a -->\n<svg width="1">', "an SVG drawing", CONVERT),
    (b"<!DOCTYPE html><html>", "a web page (HTML)", "the download went wrong, fetch the image itself"),
    (b"\n<HTML><body>404", "a web page (HTML)", "the download went wrong, fetch the image itself"),
    (b"<Error><Code>AccessDenied</Code></Error>", "an XML text", AGAIN),
    (b'{"message": "not found"}', "a JSON text", AGAIN),
    (POINTER, "a Git LFS pointer instead of the image", "run `git lfs pull` where the file comes from"),
    (b"/annex/objects/SHA256E-s1--a.jpg\n", "a git-annex pointer instead of the image",
        "run `git annex get` where the file comes from"),
    (b"", "nothing, the file is empty", AGAIN),
    (bytes(100), "100 zero bytes", AGAIN),
    (b"%PDF-1.7\n", "a file of another kind: PDF", CONVERT),
    (b"%!PS-Adobe-3.0 EPSF-3.0", "a file of another kind: PostScript", CONVERT),
    (b"8BPS\0\1", "a file of another kind: Photoshop", CONVERT),
    (b"PK\x03\x04abc", "a file of another kind: ZIP archive", UNPACK),
    (b"BZh91AY&SY", "a file of another kind: bzip2 archive", UNPACK),
    (b"a.txt" + bytes(252) + b"ustar\x0000", "a file of another kind: tar archive", UNPACK),
    (b"\xd0\xcf\x11\xe0\xa1\xb1", "a file of another kind: Microsoft Office file", CONVERT),
    (b"/9j/4AAQSkZJRgABAQAAAQABAAD/", "a base64 text of an image", "decode it to an image file"),
    (b"\n \r\n", "nothing but spaces and line ends", AGAIN),
    (bytes(128) + b"DICM\2\0", "a file of another kind: DICOM", CONVERT),
    (b"\x93NUMPY\1\0", "a file of another kind: NumPy array", CONVERT),
    (b"\xff\xd8\xff\xe0", "JPEG data that are damaged, cut off or of an unknown variant", AGAIN),
    (b"RIFF\0\0\0\0WEBPVP8 ", "WEBP data that are damaged, cut off or of an unknown variant", AGAIN),
    (b"data:image/png;base64,iVBOR", "a data URL in base64", "decode it to an image file"),
    (b"https://example.org/a.jpg\n", "a web address", "download the image it leads to"),
    (b"Not found", "text that begins with 'Not found'", AGAIN),
    ("Not found".encode("utf-16"), "text that begins with 'Not found'", AGAIN),
    (b"\x01\x02\x03\x04\x05\x80\x90\xa0\xb0", "an unknown format that begins with the bytes 01 02 03 04 05 80 90 a0",
        AGAIN),
]  # fmt: skip


@pytest.mark.parametrize(("data", "content", "way_out"), KINDS)
def test_content_and_way_out(data, content, way_out):
    assert describe_content(data) == (content, way_out)


@pytest.mark.parametrize(("data", "content", "way_out"), KINDS)
def test_it_is_what_a_user_reads(data, content, way_out):
    with pytest.raises(ImageError) as caught:
        decode_image(data, "a.jpg")
    assert caught.value.code == "image_corrupt"
    if not content.startswith("WEBP"):  # Pillow says itself what is wrong with it
        assert str(caught.value) == f"image a.jpg can't be decoded (it holds {content}); {way_out}"


def test_any_bytes_are_described():
    rng = np.random.default_rng(0)
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    for length in (*range(1, 20), 500):
        for data in (rng.bytes(length), stream.getvalue()[:length], b"\xff\xfe" + rng.bytes(length)):
            content, way_out = describe_content(data)
            assert content
            assert way_out
