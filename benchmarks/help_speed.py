"""Measure what `--help` and a wrong flag of every program cost: processor seconds, of a process of its own.

Processor time (user and system) hardly depends on what else the machine does. With --root another checkout is measured.

Example: python benchmarks/help_speed.py --runs 5
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("scripts", "examples", "llava")
WRONG_FLAG = "--no_such_flag"
_GUARD = 'if __name__ == "__main__":'


def find_programs(root: Path) -> list[list[str]]:
    """Return the arguments of Python that run each program of a checkout, its benchmarks left out."""
    files = sorted([*root.glob("*.py"), *(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))])
    programs = [path.relative_to(root) for path in files if _GUARD in path.read_text(encoding="utf-8")]
    return [_arguments(path) for path in programs]


def _arguments(path: Path) -> list[str]:
    if path.parts[0] != "llava" or path.name == "train_mem.py":  # the launchers of training run its file
        return [path.as_posix()]
    return ["-m", ".".join(path.with_suffix("").parts).removesuffix(".__main__")]


def measure(root: Path, words: Sequence[str]) -> float:
    """Run Python in a checkout; return the processor seconds of the process.

    Raises:
        RuntimeError: if it ends with another code than 0 (help) or 2 (wrong usage).
    """
    before = os.times()
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True)
    after = os.times()
    if done.returncode not in (0, 2):
        raise RuntimeError(f"{' '.join(words)} ended with code {done.returncode}:\n{done.stderr}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of programs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to measure (default: this one)")
    parser.add_argument("--runs", type=int, default=3, help="runs, of which the median counts (default: %(default)s)")
    options = parser.parse_args(argv)
    root = options.root.resolve()
    print("| program | --help | wrong flag |\n| --- | --- | --- |")
    for program in find_programs(root):
        seconds = [
            statistics.median(measure(root, [*program, flag]) for _ in range(options.runs))
            for flag in ("--help", WRONG_FLAG)
        ]
        print(f"| `{' '.join(program)}` | {seconds[0]:.2f} s | {seconds[1]:.2f} s |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
