"""Entries of the report's gallery: each question with its images, true answers, and the answer of every file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava.data.table.question_ids import QuestionId
from llava.data.vqa_normalize import strip_answer
from llava.eval.scoring.accuracy import RIGHT_FROM
from llava.eval.scoring.annotations import ALL_QUESTIONS, GivenAnswer, References, derive_kinds
from llava.eval.scoring.calibration import RunnerUp, answer_confidence, answer_runner_up
from llava.eval.scoring.evaluate import answer_type
from llava.eval.scoring.question_keys import Keys, QuestionKey, id_of
from llava.inference.batch.questions import Question

SMALLEST_SIZE = 48
"""Least allowed longest side of a thumbnail, in pixels; smaller ones show nothing."""


@dataclass(frozen=True)
class RowAnswer:
    """Answer of one file to a question.

    Attributes:
        text: the answer; None after an error.
        accuracy: 0..1; None without a true answer.
        confidence: probability of the answer, 0..1; None where the file has none.
        runner_up: second-best answer; None where the file has none.
        error: reason why the answer is missing, else None.
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


def key_questions(questions: Sequence[Question]) -> dict[QuestionKey, Question]:
    """Return key -> question, in their order."""
    keys = Keys()
    return {keys.add(question.question_id): question for question in questions}


def complete_references(references: References, questions: Mapping[QuestionKey, Question]) -> References:
    """Fill in from the questions what the annotations lack: images, and kinds if all are of the same kind."""
    known = {key: questions[key] for key in references.answers if key in questions}
    images = {key: " ".join(question.images) for key, question in known.items() if question.images}
    kinds = dict(references.kinds)
    if set(kinds.values()) == {ALL_QUESTIONS}:
        kinds.update(derive_kinds({key: question.text for key, question in known.items()}))
    return references._replace(kinds=kinds, images={**images, **references.images})


def build_rows(
    questions: Mapping[QuestionKey, Question],
    answers: Sequence[Mapping[QuestionKey, GivenAnswer]],
    references: References | None,
    accuracies: Sequence[Mapping[QuestionKey, float]],
) -> list[Row]:
    """Return the questions that at least one file answers, in their order.

    Args:
        questions: of the question file, from `key_questions`.
        answers: of each answer file, by the same keys.
        references: true answers, if there are any.
        accuracies: of each answer file, for the questions that were scored.
    """
    texts = {key: question.text for key, question in questions.items()}
    kinds = derive_kinds(texts) if references is None else {**derive_kinds(texts), **references.kinds}
    rows = []
    for key, question in questions.items():
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
                Row(
                    id_of(key),
                    question.text,
                    images,
                    kinds[key],
                    kind_of_answer,
                    tuple(truth.most_common()),
                    tuple(given),
                )
            )
    return rows


def choose_images(rows: Sequence[Row], limit: int | None) -> list[str]:
    """Return the images to show, each once and in order: images with a wrong answer first, then the others."""
    has_mistake = {name: False for row in rows for name in row.images}
    for row in rows:
        if any(answer is not None and is_wrong(answer) for answer in row.answers):
            has_mistake.update(dict.fromkeys(row.images, True))
    return sorted(has_mistake, key=lambda name: not has_mistake[name])[:limit]


def is_wrong(answer: RowAnswer) -> bool:
    """Return whether an answer is an error, or was scored as wrong."""
    return answer.error is not None or (answer.accuracy is not None and answer.accuracy < RIGHT_FROM)


def _describe(answer: GivenAnswer, accuracy: float | None) -> RowAnswer:
    if answer.error is not None:
        message = answer.metadata.get("message")
        return RowAnswer(None, accuracy, None, None, f"{answer.error}: {message}" if message else answer.error)
    runner_up = answer_runner_up(answer.metadata, answer.text)
    return RowAnswer(answer.text, accuracy, answer_confidence(answer.metadata), runner_up, None)
