#!/usr/bin/env python3
"""Write VizWiz's submission file from answers of its test split, or score answers of its validation split.

Example:
    python scripts/convert_vizwiz_for_submission.py --annotation-file playground/data/eval/vizwiz/llava_test.jsonl \\
        --result-file playground/data/eval/vizwiz/answers/llava-v1.5-7b.jsonl \\
        --result-upload-file playground/data/eval/vizwiz/answers_upload/llava-v1.5-7b.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.eval.benchmarks.lines import read_answer_lines, read_question_lines
from llava.eval.benchmarks.submission import write_json_document
from llava.eval.benchmarks.text import format_result
from llava.eval.benchmarks.vizwiz import convert_vizwiz, read_vizwiz_annotations, score_vizwiz
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text
from llava.inference.command_line import run_program


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python scripts/convert_vizwiz_for_submission.py", __doc__)
    add = parser.add_argument
    add("--annotation-file", required=True, metavar="JSONL", help="question file that was answered")
    add("--result-file", required=True, metavar="JSONL", help="answers")
    add("--result-upload-file", required=True, metavar="JSON", help="submission file to write")
    add("--ground-truth", metavar="JSON", help="VizWiz's val.json: also print the accuracy (default: not scored)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; return the exit code: 0, or 2 if an input or the output can't be used."""
    parser = build_parser()
    args = parser.parse_args(argv)
    expand_homes(args, "annotation_file", "result_file", "result_upload_file", "ground_truth")
    inputs = {
        "--annotation-file": args.annotation_file,
        "--result-file": args.result_file,
        "--ground-truth": args.ground_truth,
    }
    if message := find_overwrite({"--result-upload-file": output_file(args.result_upload_file)}, inputs):
        parser.error(message)
    return run_program(lambda: convert(args))


def convert(args: argparse.Namespace) -> None:
    """Write the submission file, then print the accuracy if the true answers are given.

    Raises:
        BenchmarkError: if the files don't belong together, or can't be read.
        OSError: if the submission file can't be written.
    """
    questions, answers = read_question_lines(args.annotation_file), read_answer_lines(args.result_file)
    entries, notes = convert_vizwiz(questions, answers, args.result_file)
    truths = read_vizwiz_annotations(args.ground_truth) if args.ground_truth else None
    result = score_vizwiz(questions, answers, truths, args.result_file) if truths else None
    write_json_document(args.result_upload_file, entries)
    print_text("\n".join([*notes, f"wrote {args.result_upload_file}: {len(entries)} answers"]))
    if result:
        print_text(format_result(result))


if __name__ == "__main__":
    raise SystemExit(main())
