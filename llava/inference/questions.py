"""Files of questions: `{question_id, image, text}` per line, checked as a whole before any work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.data.table import BadRows, TableError


@dataclass(frozen=True)
class Question:
    """One line of a question file.

    Attributes:
        question_id: number or text, unique in the file.
        text: as in the file.
        images: file names in the image folder; empty for a question without picture.
    """

    question_id: int | str
    text: str
    images: tuple[str, ...] = ()


def read_questions(path: str | Path) -> list[Question]:
    """Read a question file (JSON lines, UTF-8); empty lines are skipped, further keys are allowed.

    Raises:
        TableError: if the file is missing, or has lines that are no questions or repeat an id; the first 20 are listed.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise TableError(f"{path} can't be read ({error.strerror or error}); check --question-file") from error
    bad = BadRows(str(path))
    questions: list[Question] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            question = _parse(line)
        except ValueError as error:
            bad.add(number, str(error))
            continue
        first = line_of_id.setdefault(json.dumps(question.question_id), number)
        if first != number:
            bad.add(number, f"question_id {question.question_id!r} is already on line {first}")
        questions.append(question)
    bad.raise_if_any("Correct or remove these lines, then run again.")
    return questions


def digest_questions(questions: Sequence[Question]) -> str:
    """Return a short identity of questions: their ids, images and texts, in order."""
    rows = [(question.question_id, question.images, question.text) for question in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def split_chunk(questions: Sequence[Question], num_chunks: int, chunk_index: int) -> list[Question]:
    """Return one of `num_chunks` consecutive parts whose sizes differ by one at most; with many, some are empty.

    Raises:
        ValueError: if there is no such chunk.
    """
    if num_chunks < 1 or not 0 <= chunk_index < num_chunks:
        raise ValueError(f"chunk {chunk_index} of {num_chunks} does not exist; chunks are counted from 0")
    start, stop = (index * len(questions) // num_chunks for index in (chunk_index, chunk_index + 1))
    return list(questions[start:stop])


def _parse(line: bytes) -> Question:
    """Return the question of a line; the error says what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("the text is not UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"no valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("no JSON object with question_id, image and text")
    missing = [key for key in ("question_id", "text") if key not in record]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing")
    question_id, text = record["question_id"], record["text"]
    if isinstance(question_id, bool) or not isinstance(question_id, int | str):
        raise ValueError(f"question_id is {question_id!r}, not a whole number or a text")
    if not isinstance(text, str):
        raise ValueError(f"text is {text!r}, not a text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("text holds half of a surrogate pair, which is no character")
    return Question(question_id, text, _image_names(record.get("image")))


def _image_names(value: Any) -> tuple[str, ...]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"image is {value!r}, not a file name or a list of file names")
    return tuple(names)
