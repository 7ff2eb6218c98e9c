"""MME: perception and cognition in points, and the answer files that its official evaluation reads.

Each image has two questions, one whose true answer is yes and one no. A task's points are 100 (accuracy + accuracy+),
where accuracy+ is the share of images with both answers right; perception and cognition are sums over tasks.

Source: C. Fu et al., MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models (2023), and the
behaviour of its program: an answer is read from its first four letters.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from llava.data.table.bad_rows import BadRows, TableError
from llava.eval.benchmarks.lines import AnswerLine, BenchmarkError, count_errors, describe_ids, plain_text
from llava.eval.benchmarks.result import BenchmarkResult, Figure, QuestionScore, accuracy_figure
from llava.files.home_directory import expand_home
from llava.files.regular_files import MAX_SETTINGS_BYTES, read_text

TASKS: Mapping[str, tuple[str, ...]] = {
    "perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
"""By part; each is a folder of the benchmark."""
_INSTRUCTIONS = ("Answer the question using a single word or phrase.", "Please answer yes or no.")
_QUESTIONS_FOLDER = "questions_answers_YN"
_LETTERS_READ = 4
_QUESTIONS_PER_IMAGE = 2


class Truth(NamedTuple):
    """A question of the benchmark: its task, the text file of its image, and the true answer, "Yes" or "No"."""

    task: str
    file: str
    question: str
    answer: str


class Answered(NamedTuple):
    """A question of the benchmark and a model's answer to it."""

    truth: Truth
    answer: AnswerLine

    @property
    def image(self) -> str:
        """The image, by task and name without ending."""
        return f"{self.truth.task}/{PurePosixPath(self.truth.file).stem}"

    @property
    def is_right(self) -> bool:
        """Whether the answer is the true one."""
        return read_yes_no(self.answer.text) == self.truth.answer.lower()


def read_yes_no(text: str) -> str:
    """Return "yes", "no" or "other", as the official program reads an answer: from its first four letters."""
    start = text.lower()[:_LETTERS_READ]
    return next((word for word in ("yes", "no") if word in start), "other")


def read_mme_truths(folder: str | os.PathLike[str]) -> list[Truth]:
    """Read the questions with their true answers: `<task>/<image>.txt`, or in `<task>/questions_answers_YN`.

    Args:
        folder: MME_Benchmark_release_version.

    Raises:
        BenchmarkError: if it holds no task, or a line of a file is not a question, a tab and yes or no.
    """
    root = Path(expand_home(folder))
    truths: list[Truth] = []
    for task in (task for tasks in TASKS.values() for task in tasks):
        inner = root / task / _QUESTIONS_FOLDER
        place = inner if inner.is_dir() else root / task
        for path in sorted(place.glob("*.txt")):
            truths += _read_image_file(path, task)
    if not truths:
        raise BenchmarkError(
            f"{folder} holds none of MME's tasks ({TASKS['perception'][0]}/<image>.txt and so on); give its "
            "MME_Benchmark_release_version"
        )
    counts = Counter((truth.task, truth.file) for truth in truths)
    bad = [f"{task}/{file}" for (task, file), count in counts.items() if count != _QUESTIONS_PER_IMAGE]
    if bad:
        raise BenchmarkError(
            f"{folder}: {describe_ids(bad)} of {len(counts)} images have not two questions; get it again"
        )
    return truths


def pair_mme(answers: Sequence[AnswerLine], truths: Sequence[Truth], name: str) -> list[Answered]:
    """Pair answers with the benchmark's questions by image and question, in the order of the answers.

    Args:
        answers: their id is the image's path, such as `artwork/images/1.jpg`, and repeats.
        truths: from `read_mme_truths`.
        name: of the answer file, for messages.

    Raises:
        BenchmarkError: if questions have no answer, or answers no question: it holds both counts.
    """
    left = {(truth.task, PurePosixPath(truth.file).stem, _plain(truth.question)): truth for truth in truths}
    if len(left) < len(truths):
        raise BenchmarkError(f"{len(truths) - len(left)} of MME's {len(truths)} questions are repeated; get it again")
    pairs, unknown = [], []
    for answer in answers:
        path = PurePosixPath(str(answer.question_id))
        truth = left.pop((path.parts[0] if path.parts else "", path.stem, _plain(answer.prompt)), None)
        if truth is None:
            unknown.append(str(answer.question_id))
        else:
            pairs.append(Answered(truth, answer))
    if unknown or left:
        missing = [f"{task}/{stem}" for task, stem, _ in left]
        raise BenchmarkError(
            f"{name} is not the answers to MME's {len(truths)} questions: {describe_ids(missing)} without an answer, "
            f"{describe_ids(unknown)} of other questions or repeated; answer llava_mme.jsonl of the same release"
        )
    return pairs


def score_mme(answers: Sequence[AnswerLine], truths: Sequence[Truth], name: str) -> BenchmarkResult:
    """Score answers as MME's official program does; arguments and errors as of `pair_mme`.

    Returns:
        The points of perception, cognition and each task, then accuracy and accuracy+ of each task. Questions are in
        the order of `truths`.
    """
    place = {truth: index for index, truth in enumerate(truths)}
    pairs = sorted(pair_mme(answers, truths, name), key=lambda pair: place[pair.truth])
    scores = tuple(
        QuestionScore(f"{pair.image} {_plain(pair.truth.question)}", pair.image, pair.truth.task, float(pair.is_right))
        for pair in pairs
    )
    shares = {task: _score_task([score for score in scores if score.kind == task]) for task in _tasks_of(truths)}
    points = {task: 100 * sum(parts) for task, parts in shares.items()}
    totals = [
        Figure(part, sum(points[task] for task in tasks if task in points), "points")
        for part, tasks in TASKS.items()
        if points.keys() & set(tasks)
    ]
    figures = [*totals, *(Figure(task, value, "points") for task, value in points.items())]
    for task, (_, accuracy_plus) in shares.items():
        part = [score for score in scores if score.kind == task]
        figures += [accuracy_figure(f"{task} accuracy", part), Figure(f"{task} accuracy+", 100 * accuracy_plus)]
    return BenchmarkResult(tuple(figures), scores, (*_describe_gaps(points), *_count_others(answers)))


def format_mme_files(answers: Sequence[AnswerLine], truths: Sequence[Truth], name: str) -> dict[str, str]:
    """Return file name -> text for the official program: `<task>.txt` with lines of file, question, truth and answer.

    The two questions of an image follow each other, as that program expects; arguments and errors as of `pair_mme`.
    """
    images: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for truth, answer in pair_mme(answers, truths, name):
        cells = (truth.file, truth.question, truth.answer, answer.text)
        line = "\t".join(cell.replace("\t", " ").replace("\n", " ").replace("\r", " ") for cell in cells)
        images[truth.task][truth.file].append(f"{line}\n")
    return {
        f"{task}.txt": "".join(line for lines in files.values() for line in lines) for task, files in images.items()
    }


def _read_image_file(path: Path, task: str) -> list[Truth]:
    bad, truths = BadRows(str(path)), []
    try:
        text = read_text(path, most=MAX_SETTINGS_BYTES, encoding="utf-8-sig")
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            question, _, answer = line.strip().partition("\t")
            if answer.strip().lower() in ("yes", "no"):
                truths.append(Truth(task, path.name, question, answer.strip()))
            else:
                bad.add(number, "not a question, a tab, and Yes or No")
        bad.raise_if_any("Get MME's files again.")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path} can't be read ({getattr(error, 'strerror', None) or error})") from error
    except TableError as error:
        raise BenchmarkError(str(error)) from error
    return truths


def _score_task(scores: Sequence[QuestionScore]) -> tuple[float, float]:
    """Return accuracy and accuracy+ of a task, 0..1."""
    right = Counter({score.group: 0 for score in scores})
    for score in scores:
        right[score.group] += int(score.score)
    both = sum(count == _QUESTIONS_PER_IMAGE for count in right.values())
    return right.total() / len(scores), both / len(right)


def _tasks_of(truths: Sequence[Truth]) -> list[str]:
    return list(dict.fromkeys(truth.task for truth in truths))


def _describe_gaps(points: Mapping[str, float]) -> tuple[str, ...]:
    notes = []
    for part, tasks in TASKS.items():
        missing = [task for task in tasks if task not in points]
        if missing:
            notes.append(f"{len(missing)} of the {len(tasks)} tasks of {part} are not there: {', '.join(missing)}")
    return tuple(notes)


def _count_others(answers: Sequence[AnswerLine]) -> tuple[str, ...]:
    others = sum(read_yes_no(answer.text) == "other" and not answer.error for answer in answers)
    notes = [f"{others} of {len(answers)} answers are neither yes nor no and count as wrong"] if others else []
    return (*notes, *count_errors(answers))


def _plain(question: str) -> str:
    for instruction in _INSTRUCTIONS:
        question = question.replace(instruction, " ")
    return plain_text(question)
