"""Read and check a table of questions about images; the error lists its bad rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.table.answers import join_answers, most_frequent
from llava.data.table.bad_rows import BadRows, TableError
from llava.data.table.columns import Columns, choose_columns
from llava.data.table.embedded_images import EmbeddedImages, name_embedded_images
from llava.data.table.grid import Grid, Problems
from llava.data.table.image_names import LONGEST_ID, NamedImages, is_id, is_plain_id, name_images
from llava.data.table.open_grid import open_grid
from llava.data.table.options import TableOptions
from llava.data.table.question_ids import canonical_id, find_repeats
from llava.files.terminal_text import show

_WAY_OUT = "Correct or remove these rows in the table, then run again."


class Table(NamedTuple):
    """A table that was read.

    Attributes:
        rows: its rows, in order.
        notes: what was found out about it and must be said, in sentences.
        unit: what `TableRow.line` counts, "line" or "row".
        images: the images that the table itself holds, for `write_images`; None where it names files.
    """

    rows: list[TableRow]
    notes: list[str]
    unit: str = "line"
    images: EmbeddedImages | None = None


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


def read_table(
    path: str | os.PathLike[str], options: TableOptions | None = None, *, may_repeat_ids: bool = False
) -> Table:
    """Read a table of questions.

    Args:
        path: of the table; its ending says which kind of file it is.
        options: how it is read; None = all is found out.
        may_repeat_ids: accept several rows with one question_id, as the annotations of TextVQA and MME have.

    Returns:
        The rows in the order of the table, and what must be said. Text stays text: "n/a", "null" and spaces are kept.

    Raises:
        TableError: if the file is missing, is not such a table, or has bad rows (all are counted, the first 20 listed).
    """
    options, name = options or TableOptions(), os.fspath(path)
    bad = BadRows(name)
    grid = open_grid(path, options, bad)
    bad.unit = grid.unit
    columns, said = choose_columns(grid.header, options, name, grid.image_columns)
    notes = grid.notes  # a column that is read may add to them
    notes += said
    if not grid.lines:
        bad.raise_if_any(_WAY_OUT)
        raise TableError(f"{name}: the table has a header but no rows; fill it or choose another file")
    problems = Problems(list)
    rows, images = _read_rows(grid, columns, options, name, problems, notes, may_repeat_ids=may_repeat_ids)
    for row, texts in problems.items():
        bad.add(grid.lines[row], "; ".join(texts))
    empty = any("empty" in text for texts in problems.values() for text in texts)
    bad.raise_if_any(f"{grid.empty_hint}\n{_WAY_OUT}" if empty and grid.empty_hint else _WAY_OUT)
    return Table(rows, list(dict.fromkeys(notes)), grid.unit, images)


def read_header(path: str | os.PathLike[str], options: TableOptions | None = None) -> list[str]:
    """Return the column names of a table.

    Raises:
        TableError: if the file is missing, empty, or can't be read.
    """
    return open_grid(path, options or TableOptions(), BadRows(os.fspath(path))).header


def write_images(table: Table, folder: str | os.PathLike[str]) -> list[str]:
    """Write the images that a table holds into the image folder, each once; return what must be said.

    A table that names files holds no images: nothing is written then.

    Raises:
        TableError: if the folder has another file of the same name; nothing is written then.
        OSError: if an image can't be written; those written before are complete.
    """
    return [] if table.images is None else table.images.write(Path(folder))


def _read_rows(
    grid: Grid,
    columns: Columns,
    options: TableOptions,
    source: str,
    problems: Problems,
    notes: list[str],
    *,
    may_repeat_ids: bool,
) -> tuple[list[TableRow], EmbeddedImages | None]:
    """Return the rows and the table's own images; add to `problems` and `notes`."""
    header = grid.header

    def read(number: int) -> list[str]:
        return grid.read_column(number, problems)

    named, images = _name_images(grid, columns.image, options, source, problems)
    ids, said = range(len(grid.lines)), []
    if columns.question_id is not None:
        ids, said = _read_ids(read(columns.question_id), header[columns.question_id], problems)
    notes += named.notes + said
    questions = read(columns.question)
    _check_filled(questions, header[columns.question], problems)
    has_placeholder = grid.may_contain(DEFAULT_IMAGE_TOKEN)
    if has_placeholder:
        _check_placeholders(questions, header[columns.question], problems)
    answers = [()] * len(questions)
    if columns.answers:
        names = [header[number] for number in columns.answers]
        cells = [read(number) for number in columns.answers]
        answers, said = join_answers(cells, names, problems, may_be_lists=grid.may_contain("["))
        notes += said
        if has_placeholder:
            _check_placeholders(list(map("\n".join, answers)), " or ".join(names), problems)
    if columns.question_id is not None and not may_repeat_ids:
        _check_unique(ids, grid, header[columns.question_id], problems)
    kept = [read(number) for number in columns.keep]
    extras = zip(*kept, strict=True) if kept else repeat(())
    numbers, texts = range(len(questions)), map(most_frequent, answers)
    parts = (numbers, grid.lines, named.ids, named.names, questions, ids, texts, answers, extras)
    return list(map(TableRow, *parts)), images


def _name_images(
    grid: Grid, number: int, options: TableOptions, source: str, problems: Problems
) -> tuple[NamedImages, EmbeddedImages | None]:
    """Return the image of each row, and the images that the column itself holds."""
    column, template = grid.header[number], options.image_name
    if number not in grid.image_columns:
        return name_images(grid.read_column(number, problems), column, template, problems, source), None
    if template is not None:
        raise TableError(f"{source}: {column} holds images, on which --image_name has no effect; leave it out")
    images = name_embedded_images(grid.image_columns[number], column, grid.lines, problems)
    return NamedImages(images.names, images.names, images.notes), images


def _read_ids(texts: Sequence[str], column: str, problems: Problems) -> tuple[Sequence[int | str], list[str]]:
    """Return ids and what must be said of them: numbers if most of them are, the others being bad; else texts.

    Ids with leading zeros are texts: as numbers they could not be found again in the table.
    """
    if all(map(is_plain_id, texts)):
        return list(map(int, texts)), []
    is_numeric = 2 * sum(map(bool, map(is_id, texts))) >= sum(map(bool, texts))
    for row, text in enumerate(texts):
        if is_numeric and not is_id(text):
            problems[row].append(f"{column} {show(text)} is not a whole number of at most {LONGEST_ID} digits")
        elif not text.strip():
            problems[row].append(f"{column} is empty")
    reason = "has leading zeros" if is_numeric else f"holds texts ({show(texts[0])})"
    return texts, [f"{column} {reason}: ids are kept as texts"]


def _check_unique(ids: Sequence[int | str], grid: Grid, column: str, problems: Problems) -> None:
    """Note rows whose id an earlier good row has; "7" and "007" are one id to whoever joins answers with the table."""
    if not problems and not isinstance(ids[0], str) and len(set(ids)) == len(ids):
        return
    good = [row for row in range(len(ids)) if row not in problems]
    for place, first in find_repeats(ids[row] for row in good):
        key, line = canonical_id(ids[good[place]]), grid.lines[good[first]]
        problems[good[place]].append(f"{column} {key} is already on {grid.unit} {line}")


def _check_filled(texts: Sequence[str], column: str, problems: Problems) -> None:
    if not all(map(str.strip, texts)):
        for row, text in enumerate(texts):
            if not text.strip():
                problems[row].append(f"{column} is empty")


def _check_placeholders(texts: Sequence[str], column: str, problems: Problems) -> None:
    for row, text in enumerate(texts):
        if DEFAULT_IMAGE_TOKEN in text:
            problems[row].append(f"{column} contains {DEFAULT_IMAGE_TOKEN!r}, which would stand for a second image")
