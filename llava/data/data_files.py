"""Several data files read as one list of rows, each row still known by its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.records import DataError, read_rows

SEPARATOR = ","


class DataFile(NamedTuple):
    """A file of records; `rows` holds what `read_rows` gives."""

    path: str
    rows: list[Any]


def split_paths(text: str) -> list[str]:
    """Return the paths of `a.json,b.jsonl`; an existing file's name is one path, whatever it contains."""
    if Path(text).exists():
        return [text]
    return [path for path in (part.strip() for part in text.split(SEPARATOR)) if path] or [text]


def read_files(paths: Sequence[str]) -> list[DataFile]:
    """Read data files of either format, bad lines of jsonl included.

    Raises:
        FileNotFoundError: if one is missing.
        DataError: if one is no data file, or is named twice.
    """
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise DataError(f"data file {twice} is named twice; leave one of them out")
    return [DataFile(path, read_rows(path)) for path in paths]


def join_rows(files: Sequence[DataFile]) -> list[Any]:
    """Return the rows of all files, one file behind the other."""
    return [row for file in files for row in file.rows]


def locate_rows(files: Sequence[DataFile]) -> list[tuple[str, int]]:
    """Return the file and the row in it, counted from 0, of each row of `join_rows`."""
    return [(file.path, row) for file in files for row in range(len(file.rows))]
