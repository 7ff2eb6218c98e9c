"""Result of a benchmark: its figures, and the score of each question for intervals and paired tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llava.eval.scoring.intervals import Interval, Ratio, ratio_interval


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
    """One number of a benchmark's table: `unit` is "%" (value 0..100) or "points".

    `interval` is the 95 % interval in the same unit; None where there is none.
    """

    name: str
    value: float
    unit: str = "%"
    interval: Interval | None = None


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


def accuracy_figure(name: str, questions: Sequence[QuestionScore]) -> Figure:
    """Return the mean score of questions in percent with its interval; 0 without an interval if there are none."""
    scores, groups = [question.score for question in questions], [question.group for question in questions]
    return ratio_figure(name, Ratio(scores, [1.0] * len(scores), groups))


def ratio_figure(name: str, *ratios: Ratio) -> Figure:
    """Return the mean of ratios in percent with its interval; 0 / 0 counts as 0, and then there is no interval."""
    if not all(any(ratio.denominators) for ratio in ratios):
        known = [ratio.value for ratio in ratios if any(ratio.denominators)]
        return Figure(name, 100 * sum(known) / len(ratios))
    low, high = ratio_interval(ratios)
    return Figure(name, 100 * sum(ratio.value for ratio in ratios) / len(ratios), "%", Interval(100 * low, 100 * high))
