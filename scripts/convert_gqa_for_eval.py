#!/usr/bin/env python3
"""Write the prediction file of GQA's own program from answers: lower case, without a full stop at the end.

Example:
    python scripts/convert_gqa_for_eval.py --src answers.jsonl \\
        --dst playground/data/eval/gqa/data/testdev_balanced_predictions.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.eval.benchmarks.gqa import convert_gqa
from llava.eval.benchmarks.lines import read_answer_lines
from llava.eval.benchmarks.submission import write_json_document
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text
from llava.inference.command_line import run_program


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python scripts/convert_gqa_for_eval.py", __doc__)
    parser.add_argument("--src", required=True, metavar="JSONL", help="answers")
    parser.add_argument("--dst", required=True, metavar="JSON", help="prediction file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; return the exit code: 0, or 2 if an input or the output can't be used."""
    parser = build_parser()
    args = expand_homes(parser.parse_args(argv), "src", "dst")
    if message := find_overwrite({"--dst": output_file(args.dst)}, {"--src": args.src}):
        parser.error(message)
    return run_program(lambda: convert(args.src, args.dst))


def convert(src: str, dst: str) -> None:
    """Write the prediction file.

    Raises:
        BenchmarkError: if the answers can't be read, or have two of a question.
        OSError: if the file can't be written.
    """
    predictions, notes = convert_gqa(read_answer_lines(src), src)
    write_json_document(dst, predictions)
    print_text("\n".join([*notes, f"wrote {dst}: {len(predictions)} predictions"]))


if __name__ == "__main__":
    raise SystemExit(main())
