"""`ImageSource`: images by name, from the image folder or from memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from llava.image_files.decode import decode_image, open_image, to_rgb
from llava.image_files.errors import ImageError
from llava.image_files.paths import resolve_image


class ImageSource(NamedTuple):
    """An image folder, and the images that are not in it.

    Attributes:
        folder: as in `resolve_image`.
        held: name -> path, content of an image file, or Pillow image; such a name is not looked for in the folder.
    """

    folder: str | Path = ""
    held: Mapping[str, Path | bytes | Image.Image] = {}

    def open(self, name: str) -> Image.Image:
        """Decode the image of a name completely, as upright 8-bit RGB; thread-safe for images that are loaded.

        Raises:
            ImageError: if it can't be used.
        """
        image = self.held.get(name)
        if image is None:
            return open_image(resolve_image(self.folder, name))
        if isinstance(image, Path):
            return open_image(image)
        if isinstance(image, bytes):
            return decode_image(image, name)
        try:
            return to_rgb(image, name)
        except ImageError:
            raise
        except Exception as error:  # decoders of damaged files raise anything
            raise ImageError("image_corrupt", f"image {name} can't be decoded ({error}); open it again") from error
