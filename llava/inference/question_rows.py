"""Rows of questions from Python (dictionaries, DataFrames) or a question file, and the same rows with answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.files.terminal_text import show
from llava.inference.batch.questions import Question, read_questions

ADDED = ("answer", "probability", "error")
"""Columns of the answers."""
_QUESTION_COLUMNS = ("question", "text")
_SHOWN = 5  # of the rows with faults


@dataclass(frozen=True)
class QuestionRows:
    """Rows and their questions.

    Attributes:
        rows: as dictionaries.
        questions: one per row, whose id is the row's number, from 0.
        frame: the DataFrame that the rows came in; None for other kinds.
    """

    rows: list[dict[str, Any]]
    questions: list[Question]
    frame: Any = None

    def with_columns(self, columns: Mapping[str, Sequence[Any]]) -> Any:
        """Return the rows with further columns, as a DataFrame if they came in one."""
        if self.frame is None:
            added = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            return [{**row, **answer} for row, answer in zip(self.rows, added, strict=True)]
        if hasattr(self.frame, "assign"):  # pandas
            return self.frame.assign(**columns)
        return self.frame.hstack(type(self.frame)(dict(columns)))  # polars


def read_question_rows(source: Any, question_column: str | None = None, image_column: str = "image") -> QuestionRows:
    """Read rows of questions.

    Args:
        source: a list of dictionaries, a pandas or polars DataFrame, or the path of a question file.
        question_column: key of the question; None = "question", or "text" where the rows lack it.
        image_column: key of the image's name or a list of names; rows without it are questions without image.

    Raises:
        TypeError: if the source is of another kind.
        ValueError: if a row has no question, names no image file, or has a column of the answers already; or if the
            question file can't be read (`TableError`).
    """
    rows, frame = _dictionaries(source)
    taken = [name for name in ADDED if rows and name in rows[0]]
    if taken:
        raise ValueError(f"the rows have a column {show(taken[0])} already, which the answers would replace; rename it")
    key = question_column or next((name for name in _QUESTION_COLUMNS if rows and name in rows[0]), "question")
    questions, faults = [], []
    for number, row in enumerate(rows):
        try:
            questions.append(Question(number, _question(row, key), _image_names(row, image_column)))
        except ValueError as error:
            faults.append(f"row {number}: {error}")
    if faults:
        more = f"\nand {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError("\n".join(faults[:_SHOWN]) + f"{more}\nfix these rows, or leave them out")
    return QuestionRows(rows, questions, frame)


def _dictionaries(source: Any) -> tuple[list[dict[str, Any]], Any]:
    """Return rows as dictionaries, and the DataFrame that they came in."""
    if isinstance(source, str | os.PathLike):
        found = read_questions(os.fspath(source))
        return [{"question_id": q.question_id, "image": list(q.images), "text": q.text} for q in found], None
    if hasattr(source, "to_dicts"):  # polars
        return source.to_dicts(), source
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas
        return source.to_dict("records"), source
    if isinstance(source, Sequence) and all(isinstance(row, Mapping) for row in source):
        return [dict(row) for row in source], None
    raise TypeError(f"rows are {type(source).__name__}; give a list of dictionaries, a DataFrame or a file's path")


def _question(row: Mapping[str, Any], key: str) -> str:
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        there = "" if key in row else f"; it has {', '.join(map(show, row))}"
        raise ValueError(f"{show(key)} is {show(text)}, not a question{there}")
    return text


def _image_names(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = row.get(key)
    if value is None or value != value:  # NaN: a missing value in pandas
        return ()
    names = [value] if isinstance(value, str | os.PathLike) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str | os.PathLike) for name in names):
        raise ValueError(f"{show(key)} is of type {type(value).__name__}, not a file name or a list of file names")
    return tuple(os.fspath(name) for name in names)
