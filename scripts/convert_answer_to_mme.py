#!/usr/bin/env python3
"""Score MME, and write the answer files that its official calculation.py reads. Files, as in the original:

    DIR/MME_Benchmark_release_version/            questions with true answers, as MME publishes them
    DIR/answers/EXPERIMENT.jsonl                  answers to DIR/llava_mme.jsonl
    DIR/eval_tool/answers/EXPERIMENT/TASK.txt     written; other files there stay

Example:
    python scripts/convert_answer_to_mme.py --experiment llava-v1.5-7b
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.eval.benchmarks.lines import read_answer_lines
from llava.eval.benchmarks.mme import TASKS, format_mme_files, read_mme_truths, score_mme
from llava.eval.benchmarks.text import format_result
from llava.files.atomic_files import atomic_write
from llava.files.home_directory import expand_home
from llava.files.overwrite_check import find_overwrite, shared_directory
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text
from llava.inference.command_line import run_program


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python scripts/convert_answer_to_mme.py", __doc__)
    add = parser.add_argument
    add("--experiment", required=True, metavar="NAME", help="name of the answers file, without .jsonl")
    add("--dir", default="./playground/data/eval/MME", help="folder of the benchmark (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; return the exit code: 0, or 2 if an input or the output can't be used."""
    parser = build_parser()
    args = parser.parse_args(argv)
    folder = Path(expand_home(args.dir))
    answers, results = folder / f"answers/{args.experiment}.jsonl", folder / "eval_tool/answers" / args.experiment
    names = [f"{task}.txt" for tasks in TASKS.values() for task in tasks]
    if message := find_overwrite({"--experiment": shared_directory(results, names)}, {"--dir": answers}):
        parser.error(message)
    return run_program(lambda: convert(folder / "MME_Benchmark_release_version", answers, results))


def convert(benchmark: Path, answers: Path, results: Path) -> None:
    """Write the answer files, then print the points.

    Args:
        benchmark: folder with the true answers.
        answers: answers file.
        results: folder of the files.

    Raises:
        BenchmarkError: if the files don't belong together, or can't be read.
        OSError: if a file can't be written.
    """
    truths, given = read_mme_truths(benchmark), read_answer_lines(answers)
    result = score_mme(given, truths, str(answers))
    files = format_mme_files(given, truths, str(answers))
    for name, text in files.items():
        with atomic_write(results / name) as stream:
            stream.write(text)
    print_text(format_result(result))
    print_text(f"wrote {len(files)} files into {results}")


if __name__ == "__main__":
    raise SystemExit(main())
