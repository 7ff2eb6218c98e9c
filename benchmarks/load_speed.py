#!/usr/bin/env python3
"""Measure loading a checkpoint to the GPU beside a plain read of the same files into GPU memory, in turns.

Example: python benchmarks/random_checkpoint.py --output /tmp/7b --tokenizer playground/llava-tiny
         python benchmarks/load_speed.py --model-path /tmp/7b
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llava.files.overwrite_check import find_overwrite, output_file

_BLOCK = 32 * 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the command line says, print medians; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, type=Path)
    parser.add_argument("--runs", type=int, default=3, help="of each kind, in turns (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)  # how the program calls itself
    options = parser.parse_args(argv)
    inputs = {"--model-path": options.model_path}
    if options.output and (message := find_overwrite({"--output": output_file(options.output)}, inputs)):
        parser.error(message)
    if options.measure:
        print(json.dumps(measure(options.measure, options.model_path)))
        return 0
    shards = sorted(options.model_path.glob("*.safetensors"))
    total, largest = sum(path.stat().st_size for path in shards), max(path.stat().st_size for path in shards)
    runs: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for _ in range(options.runs):
        for kind in KINDS:  # each in a process of its own, so that peaks of memory are its own
            command = [sys.executable, __file__, "--model-path", str(options.model_path), "--measure", kind]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[kind].append(json.loads(done.stdout.splitlines()[-1]))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{total / 1e9:.2f} GB, largest shard {largest / 1e9:.2f} GB, {device}, torch {torch.__version__}")
    medians = {kind: statistics.median(run["seconds"] for run in runs[kind]) for kind in KINDS}
    for kind in KINDS:
        seconds = [run["seconds"] for run in runs[kind]]
        peak = max(run["peak_bytes"] - run["start_bytes"] for run in runs[kind])
        print(
            f"{kind:<6} {medians[kind]:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"{total / medians[kind] / 1e9:.2f} GB/s, CPU memory above its start {peak / 1e9:.2f} GB"
        )
    print(f"load reaches {100 * medians['read'] / medians['load']:.0f} % of the plain read's speed")
    if options.output:
        options.output.write_text(json.dumps({"bytes": total, "device": device, "runs": runs}, indent=2) + "\n")
    return 0


def measure(kind: str, directory: Path) -> dict[str, float]:
    """Do one thing once and return its seconds and the process's memory (RSS) before and at its peak, in bytes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = KINDS[kind](directory, device)
    torch.zeros(1, device=device)  # CUDA's start is nobody's
    start = _peak_bytes()
    clock = time.perf_counter()
    kept = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - clock
    del kept
    return {"seconds": seconds, "start_bytes": start, "peak_bytes": _peak_bytes()}


def plain_read(directory: Path, device: torch.device) -> Callable[[], object]:
    """Return what reads files as they are into GPU memory."""
    return functools.partial(read_plainly, directory, device)


def model_load(directory: Path, device: torch.device) -> Callable[[], object]:
    """Return what loads the model as all programs do; their imports, which take seconds, are done here."""
    from llava.model.builder import build_model
    from llava.model.checkpoint.checkpoint import open_checkpoint

    return lambda: build_model(open_checkpoint(directory), device=device)


def read_plainly(directory: Path, device: torch.device) -> list[torch.Tensor]:
    """Read files as they are into GPU memory, through two pinned buffers."""
    pinned = device.type == "cuda"
    buffers = [torch.empty(_BLOCK, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in range(2)] if pinned else []
    kept, turn = [], 0
    for path in sorted(directory.glob("*.safetensors")):
        target = torch.empty(path.stat().st_size, dtype=torch.uint8, device=device)
        kept.append(target)
        position = 0
        with path.open("rb", buffering=0) as stream:
            while position < len(target):
                if copied:
                    copied[turn].synchronize()
                count = stream.readinto(buffers[turn].numpy())
                target[position : position + count].copy_(buffers[turn][:count], non_blocking=True)
                if copied:
                    copied[turn].record()
                position += count
                turn = 1 - turn
    return kept


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


KINDS: dict[str, Callable[[Path, torch.device], Callable[[], object]]] = {"read": plain_read, "load": model_load}


if __name__ == "__main__":
    sys.exit(main())
