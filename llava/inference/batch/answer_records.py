"""Parse and validate the lines of answers files and journals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava.files.json_files import parse_json
from llava.files.terminal_text import show

_TYPES = {"prompt": str, "text": str, "answer_id": str, "model_id": str, "metadata": dict, "error": str}
"""Types of a record's values; `error` may be absent."""


def parse_record(line: bytes) -> dict[str, Any]:
    """Parse a line into an object with a `question_id`.

    Raises:
        ValueError: if it is not one; the message says what is wrong.
    """
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"is not an answer (not JSON: {error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"is not an answer (not a JSON object: {show(record)})")
    _check(record, {"question_id": (int, str)})
    return record


def check_record(record: Mapping[str, Any]) -> None:
    """Check the types of an answer's values.

    Raises:
        ValueError: if one is missing or of another type.
    """
    _check(record, _TYPES)


def _check(record: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    for key, kinds in types.items():
        value = record.get(key, "" if key == "error" else None)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"is not an answer ({f'{key} is {show(value)}' if key in record else f'no {key}'})")
