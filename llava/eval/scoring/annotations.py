"""Readers of answer files and annotations: given answers, true answers, kinds of question."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.table.bad_rows import BadRows, TableError
from llava.data.table.open_grid import is_table
from llava.data.table.options import TableOptions
from llava.data.table.question_ids import note_repeats
from llava.data.table.read import Table, read_header, read_table
from llava.eval.scoring.calibration import find_confidence_problem
from llava.eval.scoring.question_keys import Keys, QuestionKey, id_of, rekey_lines
from llava.files.home_directory import expand_home
from llava.files.json_files import parse_json
from llava.files.regular_files import read_text
from llava.files.terminal_text import show

logger = logging.getLogger(__name__)

ANSWER_COUNTS = (1, 10)
"""True answers per question: one, or VQAv2's ten."""
_WRONG_COUNT = "{} answers; a question has one answer or ten"

ALL_QUESTIONS = "all questions"
OTHER_KIND = "other"
_KIND_KEYS = ("kind", "question_type")
_TYPE_KEY = "answer_type"
_IMAGE_KEYS = ("image_id", "image")
_RARE_SHARE = 0.01


class References(NamedTuple):
    """The true answers of every question, and its kind.

    `types` has the answer types that the annotations name, `images` what they say about the image and `questions` the
    texts; questions of which they say nothing are absent.
    """

    answers: dict[QuestionKey, tuple[str, ...]]
    kinds: dict[QuestionKey, str]
    types: dict[QuestionKey, str]
    images: dict[QuestionKey, str]
    questions: dict[QuestionKey, str] = {}  # noqa: RUF012 - a default that nobody changes


class GivenAnswer(NamedTuple):
    """A line of an answer file: the text (None after an error), the error's code, what is noted, what was asked."""

    text: str | None
    error: str | None
    metadata: dict[str, Any]
    prompt: str = ""


def read_answers(path: str | os.PathLike[str], *, unique_ids: bool = False) -> dict[QuestionKey, GivenAnswer]:
    """Read an answer file, one JSON object `{question_id, text, metadata, …}` per line.

    Args:
        path: the file that batch inference wrote.
        unique_ids: refuse a file in which a question_id repeats.

    Returns:
        Key of the question -> answer; the key is the question_id, and `(id, 2)` for the second line with the same.

    Raises:
        TableError: if the file is missing or has bad lines (all are counted, the first 20 listed).
    """
    bad, keys = BadRows(os.fspath(path)), Keys()
    answers: dict[QuestionKey, GivenAnswer] = {}
    lines: list[int] = []
    for line, record in _read_json_lines(path, bad):
        key = _checked_key(record, line, keys, bad)
        if key is None:
            continue
        text, error, metadata = record.get("text"), record.get("error"), record.get("metadata") or {}
        if not isinstance(text, str) and not error:
            bad.add(line, "no 'text' with the answer")
        if not isinstance(metadata, dict):
            bad.add(line, f"'metadata' is {show(metadata)}, not an object {{…}}")
        elif problem := find_confidence_problem(metadata):
            bad.add(line, problem)
        prompt = record.get("prompt")
        asked = prompt if isinstance(prompt, str) else ""
        answers[key] = GivenAnswer(None if error else text, str(error) if error else None, metadata, asked)
        lines.append(line)
    bad.raise_if_any("Fix these lines, or run the inference again.")
    if unique_ids:
        _refuse_repeats(bad, lines, answers)
    if not answers:
        raise TableError(f"{path}: the file is empty; write the answers first")
    return answers


def pair_answers(
    name: str, answers: Mapping[QuestionKey, GivenAnswer], questions: Mapping[QuestionKey, str]
) -> dict[QuestionKey, GivenAnswer]:
    """Return the answers of a file under the keys of the questions; `name` and errors are those of `rekey_lines`.

    Args:
        name: of the file, for messages.
        answers: from `read_answers`.
        questions: key -> text, "" where it is not known.
    """
    prompts = {key: answer.prompt for key, answer in answers.items() if answer.prompt}
    return rekey_lines(name, answers, prompts, questions)


def read_references(
    path: str | os.PathLike[str],
    options: TableOptions | None = None,
    kind_key: str | None = None,
    *,
    unique_ids: bool = False,
) -> References:
    """Read the true answers from a table, from lines (.jsonl) or from VQAv2's annotations (.json).

    Args:
        path: a table of questions with answers; lines `{question_id, answer}` or `{question_id, answers: […]}`; or
            `{"annotations": [{question_id, answers: [{"answer": …} x 10], …}]}`.
        options: columns and format of a table; its notes are logged.
        kind_key: column or key with the kind of a question; None for `kind`, else `question_type`, else the question's
            first two words, rare ones (below 1 %) together as "other".
        unique_ids: refuse a file in which a question_id repeats.

    Returns:
        Answers, kinds, answer types (column or key `answer_type`), images (`image_id`, else `image`) and questions
        (`question`, else `text`) by the question's key, as in `read_answers`.

    Raises:
        TableError: if the file cannot be used (all bad rows are counted, the first 20 listed).
    """
    suffix = Path(path).suffix.lower()
    if is_table(path):
        return _read_reference_table(path, options or TableOptions(), kind_key, may_repeat_ids=not unique_ids)
    bad = BadRows(os.fspath(path), unit="line" if suffix == ".jsonl" else "annotation")
    if suffix == ".jsonl":
        records = list(_read_json_lines(path, bad))
    elif suffix == ".json":
        records = _read_annotations(path)
    else:
        raise TableError(f"{path}: the name ends in {show(suffix)}; annotations are tables, .jsonl or .json files")
    references = _collect_references(records, bad, kind_key)
    if unique_ids:
        _refuse_repeats(bad, [number for number, _ in records], references.answers)
    return references


def pair_references(references: References, questions: Mapping[QuestionKey, str]) -> References:
    """Return true answers under the keys of the questions of a question file, as `pair_answers` does answers."""
    keys = rekey_lines("the annotations", {key: key for key in references.answers}, references.questions, questions)
    return References(*({new: part[old] for new, old in keys.items() if old in part} for part in references))


def derive_kinds(questions: Mapping[QuestionKey, str]) -> dict[QuestionKey, str]:
    """Return question_id -> the question's first two words in lower case, rare ones (below 1 %) together as "other"."""
    starts = {question_id: " ".join(text.lower().split()[:2]) for question_id, text in questions.items()}
    counts = Counter(starts.values())
    least = _RARE_SHARE * len(starts)
    return {question_id: start if counts[start] >= least else OTHER_KIND for question_id, start in starts.items()}


def _read_reference_table(
    path: str | os.PathLike[str], options: TableOptions, kind_key: str | None, *, may_repeat_ids: bool
) -> References:
    header = read_header(path, options)
    if kind_key is None:
        kind_key = next((key for key in _KIND_KEYS if key in header), None)
    elif kind_key not in header:
        found = ", ".join(map(show, header))
        raise TableError(f"{path}: no column {kind_key!r}; the header has {found}; name another with --kind-key")
    type_key = _TYPE_KEY if _TYPE_KEY in header else None
    keep = tuple(key for key in (type_key, kind_key) if key is not None)
    table = read_table(path, dataclasses.replace(options, keep=keep), may_repeat_ids=may_repeat_ids)
    for note in table.notes:
        logger.warning("%s: %s", path, note)
    _check_answer_counts(path, table)
    ids = Keys()
    rows = {ids.add(row.question_id): row for row in table.rows}
    questions = {key: row.question for key, row in rows.items()}
    kinds = derive_kinds(questions) if kind_key is None else {key: row.extras[-1] for key, row in rows.items()}
    types = {key: row.extras[0] for key, row in rows.items() if type_key is not None and row.extras[0]}
    images = {key: str(row.image_id) for key, row in rows.items()}
    return References({key: row.answers for key, row in rows.items()}, kinds, types, images, questions)


def _check_answer_counts(path: str | os.PathLike[str], table: Table) -> None:
    bad = BadRows(os.fspath(path), table.unit)
    for row in table.rows:
        if len(row.answers) not in ANSWER_COUNTS:
            bad.add(row.line, _WRONG_COUNT.format(len(row.answers)))
    bad.raise_if_any("Name one column with --answer_column, or complete the answers, then run again.")


def _collect_references(
    records: Sequence[tuple[int, dict[str, Any]]], bad: BadRows, kind_key: str | None
) -> References:
    if kind_key is None and records:
        kind_key = next((key for key in _KIND_KEYS if key in records[0][1]), None)
    answers: dict[QuestionKey, tuple[str, ...]] = {}
    kinds: dict[QuestionKey, str] = {}
    questions: dict[QuestionKey, str] = {}
    types: dict[QuestionKey, str] = {}
    images: dict[QuestionKey, str] = {}
    keys = Keys()
    for number, record in records:
        key = _checked_key(record, number, keys, bad)
        if key is None:
            continue
        answers[key] = _true_answers(record, number, bad)
        if kind_key is not None and not isinstance(record.get(kind_key), str):
            bad.add(number, f"no {kind_key!r} with the question's kind; name another key with --kind-key")
        kinds[key] = str(record.get(kind_key, ALL_QUESTIONS))
        if isinstance(question := record.get("question", record.get("text")), str):
            questions[key] = question
        if isinstance(answer_type := record.get(_TYPE_KEY), str) and answer_type:
            types[key] = answer_type
        if found := [str(record[name]) for name in _IMAGE_KEYS if record.get(name) is not None]:
            images[key] = found[0]
    bad.raise_if_any("Correct the annotations, then run again.")
    if not answers:
        raise TableError(f"{bad.source}: the file holds no annotations; choose another one")
    if kind_key is None and len(questions) == len(answers):
        kinds = derive_kinds(questions)
    return References(answers, kinds, types, images, questions)


def _refuse_repeats(bad: BadRows, numbers: Sequence[int], keys: Iterable[QuestionKey]) -> None:
    note_repeats(bad, numbers, list(map(id_of, keys)))
    bad.raise_if_any("Give each question an id of its own, or leave --unique-ids out.")


def _true_answers(record: Mapping[str, Any], number: int, bad: BadRows) -> tuple[str, ...]:
    """The answers of one annotation; a problem is noted in `bad`."""
    found = record.get("answers", [record.get("answer")])
    if not isinstance(found, list):
        found = [None]
    texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in found]
    if not all(isinstance(text, str) for text in texts):
        bad.add(number, "no text in 'answer', and no list of texts in 'answers'")
    elif len(texts) not in ANSWER_COUNTS:
        bad.add(number, _WRONG_COUNT.format(len(texts)))
    elif not any(text.strip() for text in texts):
        bad.add(number, "answer is empty")
    return tuple(texts)


def _checked_key(record: Mapping[str, Any], number: int, keys: Keys, bad: BadRows) -> QuestionKey | None:
    """Return the key of a record's question, or None after noting in `bad` that it has no question_id."""
    question_id = record.get("question_id")
    if not isinstance(question_id, int | str) or isinstance(question_id, bool) or question_id == "":
        bad.add(number, "no 'question_id' that is a number or a text")
        return None
    return keys.add(question_id)


def _read_text(path: str | os.PathLike[str]) -> str:
    try:
        return read_text(expand_home(path), encoding="utf-8-sig")
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
            record = parse_json(text)
        except ValueError as error:
            bad.add(line, f"not JSON ({error})")
            continue
        if isinstance(record, dict):
            yield line, record
        else:
            bad.add(line, "not a JSON object {…}")


def _read_annotations(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, Any]]]:
    try:
        content = parse_json(_read_text(path))
    except ValueError as error:
        if isinstance(error, TableError):
            raise
        raise TableError(f"{path}: not JSON ({error}); lines of JSON objects belong in a .jsonl file") from error
    records = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise TableError(f'{path}: no list of objects under "annotations"; give VQAv2\'s annotations file')
    return list(enumerate(records, start=1))
