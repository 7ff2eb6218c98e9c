"""From an answers file to the figures of its benchmark, and to its submission file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from llava.eval.benchmarks.catalog import Benchmark
from llava.eval.benchmarks.lines import QuestionLine, read_answer_lines, read_question_lines
from llava.eval.benchmarks.mmvet import convert_mmvet
from llava.eval.benchmarks.result import BenchmarkResult
from llava.eval.benchmarks.submission import write_json_document
from llava.eval.benchmarks.vizwiz import convert_vizwiz
from llava.eval.benchmarks.vqav2 import convert_vqav2


class ScoreFiles(NamedTuple):
    """Files of one model on one benchmark.

    Attributes:
        folder: of the benchmark.
        questions: question file.
        answers: answers file.
        upload: submission file to write; None if there is none.
        limit: only the first questions were asked; None = all.
    """

    folder: Path
    questions: Path
    answers: Path
    upload: Path | None
    limit: int | None


def score(benchmark: Benchmark, files: ScoreFiles) -> BenchmarkResult:
    """Score an answers file; write the submission file if the benchmark has one.

    Raises:
        BenchmarkError: if files don't belong together, or can't be read.
        OSError: if the submission file can't be written.
    """
    return _SCORERS[benchmark.name](files)


def _questions(files: ScoreFiles) -> list[QuestionLine]:
    return read_question_lines(files.questions)[: files.limit]
