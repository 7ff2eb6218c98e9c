"""Score answers to POPE: F1, accuracy, precision, recall and yes ratio of each split, and their means.

Answers are joined with questions by id and text, and questions with annotations by image and text. Questions without
an annotation are left out and named. An answer is no if its first sentence has the word "no" or "not", else yes; an
answer that is an error counts as wrong.

Example:
    python -m llava.eval.eval_pope --annotation-dir playground/data/eval/pope/coco \\
        --question-file playground/data/eval/pope/llava_pope_test.jsonl --result-file answers.jsonl
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from llava.eval.benchmarks.catalog import find_benchmark
from llava.eval.benchmarks.lines import BenchmarkError, QuestionLine, plain_text, read_answer_lines, read_question_lines
from llava.eval.benchmarks.pope import (
    SPLITS,
    Judged,
    build_result,
    format_split,
    judge,
    read_label_lines,
    read_pope_labels,
    read_yes_no,
)
from llava.eval.benchmarks.text import format_result
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text
from llava.inference.command_line import run_program


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python -m llava.eval.eval_pope", __doc__)
    add = parser.add_argument
    add("--annotation-dir", required=True, metavar="DIR", help="folder of coco_pope_<split>.json, as in RUCAIBox/POPE")
    add("--question-file", required=True, metavar="JSONL", help="questions; their category is the split")
    add("--result-file", required=True, metavar="JSONL", help="answers to the question file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the scores; return the exit code: 0 scored, 2 files that can't be used."""
    options = build_parser().parse_args(argv)
    return run_program(lambda: print_scores(options.annotation_dir, options.question_file, options.result_file))


def print_scores(annotation_dir: str, question_file: str, result_file: str) -> None:
    """Print what the original prints for each split, then all figures with their intervals.

    Raises:
        BenchmarkError: if files can't be read or don't belong together.
    """
    questions, answers = read_question_lines(question_file), read_answer_lines(result_file)
    by_split, notes = judge(questions, answers, read_pope_labels(annotation_dir), result_file)
    for split, judged in by_split.items():
        print_text(f"Category: {split}, # samples: {len(judged)}\n{format_split(judged)}\n{'=' * 36}")
    published = find_benchmark("pope").published.small if set(by_split) == set(SPLITS) else None
    print_text(format_result(build_result(by_split, notes), published))


def eval_pope(answers: Sequence[Mapping[str, Any]], label_file: str | os.PathLike[str]) -> None:
    """Print the figures of answers to one split, as the original's function of this name.

    Args:
        answers: `{text, prompt}`, one for each annotation, in the same order.
        label_file: annotations, JSON lines `{image, text, label}`.

    Raises:
        BenchmarkError: if the answers are not those to the annotations, line by line.
    """
    labels = read_label_lines(label_file)
    asked = [str(answer.get("prompt") or label["text"]) for answer, label in zip(answers, labels, strict=False)]
    others = sum(
        plain_text(label["text"]) not in plain_text(prompt) for prompt, label in zip(asked, labels, strict=False)
    )
    if len(answers) != len(labels) or others:
        raise BenchmarkError(
            f"{label_file}: {len(labels)} annotations, {len(answers)} answers, {others} of other questions; join them "
            "by image and question: python -m llava.eval.eval_pope --question-file QUESTIONS"
        )
    judged = []
    for answer, label in zip(answers, labels, strict=True):
        question = QuestionLine(0, label["text"], label["image"], label)
        judged.append(Judged(question, label["label"], None if answer.get("error") else read_yes_no(answer["text"])))
    print_text(format_split(judged))


if __name__ == "__main__":
    raise SystemExit(main())
