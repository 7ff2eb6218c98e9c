"""Load an image from a path or an http(s) URL."""

from __future__ import annotations

import http.client
import queue
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from PIL import Image

from llava.files.home_directory import expand_home
from llava.files.regular_files import is_file
from llava.files.terminal_text import format_size, shorten
from llava.image_files.decode import MAX_IMAGE_BYTES, decode_image, open_image
from llava.image_files.errors import NOT_READ, ImageError
from llava.inference.download import Refused, build_opener, is_address, refuse_scheme

TIMEOUT_SECONDS = 30  # for a connection, and for the next bytes of a download
TOTAL_SECONDS = 120  # for a whole download
_BLOCK = 1 << 16  # bytes
_SHOWN = 200  # characters of a server's message
_KEPT = "!#$%&'()*+,/:;=?@[]~"  # characters that have a meaning in a URL, or are quoted already


def load_image(location: str) -> Image.Image:
    """Return the image at a path or an http(s) URL, as upright RGB; a leading `~` is the home directory.

    Raises:
        ImageError: if it is missing, can't be fetched, is too large or is not an image.
    """
    location = location.strip()
    if is_address(location):
        return fetch_image(location)
    return open_image(Path(location))


def fetch_image(address: str, *, only_global: bool = False) -> Image.Image:
    """Return the image at an http(s) URL, as upright RGB; a path is rejected.

    Args:
        address: http or https.
        only_global: for untrusted URLs: connect only to hosts on the public internet, after redirects too, at the IP
            address that was checked (no DNS rebinding).

    Raises:
        ImageError: if it can't or must not be fetched, is too large or is not an image.
    """
    address = address.strip()
    return decode_image(_fetch(address, only_global=only_global), address)


def split_locations(text: str, separator: str = ",") -> list[str]:
    """Split a text at separators; the name of an existing file is one location, separators included."""
    if is_file(expand_home(text)):
        return [text]
    return [part.strip() for part in text.split(separator) if part.strip()]


def quote_address(address: str) -> str:
    """Percent-encode a URL, and encode its host name in IDNA.

    Raises:
        ValueError: if the host name can't be encoded.

    Example:
        >>> quote_address("http://müller.example/a b/ö.jpg?q=%20ü")
        'http://xn--mller-kva.example/a%20b/%C3%B6.jpg?q=%20%C3%BC'
    """
    parts = urllib.parse.urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    host = host if host.isascii() else host.encode("idna").decode("ascii")
    quoted = [
        urllib.parse.quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", part), safe=_KEPT)
        for part in (user, parts.path, parts.query)
    ]
    return urllib.parse.urlunsplit((parts.scheme, f"{quoted[0]}{at}{host}", quoted[1], quoted[2], ""))


def _fetch(address: str, *, only_global: bool) -> bytes:
    """Download within `TOTAL_SECONDS`."""
    results: queue.SimpleQueue[bytes | ImageError] = queue.SimpleQueue()
    deadline = time.monotonic() + TOTAL_SECONDS
    # A thread, because urllib does not limit the time of a server that sends its headers byte by byte.
    thread = threading.Thread(
        target=_download, args=(address, deadline, only_global, results), daemon=True, name="download"
    )
    thread.start()
    try:
        result = results.get(timeout=TOTAL_SECONDS)
    except queue.Empty:
        result = _too_slow(address)
    if isinstance(result, ImageError):
        raise result
    return result


def _download(address: str, deadline: float, only_global: bool, results: queue.SimpleQueue[bytes | ImageError]) -> None:
    try:
        results.put(_read(address, deadline, only_global))
    except ImageError as error:
        results.put(error)
    except Refused as error:
        results.put(ImageError(NOT_READ, f"image {address} is not fetched: {error}"))
    except urllib.error.HTTPError as error:
        reason = f"{error.code} {shorten(str(error.reason), _SHOWN)}"
        results.put(ImageError(NOT_READ, f"image {address}: the server answers {reason}; check the address"))
    except Exception as error:  # of any kind, since the waiting thread must receive it
        reason = shorten(str(getattr(error, "reason", error)), _SHOWN)
        message = f"image {address} can't be fetched ({reason}); check the address, or download it first"
        results.put(ImageError(NOT_READ, message))


def _read(address: str, deadline: float, only_global: bool) -> bytes:
    refuse_scheme(address)
    request = urllib.request.Request(quote_address(address), headers={"User-Agent": "llava"})
    data = bytearray()
    with build_opener(only_global).open(request, timeout=TIMEOUT_SECONDS) as response:
        while block := response.read1(_BLOCK):
            data += block
            if len(data) > MAX_IMAGE_BYTES:
                limit = format_size(MAX_IMAGE_BYTES)
                raise ImageError("image_too_large", f"image {address} has more than {limit}; make it smaller")
            if time.monotonic() > deadline:
                raise _too_slow(address)
        if response.length:  # read1 does not raise for a body that is cut off
            raise http.client.IncompleteRead(bytes(data), response.length)
    return bytes(data)


def _too_slow(address: str) -> ImageError:
    return ImageError(NOT_READ, f"image {address} was not complete after {TOTAL_SECONDS} seconds; download it first")
