"""Rows of questions from Python (dictionaries, DataFrames) or a question file, and the same rows with answers."""

from __future__ import annotations

import argparse
import contextlib
import logging
import numbers
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.data.data_files import find_unused_flags
from llava.data.table.image_names import COCO_IMAGE_NAME, build_image_namer, is_id, needs_number
from llava.data.table.options import IMAGE_COLUMNS, TableOptions, given_table_flags, parse_table_values
from llava.data.table.read import Table, write_images
from llava.files.terminal_text import show, show_list
from llava.image_files.image_source import ImageSource
from llava.inference.batch.questions import Question, read_question_file
from llava.inference.image_cells import HeldImages, is_missing, read_cell

logger = logging.getLogger(__name__)

ADDED = ("answer", "probability", "error")
"""Columns of the answers."""
_QUESTION_COLUMNS = ("question", "text")
_OF_FILES = ("question_id_column", "delimiter", "encoding", "sheet")
"""Options that concern files alone."""
_SHOWN = 5  # of the rows with faults
_COLUMNS_SHOWN = 40


@dataclass(frozen=True)
class QuestionRows:
    """Rows and their questions.

    Attributes:
        rows: as dictionaries.
        questions: one per row, whose id is the row's number, from 0.
        frame: the DataFrame that the rows came in; None for other kinds.
        held: the images in the rows, by the names that the questions have for them.
        table: what a file's rows were made of, which may hold images; None for other kinds.
    """

    rows: list[dict[str, Any]]
    questions: list[Question]
    frame: Any = None
    held: Mapping[str, Any] = field(default_factory=dict)
    table: Table | None = None

    @contextlib.contextmanager
    def images(self, folder: str | os.PathLike[str]) -> Iterator[ImageSource]:
        """Give access to the images in the folder, in the rows, and in the table, which are extracted meanwhile."""
        if self.table is None or self.table.images is None:
            yield ImageSource(os.fspath(folder), self.held)
            return
        with tempfile.TemporaryDirectory(prefix="llava_images_") as extracted:
            write_images(self.table, extracted)
            yield ImageSource(os.fspath(folder), {name: Path(extracted, name) for name in self.table.images.digests})

    def with_columns(self, columns: Mapping[str, Sequence[Any]]) -> Any:
        """Return the rows with further columns, as a DataFrame if they came in one."""
        if self.frame is None:
            added = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            return [{**row, **answer} for row, answer in zip(self.rows, added, strict=True)]
        if hasattr(self.frame, "assign"):  # pandas
            return self.frame.assign(**columns)
        import polars

        types = {"answer": polars.String, "probability": polars.Float64, "error": polars.String}
        return self.frame.hstack(polars.DataFrame(dict(columns), schema_overrides=types))


def read_question_rows(
    source: Any, *, question_column: str | None = None, image_column: str | None = None, **options: str | None
) -> QuestionRows:
    """Read rows of questions.

    Args:
        source: dictionaries, a pandas or polars DataFrame, or the path of a question file.
        question_column: key of the question; None = "question", or "text" where the rows lack it.
        image_column: key of the images; None = as in a table.
        options: the other flags of tables, by their names; None = not given.

    Raises:
        TypeError: if the source is of another kind.
        ValueError: if a row has no question or an image of another kind, or has a column of the answers already; if an
            option is wrong or has no effect; or if the question file can't be read (`TableError`).
    """
    values = {"question_column": question_column, "image_column": image_column, **options}
    parsed = parse_table_values(values)
    if isinstance(source, str | os.PathLike):
        return _read_file(os.fspath(source), parsed, values)
    unused = [name for name in _OF_FILES if values.get(name) is not None]
    if unused:
        raise ValueError(f"{', '.join(unused)} has no effect on rows from Python, only on a file's; leave it out")
    rows, frame = _dictionaries(source)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    taken = next((name for name in ADDED if name in columns), None)
    if taken:
        raise ValueError(f"the rows have a column {show(taken)} already, which the answers would replace; rename it")
    key = question_column or next((name for name in _QUESTION_COLUMNS if name in columns), _QUESTION_COLUMNS[0])
    images = _image_reader(_choose_image_column(rows, columns, image_column), parsed.image_name)
    questions, held, faults = [], HeldImages(), []
    for number, row in enumerate(rows):
        try:
            names = [one if isinstance(one, str) else held.name(one, number) for one in images(row)]
            questions.append(Question(number, _question(row, key), tuple(names)))
        except ValueError as error:
            faults.append(f"row {number}: {error}")
    if faults:
        more = f"\nand {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError("\n".join(faults[:_SHOWN]) + f"{more}\nfix these rows, or leave them out")
    return QuestionRows(rows, questions, frame, held.held)


def _read_file(path: str, options: TableOptions, values: Mapping[str, Any]) -> QuestionRows:
    if message := find_unused_flags(given_table_flags(argparse.Namespace(**values)), {"rows": path}):
        raise ValueError(message)
    found = read_question_file(path, options)
    for note in found.notes:
        logger.warning("%s", note)
    rows = [{"question_id": one.question_id, "image": list(one.images), "text": one.text} for one in found.questions]
    questions = [Question(number, one.text, one.images) for number, one in enumerate(found.questions)]
    return QuestionRows(rows, questions, table=found.table)


def _dictionaries(source: Any) -> tuple[list[dict[str, Any]], Any]:
    """Return rows as dictionaries, and the DataFrame that they came in."""
    if hasattr(source, "to_dicts"):  # polars
        return source.to_dicts(), source
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas
        return source.to_dict("records"), source
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        raise TypeError(
            f"rows are of type {type(source).__name__}; give a list of dictionaries, a DataFrame or a file's path"
        )
    rows = list(source)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {number} is of type {type(row).__name__}; give a dictionary for each question")
    return [dict(row) for row in rows], None


def _choose_image_column(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], given: str | None) -> str | None:
    """Return the column with the images as for a table: one that holds images wins; None if there is none."""
    if given is not None and given not in columns and rows:
        raise ValueError(f"no column {show(given)}; the rows have {show_list(columns, _COLUMNS_SHOWN)}")
    there = [given] if given is not None else [name for name in IMAGE_COLUMNS if name in columns]
    if rows and not there:
        logger.warning(
            "the rows have no column %s: their questions are asked without images; image_column names another one",
            " or ".join(IMAGE_COLUMNS),
        )
    first = {name: next((row[name] for row in rows if not is_missing(row.get(name))), None) for name in there}
    holding = [name for name, cell in first.items() if not isinstance(cell, str | numbers.Number | None)]
    return next(iter([*holding, *there]), None)


def _image_reader(column: str | None, template: str | None) -> Callable[[Mapping[str, Any]], list[Any]]:
    """Return the function row -> names, contents and objects of its images; numbers are ids, as in a table."""
    name_image = build_image_namer(template or COCO_IMAGE_NAME)
    wants_number = needs_number(template or COCO_IMAGE_NAME)

    def read(row: Mapping[str, Any]) -> list[Any]:
        cell = row.get(column) if column is not None else None
        text = _as_id(cell)
        if text is None and template is not None and isinstance(cell, str):
            if wants_number:
                raise ValueError(f"{show(column)} is {show(cell)}, not a number, which image_name asks for")
            text = cell
        if text is not None:
            return [name_image(text)]
        try:
            return read_cell(cell)
        except ValueError as error:
            raise ValueError(f"{show(column)} is {error}") from error

    return read


def _as_id(cell: Any) -> str | None:
    """Return a cell that is the number of an image as text: 7, "7", and 7.0, as pandas stores numbers beside gaps."""
    is_whole = isinstance(cell, numbers.Integral) or (isinstance(cell, float) and cell.is_integer())
    text = str(int(cell)) if is_whole and not isinstance(cell, bool) else cell
    return text if isinstance(text, str) and is_id(text) else None


def _question(row: Mapping[str, Any], key: str) -> str:
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        there = "" if key in row else f"; it has {', '.join(map(show, row))}"
        raise ValueError(f"{show(key)} is {show(text)}, not a question{there}")
    return text
