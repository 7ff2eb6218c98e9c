"""From an answers file to the figures of its benchmark, and to its submission file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from llava.eval.benchmarks.catalog import Benchmark
from llava.eval.benchmarks.lines import QuestionLine, pair_lines, read_answer_lines, read_question_lines
from llava.eval.benchmarks.mmbench.score import convert_mmbench, has_true_answers, score_mmbench
from llava.eval.benchmarks.mmbench.table import read_mmbench_table
from llava.eval.benchmarks.mme import format_mme_files, read_mme_truths, score_mme
from llava.eval.benchmarks.mmvet import convert_mmvet
from llava.eval.benchmarks.pope import read_labels
from llava.eval.benchmarks.pope import score as score_pope
from llava.eval.benchmarks.result import BenchmarkResult
from llava.eval.benchmarks.seed import convert_seed, read_seed_questions, score_seed
from llava.eval.benchmarks.submission import note_empty_answers, write_json_document, write_xlsx
from llava.eval.benchmarks.textvqa import prompt_processor, read_annotations
from llava.eval.benchmarks.textvqa import score as score_textvqa
from llava.eval.benchmarks.vizwiz import convert_vizwiz
from llava.eval.benchmarks.vqav2 import convert_vqav2
from llava.eval.scoring.question_keys import canonical_id
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


def _textvqa(files: ScoreFiles) -> BenchmarkResult:
    annotations = read_annotations(files.folder / "TextVQA_0.5.1_val.json")
    if files.limit is not None:
        asked = {(str(question.question_id), prompt_processor(question.text)) for question in _questions(files)}
        annotations = [one for one in annotations if (str(one.question_id), one.text.lower()) in asked]
    return score_textvqa(annotations, read_answer_lines(files.answers), str(files.answers))


def _mmbench(files: ScoreFiles) -> BenchmarkResult:
    rows = read_mmbench_table(files.questions)[: files.limit]
    answers = read_answer_lines(files.answers)
    entries, notes = convert_mmbench(rows, answers, str(files.answers))
    notes = (*notes, *write_xlsx(files.upload, entries))
    if not has_true_answers(rows):
        return BenchmarkResult((), (), notes)
    result = score_mmbench(rows, answers, str(files.answers))
    return BenchmarkResult(result.figures, result.questions, (*result.notes, *notes))


def _seed(files: ScoreFiles) -> BenchmarkResult:
    asked = {canonical_id(question.question_id) for question in _questions(files)}
    known = read_seed_questions(files.folder / "SEED-Bench.json")
    questions = [question for question in known if canonical_id(question.question_id) in asked]
    answers = read_answer_lines(files.answers)
    result = score_seed(questions, answers, str(files.answers))
    lines = [json.dumps(entry) + "\n" for entry in convert_seed(questions, answers, str(files.answers))]
    with atomic_write(files.upload) as stream:
        stream.writelines(lines)
    left = len(known) - len(questions)
    note = (f"{left} of the {len(known)} questions of SEED-Bench.json are not in the question file",) if left else ()
    return BenchmarkResult(result.figures, result.questions, (*result.notes, *note))


def _llavabench(files: ScoreFiles) -> BenchmarkResult:
    answers = read_answer_lines(files.answers)
    pair_lines(_questions(files), answers, str(files.answers))
    return BenchmarkResult((), (), note_empty_answers(answers))


_SCORERS: Mapping[str, Callable[[ScoreFiles], BenchmarkResult]] = {
    "vqav2": _vqav2,
    "vizwiz": _vizwiz,
    "textvqa": _textvqa,
    "pope": _pope,
    "mme": _mme,
    "mmbench": _mmbench,
    "mmbench_cn": _mmbench,
    "seed": _seed,
    "llavabench": _llavabench,
    "mmvet": _mmvet,
}
