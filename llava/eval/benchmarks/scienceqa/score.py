"""Scores of ScienceQA: the option's letter is read from an answer, as in the original.

Source: P. Lu et al., Learn to Explain, NeurIPS 2022; the way in which the original LLaVA reads letters.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from llava.eval.benchmarks.lines import (
    AnswerLine,
    BenchmarkError,
    QuestionLine,
    convert_entries,
    count_errors,
    drop_instructions,
    pair_lines,
)
from llava.eval.benchmarks.result import BenchmarkResult, QuestionScore, accuracy_figure
from llava.eval.benchmarks.scienceqa.questions import ScienceRecord, read_science_records
from llava.eval.benchmarks.submission import read_json_document
from llava.files.home_directory import expand_home
from llava.files.terminal_text import show, show_list

OPTIONS = ("A", "B", "C", "D", "E")
FAILED = "FAILED"
"""Letter of an answer that names no option."""
WITH_IMAGE, TEXT_ALONE = "with image", "text alone"
_SENTENCE = re.compile("The answer is ([A-Z]).")
_PROBLEMS, _SPLITS = "problems.json", "pid_splits.json"


class Problem(NamedTuple):
    """A question of a split: `choices` is the number of its options, `answer` the letter of the right one."""

    question_id: str
    text: str
    image: str | None
    choices: int
    answer: str


class Judged(NamedTuple):
    """A problem with its answer, and the letter that was read from it."""

    problem: Problem
    answer: AnswerLine
    letter: str

    @property
    def is_right(self) -> bool:
        """Whether the letter is the right one."""
        return self.letter == self.problem.answer


def list_files(folder: str | os.PathLike[str], split: str) -> list[Path]:
    """Return the paths of problems.json, pid_splits.json and `llava_<split>_CQM-A.json` in a folder."""
    return [Path(expand_home(folder)) / name for name in (_PROBLEMS, _SPLITS, f"llava_{split}_CQM-A.json")]


def read_science_problems(
    folder: str | os.PathLike[str], split: str = "test", options: Sequence[str] = OPTIONS
) -> list[Problem]:
    """Read the problems of a split from ScienceQA's own files, else from `llava_<split>_CQM-A.json`.

    Args:
        folder: with problems.json and pid_splits.json, or with the original's file of conversations.
        split: train, val, test, minival or minitest.
        options: letters of the choices.

    Raises:
        BenchmarkError: if there are no such files, or they can't be read.
    """
    own, splits, converted = list_files(folder, split)
    if own.exists() and splits.exists():
        problems = _read_own_files(own, splits, split, options)
    elif converted.exists():
        problems = _read_conversations(converted, options)
    else:
        raise BenchmarkError(
            f"{folder} holds neither {_PROBLEMS} and {_SPLITS} nor {converted.name}; name the folder that has them"
        )
    if len({problem.question_id for problem in problems}) < len(problems):
        raise BenchmarkError(f"{folder}: ids of the split {split} are repeated; download it again")
    return problems


def find_letter(text: str, options: Sequence[str] = OPTIONS) -> str | None:
    """Return the option that an answer names: "B", "B. ..." or, once, "The answer is B."; else None.

    As in the original, any sign may follow the letter of "The answer is B.", which may be none of the options.
    """
    if text in options:
        return text
    if text[:1] in options and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


def get_pred_idx(prediction: str, choices: Sequence[Any], options: Sequence[str]) -> int:
    """Return the index of an option's letter among as many options as there are choices; -1 if it is not there."""
    letters = list(options[: len(choices)])
    return letters.index(prediction) if prediction in letters else -1


def judge(
    problems: Sequence[Problem], answers: Sequence[AnswerLine], name: str, options: Sequence[str] = OPTIONS
) -> list[Judged]:
    """Pair problems with their answers by id, and read the letters.

    Args:
        problems: from `read_science_problems`.
        answers: in any order; their prompts hold the questions.
        name: of the answer file, for messages.
        options: letters of the choices.

    Raises:
        BenchmarkError: if the files don't belong together.
    """
    questions = [QuestionLine(problem.question_id, problem.text, problem.image, {}) for problem in problems]
    pairs = pair_lines(questions, drop_instructions(questions, answers), name)
    as_given = {answer.question_id: answer for answer in answers}
    return [
        Judged(problem, as_given[answer.question_id], find_letter(answer.text, options) or FAILED)
        for problem, (_, answer) in zip(problems, pairs, strict=True)
    ]


def score_scienceqa(
    problems: Sequence[Problem], answers: Sequence[AnswerLine], name: str, options: Sequence[str] = OPTIONS
) -> BenchmarkResult:
    """Return the accuracy of questions with an image, of all and of those with text alone; arguments as in `judge`."""
    return build_result(judge(problems, answers, name, options))


def build_result(judged: Sequence[Judged]) -> BenchmarkResult:
    """Return the accuracies of judged answers."""
    scores = tuple(
        QuestionScore(
            one.problem.question_id,
            one.problem.question_id,
            TEXT_ALONE if one.problem.image is None else WITH_IMAGE,
            float(one.is_right),
        )
        for one in judged
    )
    parts = {kind: [score for score in scores if score.kind == kind] for kind in (WITH_IMAGE, TEXT_ALONE)}
    figures = [accuracy_figure("accuracy", scores)]
    if parts[WITH_IMAGE]:
        figures.insert(0, accuracy_figure(f"accuracy, {WITH_IMAGE}", parts[WITH_IMAGE]))
    if parts[TEXT_ALONE]:
        figures.append(accuracy_figure(f"accuracy, {TEXT_ALONE}", parts[TEXT_ALONE]))
    answers = [one.answer for one in judged]
    failed = sum(one.letter == FAILED and not one.answer.error for one in judged)
    notes = (f"{failed} of {len(judged)} answers name no option and count as wrong",) if failed else ()
    return BenchmarkResult(tuple(figures), scores, (*notes, *count_errors(answers)))


def format_analyses(judged: Sequence[Judged]) -> dict[str, list[dict[str, Any]]]:
    """Return what the original writes to --output-file: each answer with its letter, right ones and wrong ones."""
    analyses: dict[str, list[dict[str, Any]]] = {"correct": [], "incorrect": []}
    for one in judged:
        analyses["correct" if one.is_right else "incorrect"].append(
            {
                "question_id": one.problem.question_id,
                "parsed_ans": one.letter,
                "ground_truth": one.problem.answer,
                "question": one.answer.prompt,
                "pred": one.answer.text,
                "is_multimodal": one.problem.image is not None,
            }
        )
    return analyses


def format_indices(judged: Sequence[Judged], options: Sequence[str] = OPTIONS) -> dict[str, Any]:
    """Return what the original writes to --output-result: accuracy in percent, and the index of each option read."""
    correct = sum(one.is_right for one in judged)
    return {
        "acc": correct / len(judged) * 100,
        "correct": correct,
        "count": len(judged),
        "results": {
            one.problem.question_id: get_pred_idx(one.letter, range(one.problem.choices), options) for one in judged
        },
        "outputs": {one.problem.question_id: one.answer.text for one in judged},
    }


def _read_own_files(path: Path, split_path: Path, split: str, options: Sequence[str]) -> list[Problem]:
    entries, splits = read_json_document(path), read_json_document(split_path)
    ids = splits.get(split) if isinstance(splits, dict) else None
    if not isinstance(ids, list) or not ids:
        known = show_list(list(splits)) if isinstance(splits, dict) else "none"
        raise BenchmarkError(f"{split_path} has no split {show(split)}; it has {known}")
    if not isinstance(entries, dict):
        raise BenchmarkError(f"{path} is not an object of problems; download it again")
    return convert_entries(
        path, "problem of the split", map(str, ids), lambda key: _read_own_entry(key, entries.get(key), options)
    )


def _read_own_entry(question_id: str, entry: Any, options: Sequence[str]) -> Problem:
    fields = entry if isinstance(entry, dict) else {}
    text, choices, answer, image = (fields.get(key) for key in ("question", "choices", "answer", "image"))
    if not isinstance(text, str) or not isinstance(choices, list) or not isinstance(image, str | None):
        raise ValueError(f"{show(question_id)} has no 'question' and 'choices'")
    most = min(len(choices), len(options))
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < most:
        raise ValueError(f"{show(question_id)} has the answer {show(answer)}, not the index of one of {most} options")
    return Problem(question_id, text, image or None, len(choices), options[answer])


def _read_conversations(path: Path, options: Sequence[str]) -> list[Problem]:
    return convert_entries(path, "record", read_science_records(path), lambda record: _read_problem(record, options))


def _read_problem(record: ScienceRecord, options: Sequence[str]) -> Problem:
    letter = find_letter(record.right or "", options)
    if letter is None or letter not in options:
        raise ValueError(f"the second turn is {show(record.right)}, not the letter of one of {len(options)} options")
    choices = sum(1 for _ in takewhile(lambda option: f"\n{option}. " in record.text, options))
    return Problem(str(record.question_id), record.text, record.image, choices, letter)
