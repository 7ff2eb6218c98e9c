"""Evaluation of answer files: accuracies with intervals, comparisons, confusions, calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llava.data.table.bad_rows import TableError
from llava.eval.scoring.accuracy import Confusion, count_confusion, derive_answer_type, order_answer_types, score_answer
from llava.eval.scoring.annotations import GivenAnswer, References
from llava.eval.scoring.calibration import Calibration, answer_confidence, calibrate
from llava.eval.scoring.intervals import Difference, compare_paired, mean_interval
from llava.eval.scoring.question_keys import QuestionKey, describe_key, id_of

_IDS_SHOWN = 20
_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Score:
    """Mean accuracy, 0..1, over a number of questions, and the bounds of its 95 % interval."""

    questions: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one answer file: of all questions, by kind in alphabetical order, by answer type.

    `errors` questions have no answer; they count as wrong.
    """

    overall: Score
    by_kind: dict[str, Score]
    by_answer_type: dict[str, Score]
    errors: int


@dataclass(frozen=True)
class FileEvaluation:
    """One answer file: accuracy of each question (0..1), the scores, confusion, calibration if it has probabilities."""

    accuracies: dict[QuestionKey, float]
    table: ScoreTable
    confusion: Confusion
    calibration: Calibration | None


@dataclass(frozen=True)
class Comparison:
    """Differences between an answer file and the first: overall, by kind, by answer type."""

    overall: Difference
    by_kind: dict[str, Difference]
    by_answer_type: dict[str, Difference]


@dataclass(frozen=True)
class Evaluation:
    """Answer files by name, and the comparison of each but the first with the first."""

    files: dict[str, FileEvaluation]
    comparisons: dict[str, Comparison]


@dataclass(frozen=True)
class _Parts:
    """The questions, their division by kind and by answer type, and the image of each as its `group`."""

    ids: tuple[QuestionKey, ...]
    by_kind: dict[str, list[QuestionKey]]
    by_answer_type: dict[str, list[QuestionKey]]
    groups: dict[QuestionKey, Hashable]


def evaluate(
    answers: Mapping[str, Mapping[QuestionKey, GivenAnswer]], references: References, unanimous: str = "normalize"
) -> Evaluation:
    """Evaluate answer files on the questions that all of them answer.

    Args:
        answers: name of the file -> key of the question -> answer; the first is the base of the comparisons.
        references: true answers.
        unanimous: as in `score_answer`.

    Raises:
        TableError: if there are no such questions.
    """
    ids = tuple(key for key in references.answers if all(key in given for given in answers.values()))
    if not ids:
        raise TableError("no annotated question is answered by every file; check that the files belong together")
    parts = _split(references, ids)
    true = {key: references.answers[key] for key in ids}
    files = {}
    for name, given in answers.items():
        predictions = {key: given[key].text for key in ids}
        accuracies = {key: score_answer(predictions[key], true[key], unanimous=unanimous) for key in ids}
        table = _tabulate(accuracies, parts, sum(text is None for text in predictions.values()))
        calibration = _calibrate({key: given[key] for key in ids}, accuracies)
        files[name] = FileEvaluation(accuracies, table, count_confusion(predictions, true), calibration)
    base, *others = files
    return Evaluation(files, {name: _compare(files[base].accuracies, files[name].accuracies, parts) for name in others})


def compare_ids(answers: Mapping[str, Mapping[QuestionKey, object]], references: References) -> list[str]:
    """Return one sentence for each way in which an answer file and the annotations differ."""
    notes, total = [], len(references.answers)
    for name, given in answers.items():
        if missing := references.answers.keys() - given.keys():
            notes.append(f"{name}: questions without an answer: {len(missing)} of {total} ({list_ids(missing)})")
        unknown = given.keys() - references.answers.keys()
        again = {key for key in unknown if id_of(key) in references.answers}
        if again:
            notes.append(f"{name}: answers without a question left under their id: {len(again)} ({list_ids(again)})")
        if unknown := unknown - again:
            notes.append(f"{name}: answers without a question in the annotations: {len(unknown)} ({list_ids(unknown)})")
    return notes


def list_ids(ids: set[QuestionKey]) -> str:
    """Return the first twenty ids in order, numbers before texts, for a message."""
    ordered = sorted(ids, key=lambda key: (isinstance(id_of(key), str), id_of(key), isinstance(key, tuple) and key[1]))
    shown = ", ".join(map(describe_key, ordered[:_IDS_SHOWN]))
    return f"{shown}, …" if len(ordered) > _IDS_SHOWN else shown


def answer_type(references: References, question_id: QuestionKey) -> str:
    """Return the type that the annotations name, else the one that follows from the true answers."""
    return references.types.get(question_id) or derive_answer_type(references.answers[question_id])


def _split(references: References, ids: tuple[QuestionKey, ...]) -> _Parts:
    by_kind: dict[str, list[QuestionKey]] = {}
    by_type: dict[str, list[QuestionKey]] = {}
    for key in ids:
        by_kind.setdefault(references.kinds[key], []).append(key)
        by_type.setdefault(answer_type(references, key), []).append(key)
    return _Parts(
        ids,
        {kind: by_kind[kind] for kind in sorted(by_kind)},
        {name: by_type[name] for name in order_answer_types(list(by_type))},
        {key: ("image", references.images[key]) if key in references.images else ("question", key) for key in ids},
    )


def _map_parts(
    parts: _Parts, compute: Callable[[Sequence[QuestionKey]], _Part]
) -> tuple[_Part, dict[str, _Part], dict[str, _Part]]:
    by_kind = {name: compute(ids) for name, ids in parts.by_kind.items()}
    return compute(parts.ids), by_kind, {name: compute(ids) for name, ids in parts.by_answer_type.items()}


def _tabulate(accuracies: Mapping[QuestionKey, float], parts: _Parts, errors: int) -> ScoreTable:
    def summarise(ids: Sequence[QuestionKey]) -> Score:
        values = [accuracies[key] for key in ids]
        low, high = mean_interval(values, [parts.groups[key] for key in ids])
        return Score(len(ids), math.fsum(values) / len(ids), low, high)

    return ScoreTable(*_map_parts(parts, summarise), errors)


def _compare(before: Mapping[QuestionKey, float], after: Mapping[QuestionKey, float], parts: _Parts) -> Comparison:
    def subtract(ids: Sequence[QuestionKey]) -> Difference:
        groups = [parts.groups[key] for key in ids]
        return compare_paired([before[key] for key in ids], [after[key] for key in ids], groups)

    return Comparison(*_map_parts(parts, subtract))


def _calibrate(given: Mapping[QuestionKey, GivenAnswer], accuracies: Mapping[QuestionKey, float]) -> Calibration | None:
    confidences = {
        key: confidence
        for key, answer in given.items()
        if answer.text is not None and (confidence := answer_confidence(answer.metadata)) is not None
    }
    if not confidences:
        return None
    return calibrate(list(confidences.values()), [accuracies[key] for key in confidences])
