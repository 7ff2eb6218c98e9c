"""Scores of GQA's balanced test-dev questions, and the prediction file that GQA's own program takes.

Source: D. A. Hudson and C. D. Manning, GQA, CVPR 2019; its program compares predictions and answers letter for letter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from llava.eval.benchmarks.lines import (
    AnswerLine,
    BenchmarkError,
    QuestionLine,
    convert_entries,
    count_errors,
    drop_instructions,
    index_answers,
    pair_lines,
)
from llava.eval.benchmarks.result import BenchmarkResult, QuestionScore, accuracy_figure
from llava.eval.benchmarks.submission import note_empty_answers, read_json_document

OPEN, BINARY, OTHER = "open", "binary", "all"
"""Kinds of questions: asking for a word, offering two, unknown."""


def read_gqa_questions(path: str | os.PathLike[str]) -> list[QuestionLine]:
    """Read GQA's questions, `{id: {question, answer, imageId, types}}`.

    Raises:
        BenchmarkError: if the file can't be read, or has questions without an answer; the first 20 are listed.
    """
    document = read_json_document(path)
    if not isinstance(document, dict) or not document:
        raise BenchmarkError(f"{path} is not an object of questions; name testdev_balanced_questions.json")
    return convert_entries(path, "question", document.items(), _read_question)


def read_prediction(text: str) -> str:
    """Return an answer as GQA's answers are written: lower case, no full stop at the end."""
    return text.rstrip(".").lower()


def score_gqa(questions: Sequence[QuestionLine], answers: Sequence[AnswerLine], name: str) -> BenchmarkResult:
    """Return the accuracy of all, of binary and of open questions.

    Args:
        questions: from `read_gqa_questions`.
        answers: in any order; their prompts hold the questions.
        name: of the answer file, for messages.

    Raises:
        BenchmarkError: if the files don't belong together.
    """
    scores = tuple(
        QuestionScore(
            str(question.question_id),
            str(question.image),
            _kind(question.record),
            float(not answer.error and read_prediction(answer.text) == question.record["answer"]),
        )
        for question, answer in pair_lines(questions, drop_instructions(questions, answers), name)
    )
    figures = [accuracy_figure("accuracy", scores)]
    for kind in (BINARY, OPEN):
        if part := [score for score in scores if score.kind == kind]:
            figures.append(accuracy_figure(f"accuracy, {kind}", part))
    return BenchmarkResult(tuple(figures), scores, count_errors(answers))


def convert_gqa(answers: Sequence[AnswerLine], name: str) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """Return the predictions in the order of the answers, and notes.

    Args:
        answers: one for each question.
        name: of the answer file, for messages.

    Raises:
        BenchmarkError: if a question is answered twice, of which GQA's program would take the last answer.
    """
    predictions = [
        {"questionId": str(answer.question_id), "prediction": read_prediction(answer.text)}
        for answer in index_answers(answers, name).values()
    ]
    return predictions, note_empty_answers(answers)


def _read_question(item: tuple[str, Any]) -> QuestionLine:
    question_id, entry = item
    texts = [entry.get(key) for key in ("question", "answer", "imageId")] if isinstance(entry, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("no 'question', 'answer' and 'imageId'; the test split's answers are not published")
    return QuestionLine(question_id, texts[0], texts[2], entry)


def _kind(record: Mapping[str, Any]) -> str:
    types = record.get("types")
    structure = types.get("structural") if isinstance(types, dict) else None
    if not isinstance(structure, str):
        return OTHER
    return OPEN if structure == "query" else BINARY
