#!/usr/bin/env python3
"""Write the results file that MM-Vet's official evaluation grades with GPT-4.

Example:
    python scripts/convert_mmvet_for_eval.py --src playground/data/eval/mm-vet/answers/llava-v1.5-7b.jsonl \\
        --dst playground/data/eval/mm-vet/results/llava-v1.5-7b.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.eval.benchmarks.lines import read_answer_lines, read_question_lines
from llava.eval.benchmarks.mmvet import convert_mmvet
from llava.eval.benchmarks.submission import write_json_document
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text
from llava.inference.command_line import run_program


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python scripts/convert_mmvet_for_eval.py", __doc__)
    add = parser.add_argument
    add("--src", required=True, metavar="JSONL", help="answers")
    add("--dst", required=True, metavar="JSON", help="results file to write")
    add("--question-file", metavar="JSONL", help="check that all its questions are answered (default: not checked)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; return the exit code: 0, or 2 if an input or the output can't be used."""
    parser = build_parser()
    args = expand_homes(parser.parse_args(argv), "src", "dst", "question_file")
    inputs = {"--src": args.src, "--question-file": args.question_file}
    if message := find_overwrite({"--dst": output_file(args.dst)}, inputs):
        parser.error(message)
    return run_program(lambda: convert(args))


def convert(args: argparse.Namespace) -> None:
    """Write the results file.

    Raises:
        BenchmarkError: if the files don't belong together, or can't be read.
        OSError: if the results file can't be written.
    """
    questions = read_question_lines(args.question_file) if args.question_file else None
    results, notes = convert_mmvet(read_answer_lines(args.src), args.src, questions)
    write_json_document(args.dst, results, indent=2)
    print_text("\n".join([*notes, f"wrote {args.dst}: {len(results)} answers"]))


if __name__ == "__main__":
    raise SystemExit(main())
