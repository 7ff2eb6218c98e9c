#!/usr/bin/env python3
"""Write VQAv2's submission file from answers of a split of its test set, such as test-dev.

The server takes the whole test set only, so its other questions get empty answers. Files, as in the original:

    DIR/llava_vqav2_mscoco_test2015.jsonl    questions of the whole test set
    DIR/SPLIT.jsonl                          questions of the split; if it is there, all must be answered
    DIR/answers/SPLIT/CKPT/merge.jsonl       answers
    DIR/answers_upload/SPLIT/CKPT.json       written

Answers of the validation split are scored with python -m llava.eval.vqa_score.

Example:
    python scripts/convert_vqav2_for_submission.py --split llava_vqav2_mscoco_test-dev2015 --ckpt llava-v1.5-7b
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.eval.benchmarks.lines import read_answer_lines, read_question_lines
from llava.eval.benchmarks.submission import write_json_document
from llava.eval.benchmarks.vqav2 import convert_vqav2
from llava.files.home_directory import expand_home
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.regular_files import is_file
from llava.files.terminal_text import print_text
from llava.inference.command_line import run_program

_TEST_SET = "llava_vqav2_mscoco_test2015.jsonl"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python scripts/convert_vqav2_for_submission.py", __doc__)
    add = parser.add_argument
    add("--dir", default="./playground/data/eval/vqav2", help="folder of the benchmark (default: %(default)s)")
    add("--ckpt", required=True, metavar="NAME", help="name of the answered checkpoint, a folder of answers")
    add("--split", required=True, metavar="NAME", help="name of the answered split's question file, without .jsonl")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; return the exit code: 0, or 2 if an input or the output can't be used."""
    parser = build_parser()
    args = parser.parse_args(argv)
    folder = Path(expand_home(args.dir))
    test_set, split = folder / _TEST_SET, folder / f"{args.split}.jsonl"
    answers = folder / "answers" / args.split / args.ckpt / "merge.jsonl"
    upload = folder / "answers_upload" / args.split / f"{args.ckpt}.json"
    if message := find_overwrite({"--ckpt": output_file(upload)}, {"--dir": [test_set, split], "--split": answers}):
        parser.error(message)
    return run_program(lambda: convert(test_set, split, answers, upload))


def convert(test_set: Path, split: Path, answers: Path, upload: Path) -> None:
    """Write the submission file.

    Args:
        test_set: question file of the whole test set.
        split: question file that was answered; need not exist.
        answers: answers file.
        upload: submission file.

    Raises:
        BenchmarkError: if the files don't belong together, or can't be read.
        OSError: if the submission file can't be written.
    """
    asked = read_question_lines(split) if is_file(split) else None
    entries, notes = convert_vqav2(read_question_lines(test_set), read_answer_lines(answers), str(answers), asked)
    if asked is None:
        notes = (*notes, f"{split} is not there: whether the whole split is answered is not checked")
    write_json_document(upload, entries)
    print_text("\n".join([*notes, f"wrote {upload}: {len(entries)} answers"]))


if __name__ == "__main__":
    raise SystemExit(main())
