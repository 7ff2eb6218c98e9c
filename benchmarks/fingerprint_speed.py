#!/usr/bin/env python3
"""Measure the fingerprint of a model directory, from the disk and from the page cache, beside reading all of it.

Example: python benchmarks/random_checkpoint.py --output /tmp/7b --tokenizer playground/llava-tiny
         python benchmarks/fingerprint_speed.py --model-path /tmp/7b
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llava.inference.batch.fingerprint import checkpoint_fingerprint

_BLOCK = 32 * 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the command line says, print seconds; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, type=Path, help="directory of weights")
    parser.add_argument("--runs", type=int, default=3, help="of each kind (default: %(default)s)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # how the program calls itself
    options = parser.parse_args(argv)
    if options.measure:
        start = time.perf_counter()
        checkpoint_fingerprint(options.model_path)
        print(time.perf_counter() - start)
        return 0
    paths = [path for path in options.model_path.iterdir() if path.is_file()]
    print(f"{options.model_path}: {sum(path.stat().st_size for path in paths) / 1e9:.2f} GB")
    for name, is_cold in (("from the disk", True), ("from the page cache", False)):
        seconds = [_fingerprint(options.model_path, paths, is_cold) for _ in range(options.runs)]
        print(f"fingerprint {name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    _drop_pages(paths)
    start = time.perf_counter()
    for path in paths:
        with path.open("rb") as stream:
            while stream.read(_BLOCK):
                pass
    print(f"reading all of it from the disk: {time.perf_counter() - start:.2f} s")
    return 0


def _fingerprint(directory: Path, paths: Sequence[Path], is_cold: bool) -> float:
    if is_cold:
        _drop_pages(paths)
    command = [sys.executable, __file__, "--model-path", str(directory), "--measure"]  # no file mapped by this process
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _drop_pages(paths: Sequence[Path]) -> None:
    """Take files out of the page cache, as far as the system does that for whoever may read them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
