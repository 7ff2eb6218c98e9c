"""Read and check a CSV table of questions about images; the error lists its bad rows."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.json_rows import TABLE_SUFFIXES, describe_other_format
from llava.data.table.bad_rows import BadRows, TableError
from llava.data.table.image_names import COCO_IMAGE_NAME, LONGEST_ID, build_image_namer, is_id
from llava.data.table.options import ANSWER_COLUMNS, IMAGE_COLUMNS, QUESTION_ID_COLUMN, TableOptions
from llava.files.home_directory import expand_home
from llava.files.regular_files import read_bytes
from llava.files.terminal_text import show, show_list

_COLUMNS_SHOWN = 40
_LINE_END = re.compile(r"\r\n|\n|\r")
_FIELD = re.compile(r'("[^"]*(?:""[^"]*)*"|(?!")[^,\r\n]*)(?:,|\r\n|\n|\r)')  # well-formed, with what ends it


class Table(NamedTuple):
    """A table that was read.

    Attributes:
        rows: its rows, in order.
        notes: what was found out about it and must be said, in sentences.
        unit: what `TableRow.line` counts, "line" or "row".
    """

    rows: list[TableRow]
    notes: list[str]
    unit: str = "line"


class TableRow(NamedTuple):
    """One question, its text exactly as in the table.

    Attributes:
        index: number of the row, from 0.
        line: line of the file on which the row begins, or row of the sheet, from 1.
        image_id: what tells images apart: the number of the image, or its file name.
        image: file name in the image folder, with / between folders.
        question: text.
        question_id: number or text; the row's number where the table has no ids.
        answer: the most frequent of `answers`, of equally frequent ones the first; "" where answers are not read.
        answers: all answers.
        extras: texts of the columns to keep, in the order they were asked for.
    """

    index: int
    line: int
    image_id: int | str
    image: str
    question: str
    question_id: int | str
    answer: str
    answers: tuple[str, ...]
    extras: tuple[str, ...]


def is_table(path: str | os.PathLike[str]) -> bool:
    """Return whether a path names a table: by its ending, or as a directory that `datasets` saved to disk."""
    path = Path(expand_home(path))
    return path.suffix.lower() in TABLE_SUFFIXES or any(
        (path / name).is_file() for name in ("state.json", "dataset_dict.json")
    )


def read_table(
    path: str | os.PathLike[str], options: TableOptions | None = None, *, may_repeat_ids: bool = False
) -> Table:
    """Read a table of questions.

    Args:
        path: of the table.
        options: how it is read; None = all is found out.
        may_repeat_ids: accept several rows with one question_id, as the annotations of TextVQA and MME have.

    Returns:
        The rows in the order of the table, and what must be said. Text stays text: "n/a", "null" and spaces are kept.

    Raises:
        TableError: if the file is missing, is not such a table, or has bad rows (all are counted, the first 20 listed).
    """
    options, name = options or TableOptions(), os.fspath(path)
    text = _decode(_read_bytes(path), name)
    reader = _csv_reader(text)
    header = _read_header(reader, name)
    options = _complete(options, header)
    wanted = [_column_index(header, name, column, flag) for flag, column in _wanted_columns(options)]
    bad = BadRows(name)
    rows = list(_good_rows(reader, text, header, wanted, options, bad, may_repeat_ids=may_repeat_ids))
    bad.raise_if_any("Correct or remove these rows in the table, then run again.")
    if not rows:
        raise TableError(f"{name}: the table has a header but no rows; fill it or choose another file")
    return Table(rows, [])


def read_header(path: str | os.PathLike[str], options: TableOptions | None = None) -> list[str]:
    """Return the column names of a table.

    Raises:
        TableError: if the file is missing, empty, or can't be read.
    """
    name = os.fspath(path)
    return _read_header(_csv_reader(_decode(_read_bytes(path), name)), name)


def write_images(table: Table, folder: str | os.PathLike[str]) -> list[str]:
    """Write the images that a table holds into the image folder, each once; return what must be said.

    A table that names files holds no images: nothing is written then.

    Raises:
        TableError: if the folder has another file of the same name.
    """
    return []


def _complete(options: TableOptions, header: Sequence[str]) -> TableOptions:
    def first(names: Sequence[str]) -> str:
        return next((name for name in names if name in header), names[0])

    return replace(
        options,
        image=options.image or first(IMAGE_COLUMNS),
        question_id=options.question_id or QUESTION_ID_COLUMN,
        answer=(options.answer or first(ANSWER_COLUMNS)) if options.has_answers else None,
    )


def _good_rows(
    reader: csv.reader,
    text: str,
    header: list[str],
    wanted: Sequence[int],
    options: TableOptions,
    bad: BadRows,
    *,
    may_repeat_ids: bool,
) -> Iterator[TableRow]:
    """Yield the good rows of a table and collect the bad ones; `wanted` are the columns' places in the header."""
    image_at, question_at, question_id_at, *kept_at = wanted
    answer_at = None if options.answer is None else kept_at.pop(0)
    index = 0
    line_of_id: dict[int, int] = {}
    has_placeholder = DEFAULT_IMAGE_TOKEN in text
    name_image = cache(build_image_namer(options.image_name or COCO_IMAGE_NAME))
    for line, fields in _numbered_rows(reader, text, bad):
        if len(fields) != len(header):
            bad.add(line, _width_problem(fields, header))
            continue
        image_id, question, question_id = fields[image_at], fields[question_at], fields[question_id_at]
        answer = "" if answer_at is None else fields[answer_at]
        is_good = is_id(image_id) and is_id(question_id) and question.strip() and (answer.strip() or answer_at is None)
        if not is_good or has_placeholder:  # only then is a row looked at closely: most are good, and time counts
            problems = _row_problems(image_id, question, question_id, None if answer_at is None else answer, options)
            if problems:
                bad.add(line, "; ".join(problems))
                continue
        number = int(question_id)
        first_line = line_of_id.setdefault(number, line)
        if first_line != line and not may_repeat_ids:
            bad.add(line, f"{options.question_id} {number} is already on line {first_line}")
            continue
        extras = tuple([fields[at] for at in kept_at]) if kept_at else ()
        answers = () if answer_at is None else (answer,)
        yield TableRow(index, line, int(image_id), name_image(image_id), question, number, answer, answers, extras)
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


def _wanted_columns(options: TableOptions) -> list[tuple[str, str]]:
    """Pairs of the flag that chooses a column and the column's name, those to keep last."""
    named = [(f"--{field}_column", getattr(options, field)) for field in ("image", "question", "question_id", "answer")]
    named = [(flag, name[0] if isinstance(name, tuple) else name) for flag, name in named if name is not None]
    return named + [("--keep", name) for name in options.keep]


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


def _row_problems(
    image_id: str, question: str, question_id: str, answer: str | None, options: TableOptions
) -> list[str]:
    """What is wrong with one row, as short sentences; an empty list for a good row."""
    problems = []
    for column, text in ((options.image, image_id), (options.question_id, question_id)):
        if not is_id(text):
            problems.append(f"{column} {show(text)} is not a whole number of at most {LONGEST_ID} digits")
    for column, text in ((options.question, question), (options.answer, answer)):
        if text is None:
            continue
        if not text.strip():
            problems.append(f"{column} is empty")
        if DEFAULT_IMAGE_TOKEN in text:
            problems.append(f"{column} contains {DEFAULT_IMAGE_TOKEN!r}, which would stand for a second image")
    return problems
