"""Files of benchmark servers: JSON annotations in, submission files in JSON and .xlsx out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from llava.eval.benchmarks.lines import AnswerLine, BenchmarkError, count_errors
from llava.files.atomic_files import atomic_write
from llava.files.home_directory import expand_home
from llava.files.json_files import parse_json
from llava.files.regular_files import read_text

_NOT_IN_XLSX = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_MOST_IN_XLSX = 32_767  # characters of a cell


def read_json_document(path: str | os.PathLike[str]) -> Any:
    """Return the JSON value of a file of annotations.

    Raises:
        BenchmarkError: if the file can't be read, or is not JSON.
    """
    try:
        return parse_json(read_text(expand_home(path), encoding="utf-8-sig"))
    except OSError as error:
        raise BenchmarkError(f"{path} can't be read ({error.strerror or error}); check the path") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise BenchmarkError(f"{path} is not JSON ({error}); download it again") from error


def write_json_document(path: str | os.PathLike[str], value: Any, *, indent: int | None = None) -> None:
    """Write a JSON value to a file, atomically.

    Raises:
        OSError: if it can't be written.
    """
    with atomic_write(path) as stream:
        stream.write(json.dumps(value, indent=indent))


def write_xlsx(path: str | os.PathLike[str], table: Sequence[Sequence[int | str | None]]) -> tuple[str, ...]:
    """Write rows of cells as the only sheet of a spreadsheet, atomically; return notes.

    A text that begins like a formula stays a text. Control characters, which .xlsx can't hold, become spaces, and a
    cell has at most 32,767 characters: cells that this changes are counted in the notes.

    Raises:
        BenchmarkError: if openpyxl is not installed.
        OSError: if it can't be written.
    """
    try:
        from openpyxl import Workbook
        from openpyxl.cell import WriteOnlyCell
    except ImportError as error:
        raise BenchmarkError(f'{path}: .xlsx files need openpyxl; run: pip install "llava[tables]"') from error
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    changed = 0
    for row in table:
        cells = []
        for value in row:
            cell = WriteOnlyCell(sheet)
            if isinstance(value, str):
                text = _NOT_IN_XLSX.sub(" ", value)[:_MOST_IN_XLSX]
                changed += text != value
                cell.value = text
                cell.data_type = "s"
            else:
                cell.value = value
            cells.append(cell)
        sheet.append(cells)
    with atomic_write(path, "wb") as stream:
        book.save(stream)
    return (f"{changed} cells were too long for .xlsx, or had control characters, and are changed",) if changed else ()


def note_empty_answers(answers: Sequence[AnswerLine]) -> tuple[str, ...]:
    """Return the note on error records, which a submission holds as empty answers."""
    return count_errors(answers, "are submitted empty")
