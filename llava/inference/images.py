"""Pictures named by a path or a web address."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image

from llava.image_processing import ImageError, decode_image, open_image

TIMEOUT_SECONDS = 30
MAX_DOWNLOAD_BYTES = 200_000_000


def load_image(location: str) -> Image.Image:
    """Return the picture at a path or an http(s) address, as RGB.

    Raises:
        ImageError: if it is missing, can't be fetched, is too large or is no picture.
    """
    location = location.strip()
    if location.lower().startswith(("http://", "https://")):
        return decode_image(_fetch(location), location)
    return open_image(Path(location))


def split_locations(text: str, separator: str = ",") -> list[str]:
    """Return the locations in a text; an existing file's name is one location, whatever it contains."""
    if Path(text).is_file():
        return [text]
    return [part.strip() for part in text.split(separator) if part.strip()]


def _fetch(address: str) -> bytes:
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "llava"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            data = response.read(MAX_DOWNLOAD_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ImageError(
            "image_missing", f"image {address}: the server answers {error.code} {error.reason}; check the address"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ImageError(
            "image_missing", f"image {address} can't be fetched ({reason}); check the address, or download it first"
        ) from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ImageError("image_too_large", f"image {address} is over {MAX_DOWNLOAD_BYTES} bytes; make it smaller")
    return data
