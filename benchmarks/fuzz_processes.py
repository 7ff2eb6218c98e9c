"""Run numbered inputs in worker processes; a crash, a hang or a slow run is a finding and leaves the other inputs.

A fuzzing program starts itself again with `--first N`, as the worker of a range of inputs, and prints one outcome a
line. A worker that dies is replaced by another one, which goes on after the input that killed it.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HANG = 10  # times --seconds, after which a worker ends itself with a traceback


class Outcome(NamedTuple):
    """Result of one input: what happened, the seconds it took, whether it is a finding, the input in words."""

    number: int
    result: str
    seconds: float
    is_finding: bool
    what: str = ""


def add_arguments(parser: argparse.ArgumentParser, *, count: int, seconds: float, keep: str) -> None:
    """Add the flags that all fuzzing programs share, with these defaults."""
    add = parser.add_argument
    add("--count", type=int, default=count, help="inputs (default: %(default)s)")
    add("--start", type=int, default=0, help="number of the first input (default: %(default)s)")
    add("--seed", type=int, default=0, help="another seed gives other inputs (default: %(default)s)")
    add("--workers", type=int, default=1, help="processes (default: %(default)s)")
    add("--seconds", type=float, default=seconds, help="longest run of an input (default: %(default)s)")
    add("--keep", type=Path, default=Path(keep), help="directory for findings (default: %(default)s)")
    add("--first", type=int, help=argparse.SUPPRESS)  # this process is a worker


def run_worker(options: argparse.Namespace, attempt: Callable[[int], tuple[str, bool, str]]) -> int:
    """Try the inputs from --first on and print each outcome as a line; return the exit code.

    Args:
        options: of the command line.
        attempt: number of an input -> result, whether it is a finding, the input in words.
    """
    warnings.simplefilter("ignore")
    for number in range(options.first, options.first + options.count):
        faulthandler.dump_traceback_later(HANG * options.seconds, exit=True)
        start = time.perf_counter()
        result, is_finding, what = attempt(number)
        seconds = time.perf_counter() - start
        faulthandler.cancel_dump_traceback_later()
        is_slow = seconds > options.seconds
        print(json.dumps(Outcome(number, result, seconds, is_finding or is_slow, what)), flush=True)
    return 0


def run_range(command: Sequence[str], first: int, count: int) -> list[Outcome]:
    """Return the outcomes of a range of inputs, of a worker of its own; an input that kills it is a finding.

    Args:
        command: of the worker, without --first and --count.
        first: number of the first input.
        count: number of inputs.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < count:
        number = first + len(outcomes)
        words = [*command, "--first", str(number), "--count", str(count - len(outcomes))]
        process = subprocess.run(words, capture_output=True, text=True, errors="replace")
        outcomes += [Outcome(*json.loads(line)) for line in process.stdout.splitlines() if line.startswith("[")]
        if process.returncode:
            print(process.stderr[-2_000:], file=sys.stderr)
            number = first + len(outcomes)
            outcomes.append(Outcome(number, f"the process ended with {process.returncode}", 0.0, True))
    return outcomes


def run_workers(options: argparse.Namespace, command: Sequence[str], per_process: int) -> Iterator[Outcome]:
    """Yield the outcome of every input in order, `per_process` of them from each worker."""
    end = options.start + options.count
    starts = range(options.start, end, per_process)
    sizes = [min(per_process, end - start) for start in starts]
    words = [sys.executable, *command, "--seed", str(options.seed), "--seconds", str(options.seconds)]
    with ThreadPoolExecutor(options.workers) as pool:
        for outcomes in pool.map(functools.partial(run_range, words), starts, sizes):
            yield from outcomes


def report(options: argparse.Namespace, outcomes: Iterator[Outcome], keep: Callable[[int], Path]) -> int:
    """Print each finding, then the counts of all results; return the exit code.

    Args:
        options: of the command line.
        outcomes: of all inputs.
        keep: writes the input of a finding and returns where.
    """
    results: Counter[str] = Counter()
    slowest = 0.0
    for outcome in outcomes:
        slowest = max(slowest, outcome.seconds)
        results["FINDING" if outcome.is_finding else outcome.result] += 1
        if outcome.is_finding:
            print(f"{keep(outcome.number)}: {outcome.what} {outcome.result}, {outcome.seconds:.1f} s", flush=True)
    counts = ", ".join(f"{result} {count:,}" for result, count in results.most_common())
    print(f"{sum(results.values()):,} inputs, seed {options.seed}: {counts}")
    print(f"{results['FINDING']} findings; slowest {slowest:.2f} s")
    return int(results["FINDING"] > 0)
