"""Lines of benchmarks' question and answer files, paired by what they ask and never by their place alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llava.data.table.bad_rows import BadRows, TableError
from llava.data.table.question_ids import QuestionId, canonical_id, match_forms
from llava.files.home_directory import expand_home
from llava.files.json_files import parse_json
from llava.files.regular_files import read_text
from llava.files.terminal_text import shorten, show

_SHOWN = 3
_Entry, _Converted = TypeVar("_Entry"), TypeVar("_Converted")


class BenchmarkError(TableError):
    """Files of a benchmark that don't belong together, or can't be read."""


class QuestionLine(NamedTuple):
    """A line of a question file; `question_id` may repeat, `image` is None for text alone."""

    question_id: QuestionId
    text: str
    image: str | None
    record: Mapping[str, Any]


class AnswerLine(NamedTuple):
    """A line of an answer file: `text` is "" after an error, whose code is `error`."""

    question_id: QuestionId
    prompt: str
    text: str
    error: str | None
    record: Mapping[str, Any]


def read_question_lines(path: str | os.PathLike[str]) -> list[QuestionLine]:
    """Read a question file of JSON lines `{question_id, text, image}`.

    Raises:
        BenchmarkError: if the file is missing or empty, or has lines that are not questions; the first 20 are listed.
    """
    return [
        QuestionLine(record["question_id"], record["text"], record.get("image"), record)
        for record in read_json_lines(path, _find_question_problem)
    ]


def read_answer_lines(path: str | os.PathLike[str]) -> list[AnswerLine]:
    """Read an answer file of JSON lines `{question_id, prompt, text}`, as batch inference and the original write it.

    Raises:
        BenchmarkError: if the file is missing or empty, or has lines that are not answers; the first 20 are listed.
    """
    lines = []
    for record in read_json_lines(path, _find_answer_problem):
        error = record.get("error")
        text = "" if error else record["text"]
        prompt = record.get("prompt") or ""
        lines.append(AnswerLine(record["question_id"], prompt, text, str(error) if error else None, record))
    return lines


def read_json_lines(
    path: str | os.PathLike[str], find_problem: Callable[[dict[str, Any]], str | None]
) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line; empty lines are skipped.

    Args:
        path: of the file.
        find_problem: returns what is wrong with an object; None if nothing is.

    Raises:
        BenchmarkError: if the file is missing or empty, or has other lines; the first 20 are listed.
    """
    bad, records = BadRows(os.fspath(path)), []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError:
            bad.add(number, "not JSON")
            continue
        if problem := find_problem(record) if isinstance(record, dict) else "not an object {…}":
            bad.add(number, problem)
        else:
            records.append(record)
    raise_bad_rows(bad)
    if not records:
        raise BenchmarkError(f"{path} is empty; make the file again")
    return records


def convert_entries(
    source: str | os.PathLike[str], unit: str, entries: Iterable[_Entry], convert: Callable[[_Entry], _Converted]
) -> list[_Converted]:
    """Convert the entries of a file one by one.

    Args:
        source: of the entries, for messages.
        unit: what an entry is called in messages.
        entries: in the order of the file.
        convert: raises ValueError with what is wrong with an entry.

    Raises:
        BenchmarkError: if entries can't be converted; the first 20 are listed.
    """
    bad, converted = BadRows(os.fspath(source), unit), []
    for number, entry in enumerate(entries, start=1):
        try:
            converted.append(convert(entry))
        except ValueError as error:
            bad.add(number, str(error))
    raise_bad_rows(bad)
    return converted


def raise_bad_rows(bad: BadRows) -> None:
    """Raise if bad rows of a benchmark's file were noted.

    Raises:
        BenchmarkError: with their count, and the first 20.
    """
    try:
        bad.raise_if_any("Correct these, or make the file again.")
    except TableError as error:
        raise BenchmarkError(str(error)) from error


def pair_lines(
    questions: Sequence[QuestionLine], answers: Sequence[AnswerLine], name: str
) -> list[tuple[QuestionLine, AnswerLine]]:
    """Pair questions with their answers: the same id and text, and the same place among lines that have both.

    An answer without a prompt belongs to the question of its id, if only one has that. 7, "7" and "007" are three ids;
    one that the questions have only in another of these forms is found there, if no other could be meant.

    Args:
        questions: of the benchmark.
        answers: in any order.
        name: of the answer file, for messages.

    Returns:
        A pair for each question, in the order of the questions.

    Raises:
        BenchmarkError: if questions have no answer, or answers no question: it holds both counts.
    """
    ids = Counter(question.question_id for question in questions)
    only = {line.question_id: plain_text(line.text) for line in questions if ids[line.question_id] == 1}
    by_key: dict[tuple[QuestionId, str, int], AnswerLine] = {}
    counts: Counter[tuple[QuestionId, str]] = Counter()
    for question_id, answer in zip(_find_asked_ids(questions, answers), answers, strict=True):
        key = (question_id, plain_text(answer.prompt) or only.get(question_id, ""))
        by_key[(*key, counts[key])] = answer
        counts[key] += 1
    pairs, missing = [], []
    counts.clear()
    for question in questions:
        key = (question.question_id, plain_text(question.text))
        found = by_key.pop((*key, counts[key]), None)
        counts[key] += 1
        if found is None:
            missing.append(str(key[0]))
        else:
            pairs.append((question, found))
    if missing or by_key:
        unknown = [str(key[0]) for key in by_key]
        raise BenchmarkError(
            f"{name} is not the answers to these {len(questions)} questions: {describe_ids(missing)} without an "
            f"answer, {describe_ids(unknown)} of other questions or repeated; check that both files are of the same "
            "split, or answer again"
        )
    return pairs


def drop_instructions(questions: Sequence[QuestionLine], answers: Sequence[AnswerLine]) -> list[AnswerLine]:
    """Return answers whose prompt is the question of their id alone, where the prompt holds that.

    Annotations have the question, prompts also the instruction how to answer it.
    """
    texts = {question.question_id: question.text for question in questions}
    changed = []
    for question_id, answer in zip(_find_asked_ids(questions, answers), answers, strict=True):
        text = texts.get(question_id)
        is_asked = text is not None and plain_text(text) in plain_text(answer.prompt)
        changed.append(answer._replace(prompt=text) if is_asked else answer)
    return changed


def index_answers(answers: Sequence[AnswerLine], name: str) -> dict[QuestionId, AnswerLine]:
    """Return id -> answer, of a benchmark whose ids don't repeat; a text of digits is the same id as the number.

    Args:
        answers: in any order.
        name: of the answer file, for messages.

    Raises:
        BenchmarkError: if ids repeat.
    """
    index = {canonical_id(answer.question_id): answer for answer in answers}
    if len(index) < len(answers):
        counts = Counter(canonical_id(answer.question_id) for answer in answers)
        repeated = [str(question_id) for question_id, count in counts.items() if count > 1]
        raise BenchmarkError(
            f"{name} has {len(answers)} lines and {len(index)} different question ids; more than one answer have "
            f"{describe_ids(repeated)}: answer again, or keep one line for each"
        )
    return index


def count_errors(answers: Sequence[AnswerLine], outcome: str = "count as wrong") -> tuple[str, ...]:
    """Return the note on answers that are error records; nothing if there are none.

    Args:
        answers: all of the file.
        outcome: what becomes of them, in words.
    """
    counts = Counter(answer.error for answer in answers if answer.error)
    if not counts:
        return ()
    codes = ", ".join(f"{shorten(code)} {count}" for code, count in sorted(counts.items()))
    return (f"{counts.total()} of {len(answers)} answers are errors and {outcome} ({codes})",)


def describe_ids(ids: Sequence[str]) -> str:
    """Return the number of ids and the first three, for a message."""
    shown = ", ".join(shorten(question_id) for question_id in ids[:_SHOWN])
    return f"{len(ids)} ({shown}{', …' if len(ids) > _SHOWN else ''})" if ids else "0"


def plain_text(text: str) -> str:
    """Return a question as it is compared: without the image's placeholder, single spaces between words."""
    return " ".join(text.replace("<image>", " ").split())


def _find_asked_ids(questions: Sequence[QuestionLine], answers: Sequence[AnswerLine]) -> list[QuestionId]:
    """Return the ids of answers in the form that the questions have, 7 for "7" and for "007"."""
    given = [answer.question_id for answer in answers]
    forms = match_forms(set(given), {question.question_id for question in questions})
    return [forms.get(question_id, question_id) for question_id in given]


def _read_text(path: str | os.PathLike[str]) -> str:
    try:
        return read_text(Path(expand_home(os.fspath(path))), encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path} can't be read ({getattr(error, 'strerror', None) or error})") from error


def _find_question_problem(record: Mapping[str, Any]) -> str | None:
    image = record.get("image")
    if not isinstance(record.get("text"), str):
        return "no 'text'"
    if not isinstance(image, str | None):
        return f"image is {show(image)}, not a file's name"
    return _find_id_problem(record)


def _find_answer_problem(record: Mapping[str, Any]) -> str | None:
    prompt = record.get("prompt")
    if not isinstance(record.get("text"), str) and not record.get("error"):
        return "no 'text'"
    if not isinstance(prompt, str | None):
        return f"prompt is {show(prompt)}, not a text"
    return _find_id_problem(record)


def _find_id_problem(record: Mapping[str, Any]) -> str | None:
    question_id = record.get("question_id")
    if isinstance(question_id, bool) or not isinstance(question_id, int | str):
        return f"question_id is {show(question_id)}, not a number or a text"
    return None
