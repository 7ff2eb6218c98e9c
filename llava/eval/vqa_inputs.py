"""Reads what scoring compares: the answers of a model, and the true answers with the kind of each question."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.table import BadRows, Columns, TableError, read_table, read_table_header
from llava.eval.calibration import find_confidence_problem

QuestionId = int | str

ANSWER_COUNTS = (1, 10)
"""True answers per question: one, or VQAv2's ten."""

ALL_QUESTIONS = "all questions"
OTHER_KIND = "other"
_KIND_KEYS = ("kind", "question_type")
_TYPE_KEY = "answer_type"
_IMAGE_KEYS = ("image_id", "image")
_RARE_SHARE = 0.01


class References(NamedTuple):
    """The true answers of every question, and its kind.

    `types` has the answer types that the annotations name, and `images` what they say about the image; questions of
    which they say nothing are absent.
    """

    answers: dict[QuestionId, tuple[str, ...]]
    kinds: dict[QuestionId, str]
    types: dict[QuestionId, str]
    images: dict[QuestionId, str]


class GivenAnswer(NamedTuple):
    """A line of an answer file: the text (None after an error), the error's code, and what is noted about it."""

    text: str | None
    error: str | None
    metadata: dict[str, Any]


def read_answers(path: str | os.PathLike[str]) -> dict[QuestionId, GivenAnswer]:
    """Read an answer file, one JSON object `{question_id, text, metadata, …}` per line.

    Args:
        path: the file that batch inference wrote.

    Returns:
        question_id -> answer.

    Raises:
        TableError: if the file is missing or has bad or duplicate lines (all are counted, the first 20 listed).
    """
    bad = BadRows(os.fspath(path))
    answers: dict[QuestionId, GivenAnswer] = {}
    for line, record in _read_json_lines(path, bad):
        question_id = _checked_id(record, line, answers, bad)
        if question_id is None:
            continue
        text, error, metadata = record.get("text"), record.get("error"), record.get("metadata") or {}
        if not isinstance(text, str) and not error:
            bad.add(line, "no 'text' with the answer")
        if not isinstance(metadata, dict):
            bad.add(line, f"'metadata' is {metadata!r}, not an object {{…}}")
        elif problem := find_confidence_problem(metadata):
            bad.add(line, problem)
        answers[question_id] = GivenAnswer(None if error else text, str(error) if error else None, metadata)
    bad.raise_if_any("Correct these lines, or write the answers again.")
    if not answers:
        raise TableError(f"{path}: the file is empty; write the answers first")
    return answers


def read_predictions(path: str | os.PathLike[str]) -> dict[QuestionId, str | None]:
    """Return only the texts of an answer file, None where inference left an error record.

    Raises:
        TableError: as in `read_answers`.
    """
    return {question_id: answer.text for question_id, answer in read_answers(path).items()}


def read_references(
    path: str | os.PathLike[str], columns: Columns | None = None, kind_key: str | None = None
) -> References:
    """Read the true answers from a table (.csv), from lines (.jsonl) or from VQAv2's annotations (.json).

    Args:
        path: a table of questions with answers; lines `{question_id, answer}` or `{question_id, answers: […]}`; or
            `{"annotations": [{question_id, answers: [{"answer": …} x 10], …}]}`.
        columns: names of the table's columns, for .csv only.
        kind_key: column or key with the kind of a question; None for `kind`, else `question_type`, else the question's
            first two words, rare ones (below 1 %) together as "other".

    Returns:
        Answers, kinds, answer types (column or key `answer_type`) and images (`image_id`, else `image`) by question_id.

    Raises:
        TableError: if the file cannot be used (all bad rows are counted, the first 20 listed).
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        return _read_reference_table(path, columns or Columns(), kind_key)
    bad = BadRows(os.fspath(path), unit="line" if suffix == ".jsonl" else "annotation")
    if suffix == ".jsonl":
        records = list(_read_json_lines(path, bad))
    elif suffix == ".json":
        records = _read_annotations(path)
    else:
        raise TableError(f"{path}: the name ends in {suffix!r}; annotations are .csv, .jsonl or .json files")
    return _collect_references(records, bad, kind_key)


def derive_kinds(questions: Mapping[QuestionId, str]) -> dict[QuestionId, str]:
    """Return question_id -> the question's first two words in lower case, rare ones (below 1 %) together as "other"."""
    starts = {question_id: " ".join(text.lower().split()[:2]) for question_id, text in questions.items()}
    counts = Counter(starts.values())
    least = _RARE_SHARE * len(starts)
    return {question_id: start if counts[start] >= least else OTHER_KIND for question_id, start in starts.items()}


def canonical_id(question_id: QuestionId) -> QuestionId:
    """Return the form in which ids are compared: a text of digits is a number."""
    if isinstance(question_id, str) and question_id.isascii() and question_id.isdigit():
        return int(question_id)
    return question_id


def _read_reference_table(path: str | os.PathLike[str], columns: Columns, kind_key: str | None) -> References:
    header = read_table_header(path)
    if kind_key is None:
        kind_key = next((key for key in _KIND_KEYS if key in header), None)
    elif kind_key not in header:
        found = ", ".join(map(repr, header))
        raise TableError(f"{path}: no column {kind_key!r}; the header has {found}; name another with --kind-key")
    type_key = _TYPE_KEY if _TYPE_KEY in header else None
    rows = read_table(path, columns, keep=[key for key in (type_key, kind_key) if key is not None])
    answers = {row.question_id: (row.answer,) for row in rows}
    kinds = (
        derive_kinds({row.question_id: row.question for row in rows})
        if kind_key is None
        else {row.question_id: row.extras[-1] for row in rows}
    )
    types = {row.question_id: row.extras[0] for row in rows if type_key is not None and row.extras[0]}
    return References(answers, kinds, types, {row.question_id: str(row.image_id) for row in rows})


def _collect_references(
    records: Sequence[tuple[int, dict[str, Any]]], bad: BadRows, kind_key: str | None
) -> References:
    if kind_key is None and records:
        kind_key = next((key for key in _KIND_KEYS if key in records[0][1]), None)
    answers: dict[QuestionId, tuple[str, ...]] = {}
    kinds: dict[QuestionId, str] = {}
    questions: dict[QuestionId, str] = {}
    types: dict[QuestionId, str] = {}
    images: dict[QuestionId, str] = {}
    for number, record in records:
        question_id = _checked_id(record, number, answers, bad)
        if question_id is None:
            continue
        answers[question_id] = _true_answers(record, number, bad)
        if kind_key is not None and not isinstance(record.get(kind_key), str):
            bad.add(number, f"no {kind_key!r} with the question's kind; name another key with --kind-key")
        kinds[question_id] = str(record.get(kind_key, ALL_QUESTIONS))
        if isinstance(question := record.get("question", record.get("text")), str):
            questions[question_id] = question
        if isinstance(answer_type := record.get(_TYPE_KEY), str) and answer_type:
            types[question_id] = answer_type
        if found := [str(record[key]) for key in _IMAGE_KEYS if record.get(key) is not None]:
            images[question_id] = found[0]
    bad.raise_if_any("Correct the annotations, then run again.")
    if not answers:
        raise TableError(f"{bad.source}: the file holds no annotations; choose another one")
    if kind_key is None and len(questions) == len(answers):
        kinds = derive_kinds(questions)
    return References(answers, kinds, types, images)


def _true_answers(record: Mapping[str, Any], number: int, bad: BadRows) -> tuple[str, ...]:
    """The answers of one annotation; a problem is noted in `bad`."""
    found = record.get("answers", [record.get("answer")])
    if not isinstance(found, list):
        found = [None]
    texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in found]
    if not all(isinstance(text, str) for text in texts):
        bad.add(number, "no text in 'answer', and no list of texts in 'answers'")
    elif len(texts) not in ANSWER_COUNTS:
        bad.add(number, f"{len(texts)} answers; a question has one answer or ten")
    elif not any(text.strip() for text in texts):
        bad.add(number, "answer is empty")
    return tuple(texts)


def _checked_id(
    record: Mapping[str, Any], number: int, known: Mapping[QuestionId, object], bad: BadRows
) -> QuestionId | None:
    """The record's question_id (digits as a number), or None after noting in `bad` that it is missing or known."""
    question_id = record.get("question_id")
    if not isinstance(question_id, int | str) or isinstance(question_id, bool) or question_id == "":
        bad.add(number, "no 'question_id' that is a number or a text")
        return None
    question_id = canonical_id(question_id)
    if question_id in known:
        bad.add(number, f"question_id {question_id} is there already")
        return None
    return question_id


def _read_text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TableError(f"{path}: cannot be read ({error.strerror}); give the path of a readable file") from error
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _read_json_lines(path: str | os.PathLike[str], bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for every line that is not blank; other lines are noted in `bad`."""
    for line, text in enumerate(_read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            bad.add(line, f"not JSON ({error})")
            continue
        if isinstance(record, dict):
            yield line, record
        else:
            bad.add(line, "not a JSON object {…}")


def _read_annotations(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, Any]]]:
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        if isinstance(error, TableError):
            raise
        raise TableError(f"{path}: not JSON ({error}); lines of JSON objects belong in a .jsonl file") from error
    records = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise TableError(f'{path}: no list of objects under "annotations"; give VQAv2\'s annotations file')
    return list(enumerate(records, start=1))
