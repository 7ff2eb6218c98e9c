"""Read JSON and JSON Lines files of rows, in any common encoding and shape, with the line of each row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llava.files.json_files import NestingError, parse_json, parse_json_at
from llava.files.regular_files import read_bytes
from llava.files.terminal_text import show, show_list

LINES_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".parquet", ".arrow")
_NOT_SPACE = re.compile(r"[^ \t\r\n]")
_MAGIC = {
    b"PK\x03\x04": "a zip archive or an .xlsx table; unpack or export it",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive; unpack it",
    b"\xd0\xcf\x11\xe0": "an .xls table; export it",
    b"PAR1": "a Parquet table; export it",
    b"ARROW1": "an Arrow table; export it",
    b"SQLite format 3": "an SQLite database; export the table",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with git lfs pull",
}
"""First bytes of files that hold no rows as text, what they are, and what to do."""
_WEB_PAGE = re.compile(rb"\s*(?:<!doctype html|<html)", re.IGNORECASE)
_WRAPPED = "{} holds {}, not a list of rows; {}"
_FILES_SHOWN = 5


class RowsFileError(ValueError):
    """A file without readable rows; the message names it, the place and what to do."""


class UnreadableLine(NamedTuple):
    """Stands for a line of JSON Lines that is not valid JSON."""

    message: str


@dataclass
class RowsFile:
    """Rows of a file.

    Attributes:
        rows: any JSON values, or what they are converted to; of each bad line of JSON Lines an `UnreadableLine`.
        numbers: of each row its line, or its number in the list, counted from 1.
        unit: what `numbers` count: "line" or "row".
        notes: how a file of an unexpected shape was read, in words.
    """

    rows: list[Any] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    unit: str = "line"
    notes: list[str] = field(default_factory=list)


def read_rows_file(
    path: str | Path,
    *,
    row_keys: Sequence[str],
    is_lines: bool | None = None,
    convert: Callable[[Any], Any] = lambda row: row,
) -> RowsFile:
    """Read a JSON list, JSON Lines, or objects one after another, in UTF-8, UTF-16 or UTF-32.

    Args:
        path: the file.
        row_keys: an object alone in its file is one row if it has any of these keys.
        is_lines: the file should hold one object per line; None = if its name says so.
        convert: what becomes of each row, line by line where a row is a line, so that a large file is not held twice.

    Raises:
        OSError: if the file can't be read.
        RowsFileError: if it is a folder or otherwise not JSON, or JSON without rows.
    """
    path = Path(path)
    if path.is_dir():
        raise RowsFileError(f"{path} is a folder; name a file{_list_json_files(path)}")
    content = read_bytes(path)
    kind = describe_other_format(content)
    if kind is not None:
        raise RowsFileError(f"{path} is not JSON, but {kind}")
    text, notes = decode_text(content, str(path))
    del content
    is_lines = path.suffix.lower() in LINES_SUFFIXES if is_lines is None else is_lines
    if is_lines and not _spans_lines(text):
        found = _parse_lines(text, str(path), row_keys, convert)
    else:
        found = _parse(text, str(path), is_lines=is_lines, row_keys=row_keys)
        found.rows = list(map(convert, found.rows))
    found.notes[:0] = notes
    return found


def describe_other_format(content: bytes) -> str | None:
    """Return which archive, binary table or web page a file is, and what to do; None for every other file."""
    if _WEB_PAGE.match(content):
        return "a web page (HTML); the download went wrong, fetch the file itself"
    return next((kind for magic, kind in _MAGIC.items() if content.startswith(magic)), None)


def decode_text(content: bytes, name: str) -> tuple[str, list[str]]:
    """Return the text of a JSON file, and a note if it is not in UTF-8; a byte order mark is left out.

    Raises:
        RowsFileError: if it is in none of UTF-8, UTF-16 and UTF-32.
    """
    encoding = json.detect_encoding(content) if content.strip() else "utf-8"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        place = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        if encoding.startswith("utf-8"):
            place += f", line {content.count(10, 0, error.start) + 1}"
        raise RowsFileError(
            f"{name} is not in UTF-8 ({place}); save it in UTF-8, or convert it if you know its encoding, for example: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {name} > utf8-{Path(name).name}"
        ) from None
    is_utf8 = encoding.startswith("utf-8")
    return text, [] if is_utf8 else [f"{name} is in {encoding[:6].upper()}, not UTF-8, and is read as that"]


def explain_json_error(error: json.JSONDecodeError) -> str:
    """Return what is wrong with a JSON text, in the words of its usual cause where the place shows it."""
    before, at = error.doc[: error.pos].rstrip(), error.doc[error.pos : error.pos + 1]
    after = error.doc[error.pos :].lstrip(" \t\r\n,")[:1]  # Python 3.13 points at the comma, 3.12 after it
    if (before.endswith(",") or at == ",") and after in ("]", "}"):
        return f"a comma before the closing {after!r}, which JSON does not allow"
    if at == "," and error.msg == "Extra data" and before.endswith("}"):
        return "a comma after the object; with an object per line there is none between them"
    if at == "'":
        return "single quotes, as Python prints them; JSON wants double quotes, as json.dump writes them"
    if error.doc.startswith(("True", "False", "None"), error.pos):
        return "True, False or None, as Python prints them; JSON has true, false and null"
    return error.msg


def _parse(text: str, name: str, *, is_lines: bool, row_keys: Sequence[str]) -> RowsFile:
    values, lines = _parse_values(text, name)
    if len(values) == 1 and isinstance(values[0], list):
        notes = [f"{name} holds one JSON list, not an object per line, and is read as that"] if is_lines else []
        return RowsFile(values[0], list(range(1, len(values[0]) + 1)), "row", notes)
    if not all(isinstance(value, dict) for value in values):
        raise RowsFileError(f"{name} must hold a list of objects, or one object per line")
    if len(values) == 1 and not any(key in values[0] for key in row_keys):
        raise RowsFileError(_WRAPPED.format(name, _describe_object(values[0]), _unwrap(values[0])))
    shape = "a single object" if len(values) == 1 else f"{len(values)} objects one after another"
    notes = [f"{name} holds {shape}, not a JSON list, and is read as that"] if values and not is_lines else []
    if values and is_lines:
        notes = [f"{name} holds {shape} over several lines, not an object per line, and is read as that"]
    return RowsFile(values, lines, "line", notes)


def _spans_lines(text: str) -> bool:
    """Return whether the first value of a file is a list, or an object over several lines."""
    start = _NOT_SPACE.search(text)
    if start is None:
        return False
    if text[start.start()] == "[":
        return True
    first_line = text[start.start() :].partition("\n")[0].strip()
    try:
        parse_json_at(first_line, 0)
    except json.JSONDecodeError:
        pass
    else:
        return False
    try:
        _, end = parse_json_at(text, start.start())
    except json.JSONDecodeError:
        return first_line == "{"
    return "\n" in text[start.start() : end]


def _parse_lines(text: str, name: str, row_keys: Sequence[str], convert: Callable[[Any], Any]) -> RowsFile:
    found, first = RowsFile(), None
    for number, line in enumerate(_split_lines(text), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except NestingError as error:
            row = UnreadableLine(f"line {number} is not valid JSON ({error.msg})")
        except json.JSONDecodeError as error:
            reason = explain_json_error(error)
            row = UnreadableLine(f"line {number} is not valid JSON ({reason}, column {error.colno})")
        first = row if not found.rows else first
        found.rows.append(convert(row))
        found.numbers.append(number)
    if len(found.rows) == 1 and _is_wrapper(first, row_keys):
        raise RowsFileError(_WRAPPED.format(name, _describe_object(first), _unwrap(first)))
    return found


def _split_lines(text: str) -> Iterator[str]:
    """Yield lines one by one; not as str.splitlines, for texts may hold other line separators."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def _parse_values(text: str, name: str) -> tuple[list[Any], list[int]]:
    """Return the JSON values of a text, whatever stands between them, and the line on which each begins."""
    values, lines, position, line = [], [], 0, 1
    while start := _NOT_SPACE.search(text, position):
        line += text.count("\n", position, start.start())
        try:
            value, end = parse_json_at(text, start.start())
        except NestingError as error:
            raise RowsFileError(f"{name} is not valid JSON: {error.msg}; export it again") from None
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise RowsFileError(f"{name} is not valid JSON: {place}: {explain_json_error(error)}; fix it") from error
        values.append(value)
        lines.append(line)
        line += text.count("\n", start.start(), end)
        position = end
    return values, lines


def _describe_object(values: dict[str, Any]) -> str:
    if not values:
        return "an empty object"
    return f"an object with the key{'' if len(values) == 1 else 's'} {show_list(values)}"


def _is_wrapper(row: Any, row_keys: Sequence[str]) -> bool:
    """Return whether an object holds rows rather than being one."""
    if not isinstance(row, dict) or any(key in row for key in row_keys):
        return False
    lists = [value for value in row.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return len(lists) == 1 or (bool(row) and all(isinstance(value, dict) for value in row.values()))


def _unwrap(values: dict[str, Any]) -> str:
    lists = [key for key, value in values.items() if isinstance(value, list)]
    if len(lists) == 1:
        return f"write the list under {show(lists[0])} alone"
    if values and all(isinstance(value, dict) for value in values.values()):
        return "write its values as a list"
    return "write the rows as a list, or one per line in a .jsonl file"


def _list_json_files(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in (".json", *LINES_SUFFIXES))
    if not names:
        return "; it holds no .json or .jsonl file"
    return f", such as {', '.join(names[:_FILES_SHOWN])} in it"
