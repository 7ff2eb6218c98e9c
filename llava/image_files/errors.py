"""ImageError: an image that can't be used, with a code for records and a message for people."""

from __future__ import annotations

import re

from llava.files.terminal_text import format_line, shorten

NOT_READ = "image_missing"
"""Code of an image that could not be read, be it missing or its disk away: the only one that another try may change."""
_SHOWN = 1000  # characters of a message; a longer one holds a data URL for a name
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class ImageError(ValueError):
    """An image that can't be used.

    The message is the same in every run and safe to print (`format_line`); memory addresses are left out.

    Attributes:
        code: `image_missing`, `image_corrupt`, `image_depth`, `image_too_large` or `path_outside_folder`; goes into
            error records.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(shorten(format_line(_ADDRESS.sub("", message)), _SHOWN))
        self.code = code
