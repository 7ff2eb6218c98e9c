"""Read question files: `{question_id, image, text}` per line, validated as a whole before any work.

A question is identified by its line: `question_id` is copied to the answer and may repeat, as in TextVQA and MME.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.doctor.warnings import find_marks
from llava.data.foreign_records import IMAGE_KEYS_NOT_READ, RECORD_KEYS
from llava.data.json_rows import RowsFileError, UnreadableLine, read_rows_file
from llava.data.table.bad_rows import BadRows, TableError
from llava.files.home_directory import expand_home
from llava.files.terminal_text import show

logger = logging.getLogger(__name__)

_TABLE_WAY_OUT = (
    "convert it to questions: python task_data_preprocessing.py --mode infer --input {} --output questions.jsonl"
)
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


def read_questions(path: str | Path) -> list[Question]:
    """Read a question file; empty lines are skipped, further keys are allowed.

    The format is JSON Lines in UTF-8. A JSON list, objects over several lines and UTF-16 are read too, and logged.

    Raises:
        TableError: if the file is missing, has another format, or has lines that are not questions; the first 20 are
            listed.
    """
    known_images: dict[tuple[str, ...], tuple[str, ...]] = {}

    def convert(row: Any) -> Question | ValueError:
        try:
            question = _parse(row)
        except ValueError as error:
            return error
        return question._replace(images=known_images.setdefault(question.images, question.images))

    try:
        found = read_rows_file(
            Path(expand_home(path)),
            row_keys=("question_id", "text", *RECORD_KEYS),
            table_way_out=_TABLE_WAY_OUT,
            is_lines=True,
            convert=convert,
        )
    except OSError as error:
        raise TableError(f"{path} can't be read ({error.strerror or error}); check --question-file") from error
    except RowsFileError as error:
        raise TableError(str(error)) from error
    for note in found.notes:
        logger.warning("%s", note)
    if not found.rows:
        logger.warning("%s has no questions", path)
    bad = BadRows(str(path), unit="line" if found.unit == "line" else "question")
    for number, row in zip(found.numbers, found.rows, strict=True):
        if isinstance(row, ValueError):
            bad.add(number, str(row).removeprefix(f"line {number} is "))
    bad.raise_if_any("Correct or remove these lines, then run again.")
    _note_marks(path, found.rows)
    return number_repeats(found.rows)


def _note_marks(path: str | Path, questions: Sequence[Question]) -> None:
    """Log texts that contain prompt syntax, once per kind; they are answered unchanged."""
    counts: Counter[str] = Counter()
    first: dict[str, tuple[Question, str]] = {}
    for question in questions:
        for code, message in find_marks(question.text):
            counts[code] += 1
            first.setdefault(code, (question, message))
    for code, count in counts.items():
        question, message = first[code]
        logger.warning(
            "%s: %d questions contain prompt syntax and are answered unchanged (%s): question_id %s holds %s",
            *(path, count, code, show(question.question_id), message),
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
