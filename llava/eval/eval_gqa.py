"""Score answers to GQA's balanced test-dev questions: accuracy of all, of binary and of open questions.

Answers are joined with questions by id, and their prompts have to hold the questions. GQA's own program takes the
prediction file of scripts/convert_gqa_for_eval.py.

Example:
    python -m llava.eval.eval_gqa --result-file answers.jsonl \\
        --annotation-file playground/data/eval/gqa/data/testdev_balanced_questions.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.eval.benchmarks.catalog import find_benchmark
from llava.eval.benchmarks.gqa import read_gqa_questions, score_gqa
from llava.eval.benchmarks.lines import read_answer_lines
from llava.eval.benchmarks.text import format_result
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text
from llava.inference.command_line import run_program


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python -m llava.eval.eval_gqa", __doc__)
    add = parser.add_argument
    add("--annotation-file", required=True, metavar="JSON", help="testdev_balanced_questions.json of GQA's questions")
    add("--result-file", required=True, metavar="JSONL", help="answers to all of them")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the scores; return the exit code: 0 scored, 2 files that can't be used."""
    options = build_parser().parse_args(argv)
    return run_program(lambda: print_scores(options.annotation_file, options.result_file))


def print_scores(annotation_file: str, result_file: str) -> None:
    """Print the accuracies of an answer file.

    Raises:
        BenchmarkError: if files can't be read or don't belong together.
    """
    result = score_gqa(read_gqa_questions(annotation_file), read_answer_lines(result_file), result_file)
    print_text(f"Samples: {len(result.questions)}\nAccuracy: {result.figures[0].value:.2f}%\n")
    print_text(format_result(result, find_benchmark("gqa").published.small))


if __name__ == "__main__":
    raise SystemExit(main())
