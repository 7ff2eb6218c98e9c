#!/usr/bin/env python3
"""Score SEED-Bench by type of question, and write its submission file.

Example:
    python scripts/convert_seed_for_submission.py --annotation-file playground/data/eval/seed_bench/SEED-Bench.json \\
        --result-file playground/data/eval/seed_bench/answers/llava-v1.5-7b/merge.jsonl \\
        --result-upload-file playground/data/eval/seed_bench/answers_upload/llava-v1.5-7b.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from llava.eval.benchmarks.lines import read_answer_lines
from llava.eval.benchmarks.seed import DATA_TYPES, convert_seed, read_seed_questions, score_seed
from llava.eval.benchmarks.text import format_result
from llava.files.atomic_files import atomic_write
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text
from llava.inference.command_line import run_program


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python scripts/convert_seed_for_submission.py", __doc__)
    add = parser.add_argument
    add("--annotation-file", required=True, metavar="JSON", help="SEED-Bench.json")
    add("--result-file", required=True, metavar="JSONL", help="answers")
    add("--result-upload-file", required=True, metavar="JSONL", help="submission file to write")
    add("--only", choices=DATA_TYPES, help="questions about images or videos alone, if the others were not answered")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; return the exit code: 0, or 2 if an input or the output can't be used."""
    parser = build_parser()
    args = expand_homes(parser.parse_args(argv), "annotation_file", "result_file", "result_upload_file")
    inputs = {"--annotation-file": args.annotation_file, "--result-file": args.result_file}
    if message := find_overwrite({"--result-upload-file": output_file(args.result_upload_file)}, inputs):
        parser.error(message)
    return run_program(lambda: convert(args))


def convert(args: argparse.Namespace) -> None:
    """Write the submission file, then print the accuracies.

    Raises:
        BenchmarkError: if the files don't belong together, or can't be read.
        OSError: if the submission file can't be written.
    """
    questions = read_seed_questions(args.annotation_file, args.only)
    answers = read_answer_lines(args.result_file)
    result = score_seed(questions, answers, args.result_file)
    entries = convert_seed(questions, answers, args.result_file)
    with atomic_write(args.result_upload_file) as stream:
        stream.writelines(json.dumps(entry) + "\n" for entry in entries)
    print_text(format_result(result))
    print_text(f"wrote {args.result_upload_file}: {len(entries)} answers")


if __name__ == "__main__":
    raise SystemExit(main())
