"""From an answers file to the figures of its benchmark, and to its submission file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from llava.eval.benchmarks.catalog import Benchmark
from llava.eval.benchmarks.lines import QuestionLine, read_answer_lines, read_question_lines
from llava.eval.benchmarks.mme import format_mme_files, read_mme_truths, score_mme
from llava.eval.benchmarks.mmvet import convert_mmvet
from llava.eval.benchmarks.pope import read_labels
from llava.eval.benchmarks.pope import score as score_pope
from llava.eval.benchmarks.result import BenchmarkResult
from llava.eval.benchmarks.submission import write_json_document
from llava.eval.benchmarks.vizwiz import convert_vizwiz
from llava.eval.benchmarks.vqav2 import convert_vqav2
from llava.files.atomic_files import atomic_write


class ScoreFiles(NamedTuple):
    """Files of one model on one benchmark.

    Attributes:
        folder: of the benchmark.
        questions: question file.
        answers: answers file.
        upload: submission file to write, or folder of several; None for benchmarks without one.
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


def _submit(files: ScoreFiles, entries: object, notes: tuple[str, ...]) -> BenchmarkResult:
    write_json_document(files.upload, entries)
    return BenchmarkResult((), (), notes)


def _vqav2(files: ScoreFiles) -> BenchmarkResult:
    test_set = read_question_lines(files.folder / "llava_vqav2_mscoco_test2015.jsonl")
    answers = read_answer_lines(files.answers)
    return _submit(files, *convert_vqav2(test_set, answers, str(files.answers), _questions(files)))


def _vizwiz(files: ScoreFiles) -> BenchmarkResult:
    answers = read_answer_lines(files.answers)
    return _submit(files, *convert_vizwiz(_questions(files), answers, str(files.answers)))


def _mmvet(files: ScoreFiles) -> BenchmarkResult:
    return _submit(files, *convert_mmvet(read_answer_lines(files.answers), str(files.answers), _questions(files)))


def _mme(files: ScoreFiles) -> BenchmarkResult:
    if files.limit is not None:
        return BenchmarkResult((), (), ("scored with all questions only, since images have two",))
    truths, answers = read_mme_truths(files.folder / "MME_Benchmark_release_version"), read_answer_lines(files.answers)
    result = score_mme(answers, truths, str(files.answers))
    for name, text in format_mme_files(answers, truths, str(files.answers)).items():
        with atomic_write(files.upload / name) as stream:
            stream.write(text)
    return result


def _pope(files: ScoreFiles) -> BenchmarkResult:
    answers, labels = read_answer_lines(files.answers), read_labels(files.folder / "coco")
    return score_pope(_questions(files), answers, labels, str(files.answers))


_SCORERS: Mapping[str, Callable[[ScoreFiles], BenchmarkResult]] = {
    "vqav2": _vqav2,
    "vizwiz": _vizwiz,
    "pope": _pope,
    "mme": _mme,
    "mmvet": _mmvet,
}
