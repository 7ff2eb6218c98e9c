"""Scores and gallery of a model card, from an answers file, its questions and their true answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llava.data.data_files import extract_table_images, fit_options
from llava.data.table.bad_rows import TableError
from llava.data.table.options import TableOptions
from llava.eval.report.gallery import key_questions
from llava.eval.scoring.annotations import (
    GivenAnswer,
    References,
    pair_answers,
    pair_references,
    read_answers,
    read_references,
)
from llava.eval.scoring.evaluate import Score, compare_ids, evaluate
from llava.eval.scoring.question_keys import QuestionKey
from llava.image_files.paths import resolve_image
from llava.inference.batch.questions import Question, read_question_file

if TYPE_CHECKING:  # for annotations: they import torch
    from llava.hub.model_card import CardScores, Example, PartScore

EXAMPLE_SIZE = 512  # pixels of the longest side of a gallery image
_EXAMPLE_BYTES = 300_000
_Path = str | os.PathLike[str]


class Answered(NamedTuple):
    """An answers file by the keys of its questions, with what was asked and what is true where that is known."""

    answers: Mapping[QuestionKey, GivenAnswer]
    questions: Mapping[QuestionKey, Question]
    references: References | None


def read_answered(
    answers: _Path,
    *,
    questions: _Path | None,
    annotations: _Path | None,
    options: TableOptions,
    kind_key: str | None = None,
    images: _Path | None = None,
) -> Answered:
    """Read an answers file and what belongs to it.

    Args:
        answers: file that batch inference wrote.
        questions: file or table of the questions; None = not needed.
        annotations: true answers; None = unknown.
        options: columns of tables.
        kind_key: column or key with the kind of a question.
        images: folder into which the images of a table are written, if it holds them.

    Raises:
        TableError: if a file can't be used, or the files don't belong together.
    """
    asked = {} if questions is None else _read_questions(questions, options, images)
    references = None
    texts = {key: question.text for key, question in asked.items()}
    if annotations is not None:
        references = read_references(annotations, fit_options(annotations, options), kind_key)
        if asked:
            references = pair_references(references, texts)
    texts = texts or {key: references.questions.get(key, "") for key in references.answers}
    return Answered(pair_answers(os.fspath(answers), read_answers(answers), texts), asked, references)


def score(answered: Answered, name: str, unanimous: str) -> CardScores:
    """Score answers as `llava.eval.vqa_score` does.

    Args:
        answered: with references.
        name: of the questions, for the reader of the card.
        unanimous: as in `score_answer`.

    Raises:
        TableError: if a question has no answer, or an answer no question.
    """
    from llava.hub.model_card import CardScores

    if notes := compare_ids({"--answers": answered.answers}, answered.references):
        raise TableError("\n".join([*notes, "Complete the answers: a card shows the scores of all questions."]))
    table = evaluate({"answers": answered.answers}, answered.references, unanimous).files["answers"].table
    kinds = [_part(kind, part) for kind, part in table.by_kind.items()]
    return CardScores(name, _part("all", table.overall), kinds, table.errors)


def choose_examples(answered: Answered, images: _Path, count: int) -> list[Example]:
    """Return the first answered questions about one image each, of different images, with small copies of them.

    The copies hold pixels alone: no place or camera of a photo.

    Raises:
        TableError: if there are fewer.
        ImageError: if an image can't be read, or lies outside the folder.
    """
    from llava.eval.report.thumbnails import shrink_file
    from llava.hub.model_card import Example
    from llava.image_files.decode import open_image

    chosen: dict[str, QuestionKey] = {}
    for key, question in answered.questions.items():
        if len(question.images) == 1 and key in answered.answers and len(chosen) < count:
            chosen.setdefault(question.images[0], key)
    if len(chosen) < count:
        raise TableError(f"--gallery {count}: {len(chosen)} images have an answered question; ask for {len(chosen)}")
    examples = []
    for name, key in chosen.items():
        path = resolve_image(images, name)
        copy = shrink_file(path, EXAMPLE_SIZE, _EXAMPLE_BYTES).data
        if copy is None:
            open_image(path)  # raises with the reason
        examples.append(
            Example(copy, answered.questions[key].text, _truth(answered.references, key), answered.answers[key].text)
        )
    return examples


def _read_questions(path: _Path, options: TableOptions, images: _Path | None) -> dict[QuestionKey, Question]:
    found = read_question_file(path, fit_options(path, options))
    if images is not None:
        extract_table_images(path, found.table, images, "--image-folder")
    return key_questions(found.questions)


def _truth(references: References | None, key: QuestionKey) -> str | None:
    answers: Sequence[str] = () if references is None else references.answers.get(key, ())
    return max(answers, key=answers.count, default=None)


def _part(name: str, score: Score) -> PartScore:
    from llava.hub.model_card import PartScore

    return PartScore(name, score.questions, score.accuracy, score.low, score.high)
