"""Open a table by its kind: text, spreadsheet, parquet, arrow, or a directory saved by `datasets`."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path

from llava.data.json_rows import LINES_SUFFIXES, TABLE_SUFFIXES, describe_other_format
from llava.data.table.arrow_grid import is_saved_dataset, open_arrow_grid, open_saved_dataset
from llava.data.table.bad_rows import BadRows, TableError
from llava.data.table.columns import wanted_names
from llava.data.table.csv_grid import read_csv_grid
from llava.data.table.grid import Grid
from llava.data.table.options import TableOptions
from llava.data.table.spreadsheet import SPREADSHEET_SUFFIXES, read_spreadsheet
from llava.data.table.text_encoding import decode_table
from llava.files.home_directory import expand_home
from llava.files.regular_files import read_bytes, refuse_non_file

_BYTES_LOOKED_AT = 64  # of a .txt file
_ARROW_SUFFIXES = (".parquet", ".arrow")
_STARTS = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xd0\xcf\x11\xe0": ".xls"}
_JSON_WAY_OUT = "export the table as CSV, with the columns' names first"


def is_table(path: str | os.PathLike[str]) -> bool:
    """Return whether a path names a table: by its ending, or as a directory that `datasets` saved to disk.

    A .txt file may be JSON Lines as well, as the original takes them: its first characters tell.
    """
    path = Path(expand_home(path))
    if path.suffix.lower() == ".txt":
        return not _begins_as_json(path)
    return path.suffix.lower() in TABLE_SUFFIXES or is_saved_dataset(path)


def open_grid(path: str | os.PathLike[str], options: TableOptions, bad: BadRows) -> Grid:
    """Open a table; what its rows lack is noted in `bad`.

    Raises:
        TableError: if it can't be read, is of another kind than its ending says, or an option has no effect on it.
    """
    name, place = os.fspath(path), Path(expand_home(path))
    suffix = place.suffix.lower()
    text_flags = {"--delimiter": options.delimiter, "--encoding": options.encoding}
    if is_saved_dataset(place):
        _refuse_flags(name, "a saved dataset", {**text_flags, "--sheet": options.sheet})
        return open_saved_dataset(place, name)
    if os.path.isdir(place):  # noqa: PTH112 - Path.is_dir raises for impossible names
        raise TableError(f"{name} is a folder; give the path of the table{_list_tables(place)}")
    if suffix in _ARROW_SUFFIXES:
        _refuse_flags(name, f"a {suffix} table", {**text_flags, "--sheet": options.sheet})
        _read_start(place, name)
        return open_arrow_grid(place, name)
    if suffix in SPREADSHEET_SUFFIXES:
        _refuse_flags(name, f"an {suffix} table" if suffix[1] in "ox" else f"a {suffix} table", text_flags)
        _read_start(place, name)
        return read_spreadsheet(place, name, options.sheet)
    _refuse_flags(name, "a text table", {"--sheet": options.sheet})
    if suffix in (".json", *LINES_SUFFIXES):
        _read_start(place, name)
        raise TableError(f"{name}: not a table, but JSON; {_JSON_WAY_OUT}")
    content = _read(place, name)
    if (suffix := _find_suffix(content)) is not None:
        raise TableError(f"{name}: not a CSV table, but a table of another kind; rename it so that it ends in {suffix}")
    if (kind := describe_other_format(content)) is not None:
        raise TableError(f"{name}: not a CSV table, but {kind}")
    text, notes = decode_table(content, name, options.encoding)
    if _is_json(text):
        raise TableError(f"{name}: not a CSV table, but JSON; {_JSON_WAY_OUT}")
    grid = read_csv_grid(text, name, bad, delimiter=options.delimiter, wanted=wanted_names(options))
    return grid._replace(notes=[*notes, *grid.notes])


def _find_suffix(content: bytes) -> str | None:
    """Return the ending that the content of a table of another kind asks for."""
    if content.startswith(b"PK\x03\x04"):
        return ".xlsx" if b"xl/workbook" in content else ".ods" if b"opendocument.spreadsheet" in content else None
    return next((suffix for start, suffix in _STARTS.items() if content.startswith(start)), None)


def _begins_as_json(path: Path) -> bool:
    try:
        refuse_non_file(path)
        with path.open("rb") as stream:
            start = stream.read(_BYTES_LOOKED_AT)
    except OSError:  # whoever reads it says so
        return False
    return _is_json(start.removeprefix(codecs.BOM_UTF8).decode("latin-1"))


def _is_json(text: str) -> bool:
    """Return whether a text begins as JSON does, which no header of a table is likely to."""
    return re.match(r'\s*(?:\[\s*[\[{"\d]|\{\s*["}])', text) is not None


def _refuse_flags(name: str, kind: str, flags: dict[str, str | None]) -> None:
    given = [flag for flag, value in flags.items() if value is not None]
    if given:
        verb = "has" if len(given) == 1 else "have"
        raise TableError(f"{name} is {kind}, on which {' and '.join(given)} {verb} no effect; leave it out")


def _read_start(path: Path, name: str) -> None:
    """Refuse a file that is not there or not readable, in the same words for every kind."""
    try:
        refuse_non_file(path)
        with path.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise _explain(error, name) from error


def _read(path: Path, name: str) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise _explain(error, name) from error


def _explain(error: OSError, name: str) -> TableError:
    if isinstance(error, FileNotFoundError):
        return TableError(f"{name}: no such file; give the path of the table")
    return TableError(f"{name}: cannot be read ({error.strerror}); give the path of a readable table")


def _list_tables(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in TABLE_SUFFIXES)
    return f", such as {', '.join(names[:5])} in it" if names else "; it holds no table"
