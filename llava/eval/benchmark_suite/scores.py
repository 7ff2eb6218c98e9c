"""Score the answers file of a benchmark, and write its submission file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llava.data.table.question_ids import QuestionId, canonical_id
from llava.eval.benchmarks.catalog import Benchmark
from llava.eval.benchmarks.gqa import convert_gqa, read_gqa_questions, score_gqa
from llava.eval.benchmarks.lines import QuestionLine, pair_lines, read_answer_lines, read_question_lines
from llava.eval.benchmarks.mmbench.score import convert_mmbench, has_true_answers, score_mmbench
from llava.eval.benchmarks.mmbench.table import read_mmbench_table
from llava.eval.benchmarks.mme import format_mme_files, read_mme_truths, score_mme
from llava.eval.benchmarks.mmvet import convert_mmvet
from llava.eval.benchmarks.pope import read_pope_labels, score_pope
from llava.eval.benchmarks.result import BenchmarkResult
from llava.eval.benchmarks.scienceqa.questions import read_science_records
from llava.eval.benchmarks.scienceqa.score import read_science_problems, score_scienceqa
from llava.eval.benchmarks.seed import convert_seed, read_seed_questions, score_seed
from llava.eval.benchmarks.submission import note_empty_answers, write_json_document, write_xlsx
from llava.eval.benchmarks.textvqa import prompt_processor, read_textvqa_annotations, score_textvqa
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
    answers, labels = read_answer_lines(files.answers), read_pope_labels(files.folder / "coco")
    return score_pope(_questions(files), answers, labels, str(files.answers))


def _textvqa(files: ScoreFiles) -> BenchmarkResult:
    annotations = read_textvqa_annotations(files.folder / "TextVQA_0.5.1_val.json")
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
    return replace(result, notes=(*result.notes, *notes))


def _seed(files: ScoreFiles) -> BenchmarkResult:
    known = read_seed_questions(files.folder / "SEED-Bench.json")
    asked = _asked_ids(_questions(files))
    questions = [question for question in known if canonical_id(question.question_id) in asked]
    answers = read_answer_lines(files.answers)
    result = score_seed(questions, answers, str(files.answers))
    lines = [json.dumps(entry) + "\n" for entry in convert_seed(questions, answers, str(files.answers))]
    with atomic_write(files.upload) as stream:
        stream.writelines(lines)
    return _note_unasked(result, len(known), len(questions))


def _gqa(files: ScoreFiles) -> BenchmarkResult:
    known = read_gqa_questions(files.folder / "data/testdev_balanced_questions.json")
    asked = _asked_ids(_questions(files))
    questions = [question for question in known if canonical_id(question.question_id) in asked]
    answers = read_answer_lines(files.answers)
    result = score_gqa(questions, answers, str(files.answers))
    write_json_document(files.upload, convert_gqa(answers, str(files.answers))[0])
    return _note_unasked(result, len(known), len(questions))


def _scienceqa(files: ScoreFiles) -> BenchmarkResult:
    asked = {str(record.question_id) for record in read_science_records(files.questions)[: files.limit]}
    known = read_science_problems(files.folder)
    problems = [problem for problem in known if problem.question_id in asked]
    result = score_scienceqa(problems, read_answer_lines(files.answers), str(files.answers))
    return _note_unasked(result, len(known), len(problems))


def _asked_ids(questions: Sequence[QuestionLine]) -> set[QuestionId]:
    return {canonical_id(question.question_id) for question in questions}


def _note_unasked(result: BenchmarkResult, known: int, asked: int) -> BenchmarkResult:
    """Add the note on true answers whose questions are not in the question file."""
    if known == asked:
        return result
    note = f"{known - asked} of the {known} questions with true answers are not among those asked"
    return replace(result, notes=(*result.notes, note))


def _llavabench(files: ScoreFiles) -> BenchmarkResult:
    answers = read_answer_lines(files.answers)
    pair_lines(_questions(files), answers, str(files.answers))
    return BenchmarkResult((), (), note_empty_answers(answers))


_SCORERS: Mapping[str, Callable[[ScoreFiles], BenchmarkResult]] = {
    "vqav2": _vqav2,
    "gqa": _gqa,
    "vizwiz": _vizwiz,
    "scienceqa": _scienceqa,
    "textvqa": _textvqa,
    "pope": _pope,
    "mme": _mme,
    "mmbench": _mmbench,
    "mmbench_cn": _mmbench,
    "seed": _seed,
    "llavabench": _llavabench,
    "mmvet": _mmvet,
}
