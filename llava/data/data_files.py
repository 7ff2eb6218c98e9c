"""Read several data files as one list of rows; each row keeps its file and its number in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from llava.data.records import DataError, read_rows
from llava.files.home_directory import expand_home

SEPARATOR = ","


class DataFile(NamedTuple):
    """A file of records; `rows` holds what `read_rows` gives."""

    path: str
    rows: list[Any]


def split_paths(text: str) -> list[str]:
    """Return the paths of `a.json,~/b.jsonl`; an existing file's name is one path, whatever it contains."""
    if os.path.exists(expand_home(text)):  # noqa: PTH110 - Path.exists raises for a list longer than a file name
        return [expand_home(text)]
    return [expand_home(part.strip()) for part in text.split(SEPARATOR) if part.strip()] or [text]


def read_files(paths: Sequence[str]) -> list[DataFile]:
    """Read data files of either format, bad lines of jsonl included.

    Raises:
        FileNotFoundError: if one is missing.
        DataError: if one is not a data file, or is named twice.
    """
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise DataError(f"data file {twice} is named twice; leave one of them out")
    return [DataFile(path, read_rows(path)) for path in paths]


def join_rows(files: Sequence[DataFile]) -> list[Any]:
    """Return the rows of all files, one file after the other."""
    return [row for file in files for row in file.rows]


def locate_rows(files: Sequence[DataFile]) -> list[tuple[str, int]]:
    """Return the file and the row in it, counted from 0, of each row of `join_rows`."""
    return [(file.path, row) for file in files for row in range(len(file.rows))]
