"""Figures as text, and their intervals."""

from __future__ import annotations

import pytest

from llava.eval.benchmarks.result import BenchmarkResult, Figure, QuestionScore, accuracy_figure, ratio_figure
from llava.eval.benchmarks.text import format_result
from llava.eval.scoring.intervals import Interval, Ratio, wilson_interval

RESULT = BenchmarkResult(
    (Figure("accuracy", 61.25, "%", Interval(60.0, 62.5)), Figure("perception", 1510.66, "points")),
    notes=("1 of 4 answers is left out",),
)


def test_a_table_has_notes_intervals_and_the_published_figure():
    assert format_result(RESULT, 58.2).splitlines() == [
        "note: 1 of 4 answers is left out",
        "",
        "              value  95 % interval  LLaVA-1.5 7B",
        "accuracy    61.25 %   60.0 to 62.5          58.2",
        "perception   1510.7",
    ]


def test_a_table_without_notes_and_published_figure():
    assert format_result(BenchmarkResult(RESULT.figures[:1])).splitlines() == [
        "            value  95 % interval",
        "accuracy  61.25 %   60.0 to 62.5",
    ]


def test_accuracy_of_questions():
    questions = [QuestionScore(str(index), f"image {index}", "", index % 2) for index in range(10)]
    bounds = wilson_interval(0.5, 10)
    assert accuracy_figure("accuracy", questions) == ("accuracy", 50, "%", pytest.approx([100 * x for x in bounds]))
    assert accuracy_figure("accuracy", []) == ("accuracy", 0, "%", None)


def test_a_ratio_without_denominators_counts_as_nothing():
    none, all_right = Ratio([0.0], [0.0], ["a"]), Ratio([1.0], [1.0], ["a"])
    assert ratio_figure("precision", none) == ("precision", 0, "%", None)
    assert ratio_figure("precision", none, all_right) == ("precision", 50, "%", None)
