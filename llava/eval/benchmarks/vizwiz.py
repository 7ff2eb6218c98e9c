"""VizWiz: submission file of the test split, accuracy on the validation split."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from llava.data.vqa_normalize import normalize_challenge_answer
from llava.eval.benchmarks.lines import (
    AnswerLine,
    BenchmarkError,
    QuestionLine,
    count_errors,
    describe_ids,
    pair_lines,
)
from llava.eval.benchmarks.result import BenchmarkResult, QuestionScore, accuracy_figure
from llava.eval.benchmarks.submission import note_empty_answers, read_json_document
from llava.eval.scoring.accuracy import score_answer
from llava.files.terminal_text import show

_TRUE_ANSWERS = 10


def convert_vizwiz(
    questions: Sequence[QuestionLine], answers: Sequence[AnswerLine], name: str
) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """Return the submission, `{image, answer}` for each question in order, and notes.

    Args:
        questions: of the test split.
        answers: in any order.
        name: of the answer file, for messages.

    Raises:
        BenchmarkError: if the files don't belong together, or questions have no image.
    """
    pairs = pair_lines(questions, answers, name)
    _refuse_missing_images(questions)
    entries = [
        {"image": question.record["image"], "answer": normalize_challenge_answer(answer.text)}
        for question, answer in pairs
    ]
    return entries, note_empty_answers(answers)


def read_vizwiz_annotations(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Return image -> the ten people's answers, of VizWiz's train.json or val.json.

    Raises:
        BenchmarkError: if it is another file, or of the test split, which has no answers.
    """
    entries = read_json_document(path)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise BenchmarkError(f"{path} is not a list of annotations; give VizWiz's val.json")
    found = {str(entry.get("image")): _true_answers(entry) for entry in entries}
    bad = [image for image, texts in found.items() if len(texts) != _TRUE_ANSWERS]
    if bad or len(found) < len(entries):
        raise BenchmarkError(
            f"{path}: {describe_ids(bad)} of {len(entries)} images have not ten answers, {len(entries) - len(found)} "
            "are repeated; give VizWiz's val.json: the test split's answers are not published"
        )
    return found


def score_vizwiz(
    questions: Sequence[QuestionLine],
    answers: Sequence[AnswerLine],
    annotations: Mapping[str, Sequence[str]],
    name: str,
) -> BenchmarkResult:
    """Score answers by VQA accuracy over ten true answers, joined by image.

    Args:
        questions: of the split that is annotated.
        answers: in any order.
        annotations: from `read_vizwiz_annotations`.
        name: of the answer file, for messages.

    Raises:
        BenchmarkError: if the files don't belong together.
    """
    pairs = pair_lines(questions, answers, name)
    _refuse_missing_images(questions)
    images = [PurePosixPath(question.record["image"]).name for question in questions]
    unknown, unasked = [image for image in images if image not in annotations], set(annotations).difference(images)
    if unknown or unasked:
        raise BenchmarkError(
            f"{describe_ids(unknown)} of {len(images)} questions have no annotation, {describe_ids(sorted(unasked))} "
            f"of {len(annotations)} annotations no question; give both of the same split"
        )
    scores = tuple(
        QuestionScore(image, image, "all", score_answer(None if answer.error else answer.text, annotations[image]))
        for image, (_, answer) in zip(images, pairs, strict=True)
    )
    return BenchmarkResult((accuracy_figure("accuracy", scores),), scores, count_errors(answers))


def _true_answers(entry: Mapping[str, Any]) -> tuple[str, ...]:
    answers = entry.get("answers")
    texts = (
        [answer.get("answer") for answer in answers if isinstance(answer, dict)] if isinstance(answers, list) else []
    )
    return tuple(text for text in texts if isinstance(text, str))


def _refuse_missing_images(questions: Sequence[QuestionLine]) -> None:
    bad = [question for question in questions if not isinstance(question.record.get("image"), str)]
    if bad:
        raise BenchmarkError(
            f"{len(bad)} of {len(questions)} questions have no image, the first question_id "
            f"{show(bad[0].question_id)}; give VizWiz's question file"
        )
