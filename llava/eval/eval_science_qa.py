"""Score answers to ScienceQA: accuracy of questions with an image, of all, and of those with text alone.

The option's letter is read from "B", "B. ..." and "The answer is B."; an answer that names none counts as wrong.
--base-dir holds problems.json and pid_splits.json, or the original's llava_<split>_CQM-A.json.

Example:
    python -m llava.eval.eval_science_qa --base-dir playground/data/eval/scienceqa --result-file answers.jsonl \\
        --output-file answers_output.json --output-result answers_result.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.eval.benchmarks.catalog import find_benchmark
from llava.eval.benchmarks.lines import read_answer_lines
from llava.eval.benchmarks.scienceqa.score import (
    OPTIONS,
    WITH_IMAGE,
    build_result,
    format_analyses,
    format_indices,
    judge,
    list_files,
    read_science_problems,
)
from llava.eval.benchmarks.submission import write_json_document
from llava.eval.benchmarks.text import format_result
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text
from llava.inference.command_line import run_program
from llava.original_names import lazy_names

__getattr__ = lazy_names(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python -m llava.eval.eval_science_qa", __doc__)
    add = parser.add_argument
    add("--base-dir", required=True, metavar="DIR", help="folder of ScienceQA's files")
    add("--result-file", required=True, metavar="JSONL", help="answers to all questions of the split")
    add("--output-file", metavar="JSON", help="also write right and wrong answers with letters (default: no file)")
    add("--output-result", metavar="JSON", help="also write accuracy and the options' indices (default: no file)")
    add("--split", default="test", metavar="NAME", help="test, val, train, minitest, minival (default: %(default)s)")
    add("--options", type=parse_options, default=OPTIONS, metavar="ABC", help="letters of the choices (default: ABCDE)")
    return parser


def parse_options(text: str) -> tuple[str, ...]:
    """Return the letters of a text, one for each choice.

    Raises:
        argparse.ArgumentTypeError: if there are none, or one stands twice.
    """
    if not text or len(set(text)) < len(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not one letter for each choice, such as ABCDE")
    return tuple(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the scores; return the exit code: 0 scored, 2 files that can't be used."""
    parser = build_parser()
    args = parser.parse_args(argv)
    expand_homes(args, "base_dir", "result_file", "output_file", "output_result")
    written = {"--output-file": args.output_file, "--output-result": args.output_result}
    outputs = {flag: output_file(path) for flag, path in written.items() if path is not None}
    inputs = {"--base-dir": list_files(args.base_dir, args.split), "--result-file": args.result_file}
    if message := find_overwrite(outputs, inputs):
        parser.error(message)
    return run_program(lambda: print_scores(args))


def print_scores(args: argparse.Namespace) -> None:
    """Print the accuracies, and write the files that are asked for.

    Raises:
        BenchmarkError: if files can't be read or don't belong together.
        OSError: if a file can't be written.
    """
    problems = read_science_problems(args.base_dir, args.split, args.options)
    judged = judge(problems, read_answer_lines(args.result_file), args.result_file, args.options)
    result = build_result(judged)
    if args.output_file is not None:
        write_json_document(args.output_file, format_analyses(judged), indent=2)
    if args.output_result is not None:
        write_json_document(args.output_result, format_indices(judged, args.options), indent=2)
    values = {figure.name: f"{figure.value:.2f}%" for figure in result.figures}
    with_image = values.get(f"accuracy, {WITH_IMAGE}")
    correct = sum(one.is_right for one in judged)
    line = f"Total: {len(judged)}, Correct: {correct}, Accuracy: {values['accuracy']}"
    print_text(f"{line}, IMG-Accuracy: {with_image}\n" if with_image else f"{line}\n")
    print_text(format_result(result, find_benchmark("scienceqa").published.small if with_image else None))


if __name__ == "__main__":
    raise SystemExit(main())
