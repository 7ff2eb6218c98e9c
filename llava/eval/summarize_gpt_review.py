"""Summarize reviews of LLaVA-Bench: for each category the relative score, and the mean marks of both answers times ten.

Example:
    python -m llava.eval.summarize_gpt_review \\
        -f playground/data/eval/llava-bench-in-the-wild/reviews/llava-v1.5-7b.jsonl
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from llava.eval.benchmarks.lines import BenchmarkError
from llava.eval.benchmarks.llavabench import format_summary, read_reviews, summarize_reviews
from llava.files.home_directory import expand_homes
from llava.files.program_parser import program_parser
from llava.files.terminal_text import print_text
from llava.inference.command_line import run_program

_NEWER, _OLDER = "0613", "0314"
_STARTS = ("gpt4_text", "reviews_", "review_")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python -m llava.eval.summarize_gpt_review", __doc__)
    add = parser.add_argument
    add("-d", "--dir", metavar="DIR", help="folder of the reviews; without --files all reviews in it")
    add("-v", "--version", choices=(_OLDER, _NEWER), help="only reviews by this version of GPT-4, as their name says")
    add("-s", "--select", nargs="*", metavar="TEXT", help="only reviews whose name holds all of these texts")
    add("-f", "--files", nargs="*", default=[], metavar="JSONL", help="reviews, in --dir if that is given")
    add("-i", "--ignore", nargs="*", default=[], metavar="ID", help="question ids that are left out")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the summaries; return the exit code: 0, or 2 if a file can't be used."""
    parser = build_parser()
    args = expand_homes(parser.parse_args(argv), "dir", "files")
    if not args.files and args.dir is None:
        parser.error("name reviews with --files, or their folder with --dir")
    return run_program(lambda: print_summaries(args))


def print_summaries(args: argparse.Namespace) -> None:
    """Print the summary of each file.

    Raises:
        BenchmarkError: if a file can't be read or is not a reviews file, or none is selected.
    """
    names = args.files or _find_reviews(args.dir)
    selected = [name for name in sorted(names) if _is_selected(_config(name), args.select or (), args.version)]
    if not selected:
        raise BenchmarkError(f"none of {len(names)} files is selected; change --dir, --select or --version")
    for name in selected:
        path = os.path.join(args.dir or "", name)  # noqa: PTH118 - an absolute name stays as it is
        means, notes = summarize_reviews(read_reviews(path), path, args.ignore)
        print_text("\n".join([_config(name), *notes, format_summary(means), "=" * 33]))


def _find_reviews(folder: str) -> list[str]:
    try:
        names = [path.name for path in Path(folder).iterdir()]
    except OSError as error:
        raise BenchmarkError(f"{folder} can't be read ({error.strerror}); give the folder of the reviews") from error
    return [
        name
        for name in names
        if name.endswith(".jsonl") and (name.startswith(_STARTS) or "review" in os.fspath(folder))
    ]


def _config(name: str) -> str:
    return Path(name).name.replace("gpt4_text_", "").replace(".jsonl", "")


def _is_selected(config: str, texts: Sequence[str], version: str | None) -> bool:
    found = _NEWER if _NEWER in config else _OLDER
    return all(text in config for text in texts) and version in (None, found)


if __name__ == "__main__":
    raise SystemExit(main())
