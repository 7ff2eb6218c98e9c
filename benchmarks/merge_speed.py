#!/usr/bin/env python3
"""Measure a merge: seconds and peak memory of the whole program, beside a plain copy of the same bytes.

Example: python benchmarks/random_checkpoint.py --output /tmp/7b --tokenizer playground/llava-tiny --lora /tmp/7b-lora
         python benchmarks/merge_speed.py --model-path /tmp/7b-lora --model-base /tmp/7b --output /tmp/merged
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_COPIED_AT_ONCE = 16 * 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Run copy and merge in turn and print their medians; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="LoRA directory")
    parser.add_argument("--model-base", required=True, type=Path, help="its base")
    parser.add_argument("--output", required=True, type=Path, help="directory to write, removed afterwards")
    parser.add_argument("--runs", type=int, default=3, help="pairs of copy and merge (default: %(default)s)")
    options = parser.parse_args(argv)
    copies, merges = [], []
    for _ in range(options.runs):
        copies.append(copy_seconds(options.model_base, options.output))
        merges.append(merge_seconds(options))
    written = sum(path.stat().st_size for path in options.model_base.iterdir())
    copied, merged = statistics.median(copies), statistics.median(merges)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the merges, the only children
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{written / 1e9:.2f} GB, {os.cpu_count()} cores, {options.runs} runs")
    print(
        f"copy and sync   {copied:7.1f} s ({min(copies):.1f} to {max(copies):.1f}), {written / copied / 1e6:.0f} MB/s"
    )
    print(
        f"merge and sync  {merged:7.1f} s ({min(merges):.1f} to {max(merges):.1f}), {written / merged / 1e6:.0f} MB/s"
    )
    print(f"CPU time of a merge, start of Python included: {(used.ru_utime + used.ru_stime) / options.runs:.0f} s")
    print(f"peak memory of the merge (RSS, mapped files included): {peak / 1e9:.2f} GB")
    return 0


def copy_seconds(source: Path, target: Path) -> float:
    """Copy a directory as fast as the disk takes it, until it is safely there; remove the copy."""
    start = time.perf_counter()
    target.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as reader, (target / path.name).open("wb", buffering=0) as writer:
            while block := reader.read(_COPIED_AT_ONCE):
                writer.write(block)
            os.fsync(writer.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def merge_seconds(options: argparse.Namespace) -> float:
    """Run the merge program without its comparison of answers; remove the result."""
    command = [sys.executable, str(ROOT / "scripts/merge_lora_weights.py"), "--model-path", options.model_path]
    command += ["--model-base", str(options.model_base), "--save-model-path", str(options.output), "--no-parity"]
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    seconds = time.perf_counter() - start
    shutil.rmtree(options.output)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
