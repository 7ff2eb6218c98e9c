"""Result of a benchmark: its figures, and the score of each question for intervals and paired tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class QuestionScore(NamedTuple):
    """Score of one question.

    Attributes:
        key: identifies the question among those of its benchmark, whichever model answered.
        group: image of the question, or what else several questions share; the unit of the intervals.
        kind: category or split.
        score: 0..1.
    """

    key: str
    group: str
    kind: str
    score: float


class Figure(NamedTuple):
    """One number of a benchmark's table: `unit` is "%" (value 0..100) or "points"."""

    name: str
    value: float
    unit: str = "%"


@dataclass(frozen=True)
class BenchmarkResult:
    """Figures of one answer file on one benchmark.

    Attributes:
        figures: in the order of the published table; the first is the one that papers quote.
        questions: scores in the order of the question file; empty where only a server knows the answers.
        notes: sentences with the counts of what was left out, or counted as wrong.
    """

    figures: tuple[Figure, ...]
    questions: tuple[QuestionScore, ...] = ()
    notes: tuple[str, ...] = ()
