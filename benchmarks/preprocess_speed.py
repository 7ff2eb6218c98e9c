"""Measure the preprocessing of a table: the whole program in a process of its own, and its core.

Example: python benchmarks/preprocess_speed.py --input playground/data_train/Train_Qs.csv --runs 9
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLES = (ROOT.parent / "shared/data/Train_Qs.csv", ROOT / "playground/data_train/Train_Qs.csv")


def measure_seconds(action: Callable[[], object], runs: int) -> list[float]:
    """Call `action` `runs` times and return the seconds of each call."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return seconds


def build_parser(description: str, runs: int) -> argparse.ArgumentParser:
    """Return a parser of a table and of the number of runs, `runs` being the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = next((path for path in TABLES if path.is_file()), TABLES[-1])
    parser.add_argument("--input", type=Path, default=default, help="table to read (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=runs, help="runs of each kind (default: %(default)s)")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says; it ends the program if there is no such table or nothing to run."""
    args = parser.parse_args(argv)
    if not args.input.is_file():
        parser.error(f"--input {args.input}: no such file")
    if args.runs < 1:
        parser.error(f"--runs {args.runs}: must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Print medians and ranges in seconds; return the exit code."""
    args = parse(build_parser(__doc__, runs=9), argv)
    sys.path.insert(0, str(ROOT))
    from llava.data.table.read import read_table
    from llava.data.table.write import format_training_json

    rows = read_table(args.input).rows
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(ROOT / "task_data_preprocessing.py")]
        command += ["--input", str(args.input), "--output", str(Path(directory) / "data.json")]
        actions = {
            "whole program": lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL),
            "core: csv -> rows": lambda: read_table(args.input),
            "core: rows -> json": lambda: list(format_training_json(rows)),
        }
        print(f"{args.input}: {len(rows):,} rows; Python {platform.python_version()}, {os.cpu_count()} CPUs")
        for name, action in actions.items():
            seconds = measure_seconds(action, args.runs)
            print(
                f"{name:20} median {statistics.median(seconds):.3f} s   "
                f"({min(seconds):.3f} to {max(seconds):.3f}, {args.runs} runs)"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
