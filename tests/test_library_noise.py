"""Messages of libraries that are left out."""

from __future__ import annotations

import logging
import subprocess
import sys

from PIL import Image

import llava  # noqa: F401 - its import sets the filter


def test_advice_of_bitsandbytes_is_left_out_and_nothing_else(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure", "no kernels")
    logger.warning("another message")
    assert caplog.messages == ["another message"]


def test_odd_images_are_read_without_warnings(tmp_path):
    """A palette with an alpha for each colour, and EXIF data that end too early."""
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "a.png", transparency=b"\x00\x80")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    code = (
        "import sys; from llava.image_files.decode import open_image; print([open_image(p).mode for p in sys.argv[1:]])"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("['RGB', 'RGB']\n", "")
