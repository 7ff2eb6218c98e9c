"""The rows of a report's gallery: each question with its images, true answers, and what every answer file says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava.data.vqa_normalize import strip_answer
from llava.eval.accuracy import RIGHT_FROM
from llava.eval.calibration import RunnerUp, answer_confidence, answer_runner_up
from llava.eval.evaluation import answer_type
from llava.eval.vqa_inputs import (
    ALL_QUESTIONS,
    GivenAnswer,
    QuestionId,
    References,
    canonical_id,
    derive_kinds,
)
from llava.inference.questions import Question


@dataclass(frozen=True)
class RowAnswer:
    """What one answer file says to a question.

    Attributes:
        text: the answer; None after an error.
        accuracy: 0..1; None without a true answer.
        confidence: probability of the answer, 0..1; None where none was noted.
        runner_up: what came second, None where none was noted.
        error: why there is no answer, else None.
    """

    text: str | None
    accuracy: float | None
    confidence: float | None
    runner_up: RunnerUp | None
    error: str | None


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        question_id: as in the files.
        question: its text.
        images: names in the image folder, as in the question file.
        kind: of question.
        answer_type: None without a true answer.
        truth: true answers with how many people gave them, the most frequent first; empty without annotations.
        answers: one for each answer file, None where it has no line for the question.
    """

    question_id: QuestionId
    question: str
    images: tuple[str, ...]
    kind: str
    answer_type: str | None
    truth: tuple[tuple[str, int], ...]
    answers: tuple[RowAnswer | None, ...]


def complete_references(references: References, questions: Sequence[Question]) -> References:
    """Add what the questions tell and the annotations don't: the images, and kinds if all are of the same one."""
    by_id = {canonical_id(question.question_id): question for question in questions}
    known = {key: by_id[key] for key in references.answers if key in by_id}
    images = {key: " ".join(question.images) for key, question in known.items() if question.images}
    kinds = dict(references.kinds)
    if set(kinds.values()) == {ALL_QUESTIONS}:
        kinds.update(derive_kinds({key: question.text for key, question in known.items()}))
    return references._replace(kinds=kinds, images={**images, **references.images})


def build_rows(
    questions: Sequence[Question],
    answers: Sequence[Mapping[QuestionId, GivenAnswer]],
    references: References | None,
    accuracies: Sequence[Mapping[QuestionId, float]],
) -> list[Row]:
    """Return the questions that at least one file answers, in their order.

    Args:
        questions: of the question file.
        answers: of each answer file.
        references: true answers, if there are any.
        accuracies: of each answer file, for the questions that were scored.
    """
    texts = {canonical_id(question.question_id): question.text for question in questions}
    kinds = derive_kinds(texts) if references is None else {**derive_kinds(texts), **references.kinds}
    rows = []
    for question in questions:
        key = canonical_id(question.question_id)
        given = [
            _describe(file[key], scores.get(key)) if key in file else None
            for file, scores in zip(answers, accuracies, strict=True)
        ]
        if any(answer is not None for answer in given):
            is_known = references is not None and key in references.answers
            truth = Counter(map(strip_answer, references.answers[key])) if is_known else Counter()
            kind_of_answer = answer_type(references, key) if is_known else None
            images = tuple(dict.fromkeys(question.images))
            rows.append(
                Row(key, question.text, images, kinds[key], kind_of_answer, tuple(truth.most_common()), tuple(given))
            )
    return rows


def choose_images(rows: Sequence[Row], limit: int | None) -> list[str]:
    """Return the images to show, each once: those with a wrong answer first, then the others, in the rows' order."""
    has_mistake = {name: False for row in rows for name in row.images}
    for row in rows:
        if any(answer is not None and is_wrong(answer) for answer in row.answers):
            has_mistake.update(dict.fromkeys(row.images, True))
    return sorted(has_mistake, key=lambda name: not has_mistake[name])[:limit]


def is_wrong(answer: RowAnswer) -> bool:
    """Tell whether an answer is missing after an error, or was scored and is wrong."""
    return answer.error is not None or (answer.accuracy is not None and answer.accuracy < RIGHT_FROM)


def _describe(answer: GivenAnswer, accuracy: float | None) -> RowAnswer:
    if answer.error is not None:
        message = answer.metadata.get("message")
        return RowAnswer(None, accuracy, None, None, f"{answer.error}: {message}" if message else answer.error)
    runner_up = answer_runner_up(answer.metadata, answer.text)
    return RowAnswer(answer.text, accuracy, answer_confidence(answer.metadata), runner_up, None)
