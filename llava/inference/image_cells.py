"""Images as Python code holds them: names, bytes, Pillow images, and the dictionaries of `datasets`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from PIL import Image

from llava.image_files.decode import to_rgb

ImageLike = str | os.PathLike[str] | bytes | Image.Image | Mapping[str, Any]
"""A name (path or http(s) address), the bytes of an image file, a Pillow image, or {"bytes": ..., "path": ...}."""
_KINDS = "a file name, the bytes of an image file, a Pillow image, or a list of these"


def is_missing(cell: Any) -> bool:
    """Return whether a cell is empty: None, NaN, or pandas' NA."""
    return cell is None or (isinstance(cell, float) and cell != cell) or type(cell).__name__ in ("NAType", "NaTType")


def read_cell(cell: Any) -> list[str | bytes | Image.Image]:
    """Return the images of a cell: names, contents of image files, Pillow images; none of an empty cell.

    Args:
        cell: an `ImageLike`, a list of these, or an empty cell.

    Raises:
        ValueError: if it is of another kind.
    """
    cell = _unwrap(cell)
    if is_missing(cell):
        return []
    if not isinstance(cell, list | tuple):
        # NumPy's arrays of objects are pandas' lists; its arrays of numbers are refused below.
        cell = cell.tolist() if getattr(getattr(cell, "dtype", None), "kind", None) == "O" else [cell]
    return [_read_one(_unwrap(entry)) for entry in cell]


def _unwrap(cell: Any) -> Any:
    """Return the content of an image that `datasets` has not decoded, or its path; other cells as they are."""
    if not isinstance(cell, Mapping) or {"bytes", "path"}.isdisjoint(cell):
        return cell
    return cell.get("path") if is_missing(cell.get("bytes")) else cell["bytes"]


def _read_one(cell: Any) -> str | bytes | Image.Image:
    if isinstance(cell, str | bytes | Image.Image):
        return cell
    if isinstance(cell, os.PathLike):
        return os.fspath(cell)
    if isinstance(cell, bytearray | memoryview):
        return bytes(cell)
    hint = "; convert an array with PIL.Image.fromarray" if hasattr(cell, "__array__") else ""
    raise ValueError(f"of type {type(cell).__name__}, not {_KINDS}{hint}")


class HeldImages:
    """Images of rows that are in memory, each content once, under names for messages and draws.

    Attributes:
        held: name -> content or image, for an `ImageSource`.
    """

    def __init__(self) -> None:
        self.held: dict[str, bytes | Image.Image] = {}
        self._names: dict[Any, str] = {}

    def name(self, image: bytes | Image.Image, row: int) -> str:
        """Return the name of an image; a new one is called after its first row."""
        key = image if isinstance(image, bytes) else _content_key(image)
        if key not in self._names:
            number, name = 1, f"of row {row}"
            while name in self.held:
                number += 1
                name = f"{number} of row {row}"
            self._names[key], self.held[name] = name, image
        return self._names[key]


def _content_key(image: Image.Image) -> tuple[Any, ...]:
    """Return what equal images have in common, and load the image: threads must not load it at once."""
    try:
        rgb = to_rgb(image)
    except Exception:  # decoders of damaged files raise anything; opening it by its name says what is wrong
        return (id(image),)
    return rgb.size, hashlib.sha256(rgb.tobytes()).digest()
