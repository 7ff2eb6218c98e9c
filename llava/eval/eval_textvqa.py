"""Score answers to TextVQA: accuracy over ten true answers, as M4C's evaluator counts it.

Answers are joined with annotations by image and question. Give one answer file, a folder of them, or both.

Example:
    python -m llava.eval.eval_textvqa --annotation-file playground/data/eval/textvqa/TextVQA_0.5.1_val.json \\
        --result-file playground/data/eval/textvqa/answers/llava-v1.5-7b.jsonl
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from llava.eval.benchmarks.catalog import find_benchmark
from llava.eval.benchmarks.lines import BenchmarkError, read_answer_lines
from llava.eval.benchmarks.text import format_result
from llava.eval.benchmarks.textvqa import read_textvqa_annotations, score_textvqa
from llava.files.home_directory import expand_home
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text, report_error
from llava.inference.command_line import REFUSED, run_program
from llava.original_names import lazy_names

__getattr__ = lazy_names(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python -m llava.eval.eval_textvqa", __doc__)
    add = parser.add_argument
    add("--annotation-file", required=True, metavar="JSON", help="TextVQA_0.5.1_val.json")
    add("--result-file", metavar="JSONL", help="answers to score (default: those of --result-dir)")
    add("--result-dir", metavar="DIR", help="folder whose .jsonl files are scored one by one (default: none)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the scores; return the exit code: 0 scored, 2 a file can't be used."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.result_file is None and options.result_dir is None:
        parser.error("nothing to score; give --result-file or --result-dir")
    return run_program(lambda: score_files(options.annotation_file, options.result_file, options.result_dir))


def score_files(annotation_file: str, result_file: str | None, result_dir: str | None) -> int:
    """Print the scores of a file and of a folder's files; one that can't be used is reported, and the others scored.

    Raises:
        OSError: if the folder can't be read.
    """
    paths = [] if result_file is None else [Path(result_file)]
    for path in sorted(Path(expand_home(result_dir)).iterdir()) if result_dir is not None else ():
        if path.suffix == ".jsonl":
            paths.append(path)
        else:
            print_text(f"Skipping {path.name}")
    code = 0 if paths else REFUSED
    if not paths:
        report_error(f"{result_dir} holds no .jsonl file; name the folder of the answer files with --result-dir")
    for path in paths:
        try:
            eval_single(annotation_file, path)
        except BenchmarkError as error:
            report_error(error)
            code = REFUSED
    return code


def eval_single(annotation_file: str | os.PathLike[str], result_file: str | os.PathLike[str]) -> None:
    """Print the accuracy of an answer file.

    Raises:
        BenchmarkError: if a file can't be read, or they don't belong together.
    """
    print_text(Path(result_file).stem)
    annotations, answers = read_textvqa_annotations(annotation_file), read_answer_lines(result_file)
    result = score_textvqa(annotations, answers, os.fspath(result_file))
    print_text(f"Samples: {len(result.questions)}\nAccuracy: {result.figures[0].value:.2f}%\n")
    print_text(format_result(result, find_benchmark("textvqa").published.small))


if __name__ == "__main__":
    raise SystemExit(main())
