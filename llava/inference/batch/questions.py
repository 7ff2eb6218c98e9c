"""Read question files: `{question_id, image, text}` per line, validated as a whole before any work.

A question is identified by its line: `question_id` is copied to the answer and may repeat, as in TextVQA and MME.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.doctor.warnings import find_marks
from llava.data.foreign_records import IMAGE_KEYS_NOT_READ, RECORD_KEYS
from llava.data.json_rows import RowsFile, RowsFileError, UnreadableLine, read_rows_file
from llava.data.table.bad_rows import BadRows, TableError
from llava.data.table.open_grid import is_table
from llava.data.table.options import TableOptions
from llava.data.table.question_ids import note_repeats
from llava.data.table.read import Table, read_table
from llava.data.table.write import question as question_record
from llava.files.home_directory import expand_home
from llava.files.terminal_text import show

logger = logging.getLogger(__name__)

_KEYS_SHOWN = 6
_DIGESTED_AT_ONCE = 1_024


class Question(NamedTuple):
    """One line of a question file; a tuple, so that a million are read, compared and hashed in seconds.

    Attributes:
        question_id: number or text; may repeat.
        text: as in the file.
        images: file names in the image folder; empty for a question without image.
        repeat: number of earlier lines with the same id, text and images, so that no two questions of a file are equal.
    """

    question_id: int | str
    text: str
    images: tuple[str, ...] = ()
    repeat: int = 0

    @property
    def request_id(self) -> list[Any]:
        """JSON value that no other question of the file has; decides the draws, independently of order and ranks."""
        content = [self.question_id, self.images, self.text]
        return [*content, self.repeat] if self.repeat else content


class QuestionFile(NamedTuple):
    """Questions of a file.

    Attributes:
        questions: in order.
        notes: what a user should know of how they were read, in words.
        table: what they were made of, which may hold images; None for JSON.
    """

    questions: list[Question]
    notes: list[str]
    table: Table | None = None


def read_questions(path: str | Path, options: TableOptions | None = None) -> list[Question]:
    """Read a question file as `read_question_file` does, and log its notes."""
    found = read_question_file(path, options)
    for note in found.notes:
        logger.warning("%s", note)
    return found.questions


def read_question_file(
    path: str | Path, options: TableOptions | None = None, *, unique_ids: bool = False
) -> QuestionFile:
    """Read a question file: JSON Lines, or a table, whose answers are not read.

    Empty lines are skipped, further keys and columns are allowed. A JSON list, objects over several lines and UTF-16
    are read too, and noted.

    Args:
        path: of the file.
        options: columns and format of a table.
        unique_ids: refuse a file in which a question_id repeats.

    Raises:
        TableError: if the file is missing, has another format, or has lines that are not questions or may not repeat an
            id; the first 20 are listed.
    """
    options = dataclasses.replace(options or TableOptions(), answer=None, has_answers=False)
    table = read_table(path, options, may_repeat_ids=True) if is_table(path) else None
    found = _read_json(path) if table is None else _convert(table, path)
    notes = [*found.notes, *([] if found.rows else [f"{path} has no questions"])]
    bad = BadRows(str(path), unit="question" if table is None and found.unit == "row" else found.unit)
    for number, row in zip(found.numbers, found.rows, strict=True):
        if isinstance(row, ValueError):
            bad.add(number, str(row).removeprefix(f"line {number} is "))
    bad.raise_if_any("Correct or remove these lines, then run again.")
    if unique_ids:
        note_repeats(bad, found.numbers, [question.question_id for question in found.rows])
        bad.raise_if_any("Give each question an id of its own, or leave --unique-ids out.")
    return QuestionFile(number_repeats(found.rows), [*notes, *_describe_marks(path, found.rows)], table)


def _convert(table: Table, path: str | Path) -> RowsFile:
    convert = _build_converter()
    rows = [convert(question_record(row)) for row in table.rows]
    return RowsFile(rows, [row.line for row in table.rows], table.unit, [f"{path}: {note}" for note in table.notes])


def _read_json(path: str | Path) -> RowsFile:
    try:
        return read_rows_file(
            Path(expand_home(path)),
            row_keys=("question_id", "text", *RECORD_KEYS),
            is_lines=True,
            convert=_build_converter(),
        )
    except OSError as error:
        raise TableError(f"{path} can't be read ({error.strerror or error}); check --question-file") from error
    except RowsFileError as error:
        raise TableError(str(error)) from error


def _build_converter() -> Callable[[Any], Question | ValueError]:
    """Return the function JSON value -> question, or what is wrong with it; questions share equal tuples of images."""
    known_images: dict[tuple[str, ...], tuple[str, ...]] = {}

    def convert(row: Any) -> Question | ValueError:
        try:
            question = _parse(row)
        except ValueError as error:
            return error
        return question._replace(images=known_images.setdefault(question.images, question.images))

    return convert


def _describe_marks(path: str | Path, questions: Sequence[Question]) -> Iterator[str]:
    """Yield one sentence for each kind of prompt syntax in questions; they are answered unchanged."""
    counts: Counter[str] = Counter()
    first: dict[str, tuple[Question, str]] = {}
    for question in questions:
        for code, message in find_marks(question.text):
            counts[code] += 1
            first.setdefault(code, (question, message))
    for code, count in counts.items():
        question, message = first[code]
        yield (
            f"{path}: {count} questions contain prompt syntax and are answered unchanged ({code}): question_id "
            f"{show(question.question_id)} holds {message}"
        )


def number_repeats(questions: Iterable[Question]) -> list[Question]:
    """Set `repeat` to the number of earlier questions with the same content, so that no two are equal."""
    firsts = [question._replace(repeat=0) if question.repeat else question for question in questions]
    if len(set(firsts)) == len(firsts):
        return firsts
    seen: Counter[Question] = Counter()
    numbered = []
    for first in firsts:
        numbered.append(first._replace(repeat=seen[first]) if seen[first] else first)
        seen[first] += 1
    return numbered


def digest_questions(questions: Sequence[Question]) -> str:
    """Return a fingerprint of questions: a hash of their ids, images and texts, in order, as one JSON list."""
    digest = hashlib.sha256(b"[")
    for start in range(0, len(questions), _DIGESTED_AT_ONCE):
        part = questions[start : start + _DIGESTED_AT_ONCE]
        rows = json.dumps([(question.question_id, question.images, question.text) for question in part])
        digest.update((", " if start else "").encode() + rows[1:-1].encode())
    digest.update(b"]")
    return digest.hexdigest()[:32]


def split_chunk(questions: Sequence[Question], num_chunks: int, chunk_index: int) -> list[Question]:
    """Return one of `num_chunks` consecutive chunks whose sizes differ by at most one; they may be empty.

    Raises:
        ValueError: if there is no such chunk.
    """
    if num_chunks < 1 or not 0 <= chunk_index < num_chunks:
        raise ValueError(f"chunk {chunk_index} of {num_chunks} does not exist; chunks are counted from 0")
    start, stop = (index * len(questions) // num_chunks for index in (chunk_index, chunk_index + 1))
    return list(questions[start:stop])


def _parse(record: Any) -> Question:
    """Parse a JSON object into a question; the error says what is wrong with it."""
    if isinstance(record, UnreadableLine):
        raise ValueError(record.message)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object with question_id, image and text")
    missing = [key for key in ("question_id", "text") if key not in record]
    if missing:
        others = [key for key in record if key not in ("question_id", "text", "image")]
        there = f"; it has {', '.join(map(show, others[:_KEYS_SHOWN]))}" if others else ""
        is_dialogue = any(key in record for key in RECORD_KEYS)
        hint = ", a training record; a question is {question_id, image, text}" if is_dialogue else ""
        raise ValueError(f"{' and '.join(missing)} missing{there}{hint}")
    question_id, text = record["question_id"], record["text"]
    if isinstance(question_id, bool) or not isinstance(question_id, int | str):
        raise ValueError(f"question_id is {show(question_id)}, not a whole number or a text")
    if not isinstance(text, str):
        raise ValueError(f"text is {show(text)}, not a text")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("text holds half of a surrogate pair, which is not a character")
    return Question(question_id, text, _image_names(record))


def _image_names(record: dict[str, Any]) -> tuple[str, ...]:
    key = "image" if "image" in record or "images" not in record else "images"
    value = record.get(key)
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key} is {show(value)}, not a file name or a list of file names")
    ignored = next((other for other in IMAGE_KEYS_NOT_READ if record.get(other)), None)
    if key not in record and ignored is not None:
        raise ValueError(f"it has {ignored!r} and no 'image'; name the file under 'image', or null for text alone")
    return tuple(names)
