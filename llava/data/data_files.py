"""Read several data files, JSON or tables, as one list of records; each keeps its file and its place in it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.records import DataError, read_rows
from llava.data.row_errors import Place
from llava.data.table.bad_rows import TableError
from llava.data.table.open_grid import is_table
from llava.data.table.options import TableOptions
from llava.data.table.read import Table, read_table, write_images
from llava.data.table.spreadsheet import SPREADSHEET_SUFFIXES
from llava.data.table.write import training_record
from llava.files.home_directory import expand_home

SEPARATOR = ","
_TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
_SUFFIXES_OF_FLAG = {"--delimiter": _TEXT_SUFFIXES, "--encoding": _TEXT_SUFFIXES, "--sheet": SPREADSHEET_SUFFIXES}
"""Flags that concern one kind of table, and the endings of its files."""


class DataFile(NamedTuple):
    """A file of records.

    Attributes:
        path: of the file.
        rows: what `read_rows` gives; of a table, the records that `task_data_preprocessing.py` makes of it.
        table: what the records were made of; None for JSON.
    """

    path: str
    rows: list[Any]
    table: Table | None = None


def split_paths(text: str) -> list[str]:
    """Return the paths of `a.json,~/b.csv`; an existing file's name is one path, whatever it contains."""
    if os.path.exists(expand_home(text)):  # noqa: PTH110 - Path.exists raises for a list longer than a file name
        return [expand_home(text)]
    return [expand_home(part.strip()) for part in text.split(SEPARATOR) if part.strip()] or [text]


def read_files(paths: Sequence[str], options: TableOptions | None = None) -> list[DataFile]:
    """Read data files of any format, bad lines of jsonl included.

    Args:
        paths: JSON, JSON Lines and tables, in any mix.
        options: columns and format of the tables among them, see `fit_options`.

    Raises:
        FileNotFoundError: if one is missing.
        DataError: if one is not a data file, or is named twice.
        TableError: if a table can't be used; its rows are named by line and column.
    """
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise DataError(f"data file {twice} is named twice; leave one of them out")
    options = options or TableOptions()
    return [
        _read_table(path, fit_options(path, options)) if is_table(path) else DataFile(path, read_rows(path))
        for path in paths
    ]


def fit_options(path: str, options: TableOptions) -> TableOptions:
    """Return the options of one table among several: without what concerns another kind of table than this one."""
    others = [flag for flag in _SUFFIXES_OF_FLAG if not _concerns(flag, path)]
    return dataclasses.replace(options, **{flag.removeprefix("--"): None for flag in others})


def _concerns(flag: str, path: str) -> bool:
    suffixes = _SUFFIXES_OF_FLAG.get(flag)
    return suffixes is None or Path(path).suffix.lower() in suffixes


def list_files(path: str) -> list[str]:
    """Return a path, and of a directory, which a table may be, all files inside."""
    is_folder = os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for impossible names
    inside = sorted(str(file) for file in Path(path).rglob("*") if file.is_file()) if is_folder else []
    return [path, *inside]


def find_unused_flags(given: Sequence[str], files: Mapping[str, str | Sequence[str] | None]) -> str | None:
    """Return what is wrong if flags of tables were given that concern none of the files; None if nothing is.

    Args:
        given: from `given_table_flags`.
        files: flag -> path or paths that may be tables; None = the flag was not given.
    """
    listed = {flag: [paths] if isinstance(paths, str) else paths for flag, paths in files.items() if paths}
    tables = [path for paths in listed.values() for path in paths if is_table(path)]
    unused = [flag for flag in given if not any(_concerns(flag, path) for path in tables)]
    if not unused:
        return None
    if not listed:
        return f"{', '.join(unused)} has no effect without {' or '.join(files)}; leave it out"
    named = " and ".join(f"{flag} {','.join(paths)}" for flag, paths in listed.items())
    kind = f"a table in {', '.join(_SUFFIXES_OF_FLAG[unused[0]])}" if tables else "a table"
    return f"{', '.join(unused)} has no effect for {named}, which is not {kind}; leave it out"


def join_rows(files: Sequence[DataFile]) -> list[Any]:
    """Return the rows of all files, one file after the other."""
    return [row for file in files for row in file.rows]


def locate_rows(files: Sequence[DataFile]) -> list[Place]:
    """Return the place of each row of `join_rows`."""
    return [
        Place(file.path, row, file.table and file.table.rows[row].line)
        for file in files
        for row in range(len(file.rows))
    ]


def has_tables(files: Sequence[DataFile]) -> bool:
    """Return whether a table is among the files."""
    return any(file.table is not None for file in files)


def extract_images(files: Sequence[DataFile], folder: str | Path | None) -> list[str]:
    """Write the images that tables hold into the image folder, each once; return what must be said, by file.

    Args:
        files: of which tables alone may hold images.
        folder: the image folder; a table with images needs one.

    Raises:
        OSError: if one can't be written.
        TableError: if there is no folder, or it has another file of the same name.
    """
    notes = []
    for file in files:
        if file.table is not None:
            written = extract_table_images(file.path, file.table, folder, "--image_folder")
            notes += [*(f"{file.path}: {note}" for note in file.table.notes), *written]
    return notes


def extract_table_images(path: str, table: Table | None, folder: str | Path | None, flag: str) -> list[str]:
    """Write the images that one table holds into the image folder; errors and result as in `extract_images`.

    Args:
        path: of the table, for messages.
        table: its content; None for JSON, which holds no images.
        folder: the image folder, "" or None if there is none.
        flag: that names the folder.
    """
    if table is None or table.images is None:
        return []
    if not folder:
        raise TableError(f"{path} holds images; pass {flag} with the folder into which they are to be written")
    return [f"{path}: {note}" for note in write_images(table, expand_home(folder))]


def _read_table(path: str, options: TableOptions) -> DataFile:
    table = read_table(path, options)
    return DataFile(path, [training_record(row) for row in table.rows], table)
