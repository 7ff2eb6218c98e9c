"""Files of a benchmark: its questions and images, and the list of what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.eval.benchmarks.catalog import Benchmark, QuestionFormat
from llava.eval.benchmarks.mmbench.table import (
    build_mmbench_requests,
    default_image_folder,
    extract_mmbench_images,
    read_mmbench_table,
)
from llava.eval.benchmarks.scienceqa.questions import read_science_questions
from llava.image_files.errors import ImageError
from llava.image_files.paths import resolve_image
from llava.inference.batch.questions import Question, read_question_file


class Missing(NamedTuple):
    """A file or folder that a benchmark needs; `origin` says where it comes from."""

    path: Path
    problem: str
    origin: str


class Prepared(NamedTuple):
    """Questions of a benchmark and their image folder, or what is missing for them.

    Attributes:
        benchmark: from the catalog.
        questions: in order; none if something is missing.
        images: image folder.
        record_keys: question -> keys that its answer's line has besides.
        missing: files and folders.
    """

    benchmark: Benchmark
    questions: list[Question]
    images: Path
    record_keys: Mapping[Question, Mapping[str, Any]]
    missing: tuple[Missing, ...] = ()


def prepare(benchmark: Benchmark, data: Path, limit: int | None, *, needs_images: bool = True) -> Prepared:
    """Read the questions of a benchmark and look for every file that it needs.

    Args:
        benchmark: from the catalog.
        data: folder of all benchmarks.
        limit: only the first questions; None = all.
        needs_images: whether images are read, or existing answers scored.
    """
    folder = data / benchmark.folder
    paths = [benchmark.question_file, *benchmark.annotations]
    if needs_images and benchmark.images is not None:
        paths.append(benchmark.images)
    missing = [
        Missing(folder / path, "is missing", benchmark.origins[path])
        for path in paths
        if not _has_content(folder / path)
    ]
    part = Prepared(benchmark, [], folder / (benchmark.images or ""), {}, tuple(missing))
    if any(lack.path == folder / benchmark.question_file for lack in missing):
        return part
    part = _read_questions(part, folder / benchmark.question_file, limit, needs_images=needs_images)
    if not part.questions:
        missing.append(
            Missing(folder / benchmark.question_file, "holds no questions", benchmark.origins[benchmark.question_file])
        )
    if needs_images and benchmark.images is not None and all(lack.path != part.images for lack in missing):
        missing += _find_missing_images(benchmark, part.questions, part.images)
    return part._replace(missing=tuple(missing))


def describe_missing(parts: Sequence[Prepared]) -> str:
    """Return the message that lists what is missing for each benchmark; "" if nothing is."""
    lines = []
    for part in parts:
        if part.missing:
            lines.append(f"{part.benchmark.title} ({part.benchmark.name}) can't run:")
            lines += [f"  {path} {problem}; it comes from {origin}" for path, problem, origin in part.missing]
    return "\n".join(lines)


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _find_missing_images(benchmark: Benchmark, questions: Sequence[Question], folder: Path) -> list[Missing]:
    names = dict.fromkeys(name for question in questions for name in question.images)
    absent = [name for name in names if not _is_there(folder, name)]
    if not absent:
        return []
    problem = f"lacks {len(absent)} of {len(names)} images, the first {absent[0]}"
    return [Missing(folder, problem, benchmark.origins[benchmark.images or ""])]


def _is_there(folder: Path, name: str) -> bool:
    try:
        return resolve_image(folder, name).is_file()
    except ImageError:
        return False


def _read_questions(part: Prepared, path: Path, limit: int | None, *, needs_images: bool) -> Prepared:
    if part.benchmark.question_format is QuestionFormat.LINES:
        return part._replace(questions=read_question_file(path).questions[:limit])
    if part.benchmark.question_format is QuestionFormat.SCIENCE:
        return part._replace(questions=read_science_questions(path, single_pred_prompt=True)[:limit])
    rows, folder = read_mmbench_table(path), default_image_folder(path)
    if not needs_images:
        questions = [Question(row.index, "") for row in rows[:limit]]
        return part._replace(questions=questions, images=folder)
    images, _ = extract_mmbench_images(path, rows, folder)
    language = part.benchmark.language
    requests = build_mmbench_requests(rows[:limit], images, single_pred_prompt=True, lang=language)
    keys = {request.question: request.keys for request in requests}
    return part._replace(questions=list(keys), images=folder, record_keys=keys)
