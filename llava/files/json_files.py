"""Read and write JSON: whatever is wrong with a text is a `json.JSONDecodeError`, with a file a `ValueError`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from llava.files.regular_files import MAX_SETTINGS_BYTES, check_content
from llava.files.terminal_text import format_size

MAX_DEPTH = 100  # levels of lists and objects inside each other
_DECODER = json.JSONDecoder()


class NestingError(json.JSONDecodeError):
    """JSON whose lists and objects are nested too deep to be read, or to be handled by code that recurses."""

    def __init__(self, text: str, position: int = 0) -> None:
        super().__init__("nested too deep", text, position)


def parse_json(text: str | bytes, *, is_finite: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: bytes are in UTF-8, UTF-16 or UTF-32.
        is_finite: refuse NaN, Infinity and numbers beyond 1.8e308, which JSON does not have but Python reads.

    Raises:
        json.JSONDecodeError: if it is not JSON, nested deeper than `MAX_DEPTH`, or holds an integer of more digits than
            Python reads.
        UnicodeDecodeError: if bytes are in none of these encodings.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    hooks = {"parse_constant": _refuse_constant, "parse_float": _parse_finite} if is_finite else {}
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise NestingError(text) from None
    except ValueError as error:
        raise _as_json_error(error, text) from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise NestingError(text)
    return value


def parse_json_at(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON value that begins at a position, which is not a space, and where it ends.

    Its depth is what Python's own limit on recursion allows: of long lists of rows it is not measured.

    Raises:
        json.JSONDecodeError: as `parse_json`.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError:
        raise NestingError(text, start) from None
    except ValueError as error:
        raise _as_json_error(error, text, start) from error


def read_settings(path: Path, *, is_finite: bool = True) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        path: of the file.
        is_finite: refuse NaN and infinite numbers, which only the state of a training may hold.

    Raises:
        OSError: if it is a pipe, a device or a socket, or can't be read.
        ValueError: if the file holds no JSON object, or is larger than any file of settings.
    """
    check_content(path)
    if path.stat().st_size > MAX_SETTINGS_BYTES:
        raise ValueError(
            f"{path} has more than {format_size(MAX_SETTINGS_BYTES)}, which no such file needs; fetch the file again"
        )
    try:
        settings = parse_json(path.read_bytes().decode("utf-8"), is_finite=is_finite)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a JSON object; fetch the file again")
    return settings


def write_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object to a file."""
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _as_json_error(error: ValueError, text: str, start: int = 0) -> json.JSONDecodeError:
    """Return the error itself, or the one of a number as an error of the text it stands in."""
    return error if isinstance(error, json.JSONDecodeError) else json.JSONDecodeError(str(error), text, start)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _parse_finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        parts = (part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer))
        level = [part for part in parts if isinstance(part, (dict, list))]
        if not level:
            return False
    return True
