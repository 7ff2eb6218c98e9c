#!/usr/bin/env python3
"""Write MMBench's submission file (.xlsx), and print the circular accuracy if the table has true answers.

Files: RESULT_DIR/EXPERIMENT.jsonl holds the answers, UPLOAD_DIR/EXPERIMENT.xlsx is written.

Example:
    python scripts/convert_mmbench_for_submission.py \\
        --annotation-file playground/data/eval/mmbench/mmbench_dev_20230712.tsv \\
        --result-dir playground/data/eval/mmbench/answers/mmbench_dev_20230712 \\
        --upload-dir playground/data/eval/mmbench/answers_upload/mmbench_dev_20230712 --experiment llava-v1.5-7b
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.eval.benchmarks.lines import read_answer_lines
from llava.eval.benchmarks.mmbench.score import convert_mmbench, has_true_answers, score_mmbench
from llava.eval.benchmarks.mmbench.table import read_mmbench_table
from llava.eval.benchmarks.submission import write_xlsx
from llava.eval.benchmarks.text import format_result
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text
from llava.inference.command_line import run_program


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python scripts/convert_mmbench_for_submission.py", __doc__)
    add = parser.add_argument
    add("--annotation-file", required=True, metavar="TSV", help="MMBench's table that was answered")
    add("--result-dir", required=True, metavar="DIR", help="folder of the answers")
    add("--upload-dir", required=True, metavar="DIR", help="folder of the submission file")
    add("--experiment", required=True, metavar="NAME", help="name of both files, without ending")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; return the exit code: 0, or 2 if an input or the output can't be used."""
    parser = build_parser()
    args = expand_homes(parser.parse_args(argv), "annotation_file", "result_dir", "upload_dir")
    answers = Path(args.result_dir, f"{args.experiment}.jsonl")
    upload = Path(args.upload_dir, f"{args.experiment}.xlsx")
    inputs = {"--annotation-file": args.annotation_file, "--result-dir": answers}
    if message := find_overwrite({"--upload-dir": output_file(upload)}, inputs):
        parser.error(message)
    return run_program(lambda: convert(args.annotation_file, answers, upload))


def convert(table: str, answers: Path, upload: Path) -> None:
    """Write the submission file, then print the accuracy.

    Args:
        table: MMBench's.
        answers: answers file.
        upload: submission file.

    Raises:
        BenchmarkError: if the files don't belong together, or can't be read.
        OSError: if the submission file can't be written.
    """
    rows, given = read_mmbench_table(table), read_answer_lines(answers)
    submission, notes = convert_mmbench(rows, given, str(answers))
    result = score_mmbench(rows, given, str(answers)) if has_true_answers(rows) else None
    notes = (*notes, *write_xlsx(upload, submission))
    print_text("\n".join([*notes, f"wrote {upload}: {len(rows)} answers"]))
    if result:
        print_text(format_result(result))
    else:
        print_text(f"{table} has no true answers: MMBench's server scores this split")


if __name__ == "__main__":
    raise SystemExit(main())
