"""Read and check a CSV table of questions about images; the error lists its bad rows."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.json_rows import describe_other_format
from llava.files.home_directory import expand_home
from llava.files.regular_files import read_bytes
from llava.files.terminal_text import show, show_list

_ROWS_SHOWN = 20
_COLUMNS_SHOWN = 40
_LONGEST_ID = 18  # digits; keeps every id within 64 bits
_is_id = re.compile(f"[0-9]{{1,{_LONGEST_ID}}}").fullmatch
_LINE_END = re.compile(r"\r\n|\n|\r")
_FIELD = re.compile(r'("[^"]*(?:""[^"]*)*"|(?!")[^,\r\n]*)(?:,|\r\n|\n|\r)')  # well-formed, with what ends it


class TableError(ValueError):
    """A table, or a file of records, that cannot be used; the message says where and what to do about it."""


class Columns(NamedTuple):
    """Names of the columns that are read. `answer` is None for a table whose answers are not wanted."""

    image_id: str = "image_id"
    question: str = "question"
    question_id: str = "question_id"
    answer: str | None = "answer"


class TableRow(NamedTuple):
    """One question, its text exactly as in the file.

    `index` counts the rows from 0; `line` is the line of the file, counted from 1, on which the row begins; `answer` is
    "" where answers are not read; `extras` are the texts of the columns to keep, in the order they were asked for.
    """

    index: int
    line: int
    image_id: int
    question: str
    question_id: int
    answer: str
    extras: tuple[str, ...]


class BadRows:
    """Collects what is wrong with the lines of a file, for one message with a count and the first of them."""

    def __init__(self, source: str, unit: str = "line") -> None:
        """Start empty; the message names the file `source` and counts its rows in `unit`."""
        self.source = source
        self.unit = unit
        self._rows: list[tuple[int, str]] = []

    def add(self, number: int, problem: str) -> None:
        """Note one bad row by its line (or other unit), counted from 1."""
        self._rows.append((number, problem))

    def raise_if_any(self, way_out: str) -> None:
        """Raise `TableError` with the count, the first rows and `way_out`, unless nothing was noted.

        Raises:
            TableError: if a bad row was noted.
        """
        if not self._rows:
            return
        count = len(self._rows)
        shown = [f"  {self.unit} {number}: {problem}" for number, problem in sorted(self._rows)[:_ROWS_SHOWN]]
        hidden = [f"  and {count - _ROWS_SHOWN} more"] if count > _ROWS_SHOWN else []
        rows = "1 bad row" if count == 1 else f"{count} bad rows"
        raise TableError("\n".join([f"{self.source}: {rows}", *shown, *hidden, way_out]))


def read_table(
    path: str | os.PathLike[str],
    columns: Columns | None = None,
    keep: Sequence[str] = (),
    *,
    may_repeat_ids: bool = False,
) -> list[TableRow]:
    """Read a CSV file of questions.

    Args:
        path: CSV with a header, comma-separated, UTF-8 with or without a byte order mark.
        columns: names of the columns; None for `image_id`, `question`, `question_id` and `answer`.
        keep: further columns whose texts go into `TableRow.extras`.
        may_repeat_ids: accept several rows with one question_id, as the annotations of TextVQA and MME have.

    Returns:
        The rows in the order of the file. Text stays text: "n/a", "null" and spaces are kept.

    Raises:
        TableError: if the file is missing, is not such a table, or has bad rows (all are counted, the first 20 listed).
    """
    columns, name = columns or Columns(), os.fspath(path)
    text = _decode(_read_bytes(path), name)
    reader = _csv_reader(text)
    header = _read_header(reader, name)
    wanted = [_column_index(header, name, column, flag) for flag, column in _wanted_columns(columns, keep)]
    bad = BadRows(name)
    rows = list(_good_rows(reader, text, header, wanted, columns, bad, may_repeat_ids=may_repeat_ids))
    bad.raise_if_any("Correct or remove these rows in the table, then run again.")
    if not rows:
        raise TableError(f"{name}: the table has a header but no rows; fill it or choose another file")
    return rows


def read_table_header(path: str | os.PathLike[str]) -> list[str]:
    """Return the column names of a CSV file.

    Raises:
        TableError: if the file is missing, empty, or not UTF-8.
    """
    name = os.fspath(path)
    return _read_header(_csv_reader(_decode(_read_bytes(path), name)), name)


def _good_rows(
    reader: csv.reader,
    text: str,
    header: list[str],
    wanted: Sequence[int],
    columns: Columns,
    bad: BadRows,
    *,
    may_repeat_ids: bool,
) -> Iterator[TableRow]:
    """Yield the good rows of a table and collect the bad ones; `wanted` are the columns' places in the header."""
    image_at, question_at, question_id_at, *kept_at = wanted
    answer_at = None if columns.answer is None else kept_at.pop(0)
    index = 0
    line_of_id: dict[int, int] = {}
    has_placeholder = DEFAULT_IMAGE_TOKEN in text
    for line, fields in _numbered_rows(reader, text, bad):
        if len(fields) != len(header):
            bad.add(line, _width_problem(fields, header))
            continue
        image_id, question, question_id = fields[image_at], fields[question_at], fields[question_id_at]
        answer = "" if answer_at is None else fields[answer_at]
        is_good = (
            _is_id(image_id) and _is_id(question_id) and question.strip() and (answer.strip() or answer_at is None)
        )
        if not is_good or has_placeholder:  # only then is a row looked at closely: most are good, and time counts
            problems = _row_problems(image_id, question, question_id, None if answer_at is None else answer, columns)
            if problems:
                bad.add(line, "; ".join(problems))
                continue
        number = int(question_id)
        first_line = line_of_id.setdefault(number, line)
        if first_line != line and not may_repeat_ids:
            bad.add(line, f"{columns.question_id} {number} is already on line {first_line}")
            continue
        extras = tuple([fields[at] for at in kept_at]) if kept_at else ()
        yield TableRow(index, line, int(image_id), question, number, answer, extras)
        index += 1


def _read_bytes(path: str | os.PathLike[str]) -> bytes:
    try:
        return read_bytes(expand_home(path))
    except FileNotFoundError as error:
        raise TableError(f"{path}: no such file; give the path of the table") from error
    except OSError as error:
        raise TableError(f"{path}: cannot be read ({error.strerror}); give the path of a readable CSV file") from error


def _decode(content: bytes, name: str) -> str:
    if (kind := describe_other_format(content)) is not None:
        raise TableError(f"{name}: not a CSV table, but {kind}")
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content
    encoding = "UTF-16" if is_utf16 else "WINDOWS-1252"
    way_out = (
        "save the table as 'CSV UTF-8', or convert it if you know its encoding, "
        f"for example: iconv -f {encoding} -t UTF-8 table.csv > table-utf8.csv"
    )
    try:
        text = content[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
        where = f"byte 0x{content[offset]:02x} at offset {offset} (line {content.count(10, 0, offset) + 1})"
        raise TableError(f"{name}: not UTF-8: {where}; {way_out}") from error
    if (nul := content.find(b"\0")) >= 0:
        where = f"zero byte at offset {nul} (line {content.count(10, 0, nul) + 1})"
        raise TableError(f"{name}: not UTF-8 text: {where}; {way_out}")
    return text


def _csv_reader(text: str) -> csv.reader:
    # decoded piece by piece: a StringIO of the whole text takes 4 bytes for every character
    return csv.reader(io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8", newline=""), strict=True)


def _read_header(reader: Iterator[list[str]], name: str) -> list[str]:
    try:
        header = next((fields for fields in reader if fields), None)
    except csv.Error as error:
        raise TableError(f"{name}: the header has an unbalanced quote ({error}); correct its quotes") from error
    if header is None:
        raise TableError(f"{name}: the file is empty; a table needs a header and rows")
    return header


def _wanted_columns(columns: Columns, keep: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of the flag that chooses a column and the column's name, those to keep last."""
    named = [(f"--{field}_column", name) for field, name in columns._asdict().items() if name is not None]
    return named + [("--keep", name) for name in keep]


def _column_index(header: list[str], name: str, column: str, flag: str) -> int:
    if header.count(column) == 1:
        return header.index(column)
    if column in header:
        raise TableError(
            f"{name}: {header.count(column)} columns are called {column!r}; rename one, or choose with {flag}"
        )
    if re.match(r"\s*[\[{]", header[0]):
        raise TableError(f"{name}: not a CSV table, but JSON; export the table as CSV, with the columns' names first")
    found = show_list(header, _COLUMNS_SHOWN)
    separator = next((mark for mark in (";", "\t") if len(header) == 1 and mark in header[0]), None)
    way_out = f"name the right one with {flag}"
    if separator is not None:
        way_out = f"the table looks separated by {separator!r}: save it with commas"
    raise TableError(f"{name}: no column {column!r}; the header has {found}; {way_out}")


def _numbered_rows(reader: csv.reader, text: str, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    """Yield each row with the line on which it begins; empty lines are no rows, unbalanced quotes end the reading."""
    line = reader.line_num + 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        opened = _malformed_field_line(text, line)
        bad.add(
            opened,
            f"unbalanced quote: the quoted field that begins here is not closed properly ({error}, line "
            f'{reader.line_num}); a quote inside a quoted field is written twice (""); later rows were not read',
        )


def _malformed_field_line(text: str, row_line: int) -> int:
    """Line on which the first malformed (or endless) field begins in the row that begins on `row_line`."""
    position = 0
    for _ in range(row_line - 1):
        position = _LINE_END.search(text, position).end()
    row_start = position
    while (field := _FIELD.match(text, position)) and len(field[1]) <= csv.field_size_limit():
        position = field.end()
    return row_line + len(_LINE_END.findall(text, row_start, position))


def _width_problem(fields: list[str], header: list[str]) -> str:
    way_out = "a comma inside a text needs quotes around the text" if len(fields) > len(header) else "fill the row up"
    return f"{len(fields)} fields where the header has {len(header)}; {way_out}"


def _row_problems(image_id: str, question: str, question_id: str, answer: str | None, columns: Columns) -> list[str]:
    """What is wrong with one row, as short sentences; an empty list for a good row."""
    problems = []
    for column, text in ((columns.image_id, image_id), (columns.question_id, question_id)):
        if not _is_id(text):
            problems.append(f"{column} {show(text)} is not a whole number of at most {_LONGEST_ID} digits")
    for column, text in ((columns.question, question), (columns.answer, answer)):
        if text is None:
            continue
        if not text.strip():
            problems.append(f"{column} is empty")
        if DEFAULT_IMAGE_TOKEN in text:
            problems.append(f"{column} contains {DEFAULT_IMAGE_TOKEN!r}, which would stand for a second image")
    return problems
