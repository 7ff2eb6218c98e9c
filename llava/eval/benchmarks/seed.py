"""SEED-Bench: accuracy by type of question, of images and of videos, and the submission file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from llava.data.table.question_ids import canonical_id
from llava.eval.benchmarks.lines import (
    AnswerLine,
    BenchmarkError,
    count_errors,
    describe_ids,
    index_answers,
    plain_text,
)
from llava.eval.benchmarks.result import BenchmarkResult, QuestionScore, accuracy_figure
from llava.eval.benchmarks.submission import read_json_document
from llava.files.terminal_text import show

DATA_TYPES = ("image", "video")
_LETTERS = ("A", "B", "C", "D")


class SeedQuestion(NamedTuple):
    """A question of SEED-Bench.json: id as it stands there, what it is about, name of its type, true letter, text."""

    question_id: int | str
    data_id: str
    data_type: str
    kind: str
    answer: str
    text: str


def read_seed_questions(path: str | os.PathLike[str], data_type: str | None = None) -> list[SeedQuestion]:
    """Read SEED-Bench.json.

    Args:
        path: of the file.
        data_type: "image" or "video" leaves the other out; None = both.

    Raises:
        BenchmarkError: if it is another file, or holds no question of that data type.
    """
    content = read_json_document(path)
    entries = content.get("questions") if isinstance(content, dict) else None
    types = content.get("question_type") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not isinstance(types, dict):
        raise BenchmarkError(f'{path} holds no "questions" and "question_type"; give SEED-Bench.json')
    names = {str(number): name for name, number in types.items()}
    questions = [_read_question(entry, names) for entry in entries]
    bad = [index for index, question in enumerate(questions) if question is None]
    if bad:
        raise BenchmarkError(
            f"{path}: {len(bad)} of {len(entries)} questions lack question_id, data_type, a known question_type_id or "
            f"answer, the first {show(entries[bad[0]])}; download it again"
        )
    found = [question for question in questions if question and data_type in (None, question.data_type)]
    ids = {canonical_id(question.question_id) for question in found}
    if not found or len(ids) < len(found):
        what = f"{len(found) - len(ids)} question ids are repeated" if found else "no question of this data type"
        raise BenchmarkError(f"{path}: {what}; download it again")
    return found


def pair_seed(
    questions: Sequence[SeedQuestion], answers: Sequence[AnswerLine], name: str
) -> list[tuple[SeedQuestion, AnswerLine]]:
    """Pair questions with their answers by id, in the order of the questions.

    Args:
        questions: from `read_seed_questions`.
        answers: in any order.
        name: of the answer file, for messages.

    Raises:
        BenchmarkError: if questions have no answer, or answers no question or are repeated: it holds the counts.
    """
    by_id = index_answers(answers, name)
    pairs, missing = [], []
    for question in questions:
        answer = by_id.pop(canonical_id(question.question_id), None)
        if answer is None:
            missing.append(question)
        else:
            pairs.append((question, answer))
    if missing or by_id:
        of_type = {kind: sum(question.data_type == kind for question in missing) for kind in DATA_TYPES}
        counts = " and ".join(f"{count} {kind}" for kind, count in of_type.items())
        raise BenchmarkError(
            f"{name} is not the answers to these {len(questions)} questions: "
            f"{describe_ids([str(question.question_id) for question in missing])} without an answer ({counts} "
            f"questions), {describe_ids([str(question_id) for question_id in by_id])} of other questions; answer the "
            "question file of the same release, or score one data type alone"
        )
    return pairs


def score_seed(questions: Sequence[SeedQuestion], answers: Sequence[AnswerLine], name: str) -> BenchmarkResult:
    """Score answers: right is the true letter alone, as in the original; arguments and errors as of `pair_seed`.

    Returns:
        Accuracy of all questions, of each data type and of each type of question.
    """
    pairs = pair_seed(questions, answers, name)
    scores = tuple(
        QuestionScore(str(question.question_id), question.data_id, question.kind, float(answer.text == question.answer))
        for question, answer in pairs
    )
    figures = [accuracy_figure("all", scores)]
    for data_type in DATA_TYPES:
        part = [score for score, question in zip(scores, questions, strict=True) if question.data_type == data_type]
        figures += [accuracy_figure(data_type, part)] if part else []
    for kind in dict.fromkeys(score.kind for score in scores):
        figures.append(accuracy_figure(kind, [score for score in scores if score.kind == kind]))
    return BenchmarkResult(tuple(figures), scores, (*_describe_answers(pairs), *count_errors(answers)))


def convert_seed(
    questions: Sequence[SeedQuestion], answers: Sequence[AnswerLine], name: str
) -> list[dict[str, int | str]]:
    """Return the submission, `{question_id, prediction}` for each question; arguments and errors as of `pair_seed`."""
    pairs = pair_seed(questions, answers, name)
    return [{"question_id": question.question_id, "prediction": answer.text} for question, answer in pairs]


def _read_question(entry: Any, names: dict[str, str]) -> SeedQuestion | None:
    if not isinstance(entry, dict):
        return None
    question_id, kind = entry.get("question_id"), names.get(str(entry.get("question_type_id")))
    is_id = isinstance(question_id, int | str) and not isinstance(question_id, bool)
    if not is_id or kind is None or entry.get("data_type") not in DATA_TYPES or entry.get("answer") not in _LETTERS:
        return None
    data_id, text = str(entry.get("data_id", question_id)), str(entry.get("question", ""))
    return SeedQuestion(question_id, data_id, entry["data_type"], kind, entry["answer"], text)


def _describe_answers(pairs: Sequence[tuple[SeedQuestion, AnswerLine]]) -> tuple[str, ...]:
    notes = []
    others = sum(answer.text not in _LETTERS and not answer.error for _, answer in pairs)
    if others:
        notes.append(f"{others} of {len(pairs)} answers are not one letter of A to D and count as wrong")
    asked = [plain_text(question.text) in plain_text(answer.prompt) for question, answer in pairs if answer.prompt]
    if not all(asked):
        notes.append(
            f"{asked.count(False)} of {len(pairs)} prompts are not about the annotations' question of their id; check "
            "that both files are of the same release"
        )
    return tuple(notes)
