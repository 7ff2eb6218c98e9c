"""Result of one model on one benchmark, and the paired comparison of two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llava.eval.benchmarks.catalog import Benchmark
from llava.eval.benchmarks.result import BenchmarkResult
from llava.eval.scoring.intervals import Difference, compare_paired


@dataclass(frozen=True)
class Outcome:
    """One model on one benchmark.

    Attributes:
        benchmark: from the catalog.
        model: name in the paths of its files.
        answers: file of all answers.
        questions: how many were asked.
        result: figures; without any if only a server can score.
        upload: the submission or prediction file; None if there is none.
        seconds: answering took in this run, without loading the model; None if all answers existed.
    """

    benchmark: Benchmark
    model: str
    answers: Path
    questions: int
    result: BenchmarkResult
    upload: Path | None = None
    seconds: float | None = None


class Pair(NamedTuple):
    """Two models on the same questions; `difference` is the tuned model's mean score minus the base's."""

    base: Outcome
    tuned: Outcome
    difference: Difference


def pair_outcomes(base: Sequence[Outcome], tuned: Sequence[Outcome]) -> list[Pair]:
    """Compare two models on every benchmark that both have scores of.

    Raises:
        ValueError: if the scores of a benchmark are of different questions.
    """
    pairs = []
    before = {outcome.benchmark.name: outcome for outcome in base}
    for after in tuned:
        other = before.get(after.benchmark.name)
        if other is None or not other.result.questions or not after.result.questions:
            continue
        by_key = {question.key: question for question in other.result.questions}
        questions = after.result.questions
        if set(by_key) != {question.key for question in questions}:
            raise ValueError(
                f"{after.benchmark.title}: {other.answers} and {after.answers} are scored on different questions "
                f"({len(by_key)} and {len(questions)}); answer both with the same question file"
            )
        difference = compare_paired(
            [by_key[question.key].score for question in questions],
            [question.score for question in questions],
            [question.group for question in questions],
        )
        pairs.append(Pair(other, after, difference))
    return pairs
