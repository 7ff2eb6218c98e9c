"""Read spreadsheets (.xlsx and others) through python-calamine: values as people see them, numbers without ".0"."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.data.json_rows import describe_other_format
from llava.data.table.bad_rows import TableError
from llava.data.table.grid import Grid, Problems
from llava.files.terminal_text import show, show_list

if TYPE_CHECKING:
    from python_calamine import CalamineSheet, CalamineWorkbook

SPREADSHEET_SUFFIXES = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
_SURE_INTEGER = 10**15  # a spreadsheet keeps 15 digits of a number
_ZIP, _OLE = b"PK\x03\x04", b"\xd0\xcf\x11\xe0"
_SHEETS_SHOWN = 10
_EMPTY_HINT = (
    "A formula without a calculated value, and an error value such as #N/A, count as empty: open the table in its "
    "program, and save it there."
)


def read_spreadsheet(path: Path, name: str, sheet: str | None) -> Grid:
    """Read a sheet of a spreadsheet; rows without any value are no rows.

    Args:
        path: of the file.
        name: of the file, for messages.
        sheet: its name; None = the first one that is not hidden.

    Raises:
        TableError: if the library is missing, the file is damaged or protected, or the sheet is missing or empty.
    """
    workbook = _open(path, name)
    chosen, notes = _choose_sheet(workbook, name, sheet)
    numbered = [(line, row) for line, row in enumerate(chosen.iter_rows(), start=1) if any(cell != "" for cell in row)]
    if not numbered:
        raise TableError(f"{name}: the sheet {chosen.name!r} is empty; a table needs a header and rows")
    header = [_as_text(cell) for cell in numbered[0][1]]
    rows = numbered[1:]

    def read_column(number: int, problems: Problems) -> list[str]:
        cells = [row[number] for _, row in rows]
        notes.extend(_note_types(cells, header[number]))
        for place, cell in enumerate(cells):
            if isinstance(cell, (int, float)) and abs(cell) >= _SURE_INTEGER:
                problems[place].append(
                    f"{header[number]} {cell:.0f} is a number of more than 15 digits, of which a spreadsheet keeps 15; "
                    "format the column as text, and enter it again"
                )
        return list(map(_as_text, cells))

    return Grid(header, [line for line, _ in rows], "row", read_column, notes, empty_hint=_EMPTY_HINT)


def _open(path: Path, name: str) -> CalamineWorkbook:
    try:
        import python_calamine
    except ImportError as error:
        raise TableError(
            f'{name}: {path.suffix} tables need python-calamine; run: pip install "llava[tables]", or save the table '
            "as 'CSV UTF-8'"
        ) from error
    try:
        return python_calamine.CalamineWorkbook.from_path(str(path))
    except python_calamine.PasswordError as error:
        raise TableError(f"{name}: the table is protected by a password; save it without") from error
    except (python_calamine.CalamineError, OSError) as error:
        raise TableError(f"{name}: not a readable {path.suffix} table ({error}); {_explain(path)}") from error


def _explain(path: Path) -> str:
    """Return what the file is instead, and what to do."""
    with path.open("rb") as stream:
        start = stream.read(512)
    if not start:
        return "it is empty; save it again"
    if start.startswith((_ZIP, _OLE)):
        return "it is damaged, protected by a password, or of another kind; open it in its program and save it again"
    if (kind := describe_other_format(start)) is not None:
        return f"it is {kind}"
    return "it is no spreadsheet: a text table is named .csv, and is read by that name"


def _choose_sheet(workbook: CalamineWorkbook, name: str, sheet: str | None) -> tuple[CalamineSheet, list[str]]:
    names = workbook.sheet_names
    if sheet is not None:
        if sheet not in names:
            raise TableError(
                f"{name}: no sheet {sheet!r}; it has {show_list(names, _SHEETS_SHOWN)}; choose one with --sheet"
            )
        return workbook.get_sheet_by_name(sheet), []
    visible = [found.name for found in workbook.sheets_metadata if str(found.visible).endswith(".Visible")]
    first = (visible or names)[0]
    others = [other for other in names if other != first]
    notes = []
    if others:
        notes = [
            f"the first sheet, {show(first)}, is read; --sheet chooses another ({show_list(others, _SHEETS_SHOWN)})"
        ]
    return workbook.get_sheet_by_name(first), notes


def _as_text(cell: Any) -> str:
    """Return the text of a cell: 7, not 7.0; TRUE; 2024-05-01."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return str(cell).upper()
    if isinstance(cell, float):
        return str(int(cell)) if cell.is_integer() else repr(cell)
    if isinstance(cell, datetime.datetime):
        return cell.isoformat(" ").removesuffix(" 00:00:00")
    return str(cell)


def _note_types(cells: Sequence[Any], column: str) -> list[str]:
    """Return what must be said of cells whose text is not what the program shows."""
    dates = [cell for cell in cells if isinstance(cell, (datetime.date, datetime.time, datetime.timedelta))]
    notes = []
    if dates:
        notes.append(
            f"{column} holds dates or times in {len(dates):,} rows, written as {_as_text(dates[0])!r}; "
            "format the column as text for another form"
        )
    if n_booleans := sum(isinstance(cell, bool) for cell in cells):
        notes.append(f"{column} holds truth values in {n_booleans:,} rows, written as 'TRUE' and 'FALSE'")
    return notes
