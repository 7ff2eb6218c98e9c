#!/usr/bin/env python3
"""Measure how batch answering scales over GPUs of one machine: one process for each, as `torchrun` starts them.

Every run has the same number of images per GPU, with VQAv2's numbers of questions, so that all take the same time
if nothing is lost. A run lasts from the first process's start of work to the joined file of answers on disk; model and
questions are those of `infer_speed.py`.

Example: python benchmarks/infer_gpus.py --gpus 1 2 --images 1000 --output infer_gpus.json
         python benchmarks/infer_gpus.py --gpus 1 2 --images 20 --tiny
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from infer_bench import ANSWER_TOKENS, Bench, describe_machine, draw_images, image_size
from infer_speed import parse_options as parse_bench_options

from llava.inference.distributed import process_group, read_rank


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each number of GPUs in a launch of its own and print the rates; return the exit code."""
    options = build_parser().parse_args(argv)
    if options.folder:
        return measure(options)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder), options.images * max(options.gpus), image_size(options.tiny))
        for gpus in options.gpus:
            rows[str(gpus)] = launch(gpus, folder, options)
    base = rows[str(options.gpus[0])]["questions_per_second"] / options.gpus[0]
    for gpus, row in rows.items():
        row["share_of_linear"] = row["questions_per_second"] / base / int(gpus)
        print(f"{gpus} GPUs: {row['questions_per_second']:.1f} questions/s, {row['share_of_linear']:.1%} of linear")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[1, 2], help="numbers of GPUs, the first is the base (default: 1 2)")
    add("--images", type=int, default=1000, help="images for each GPU (default: %(default)s)")
    add("--tiny", action="store_true", help="a tiny model in fp32 and tiny images, on a CPU if there is no GPU")
    add("--output", type=Path, help="JSON to write")
    add("--folder", help=argparse.SUPPRESS)  # names images that are drawn already; set for the launched processes
    return parser


def launch(gpus: int, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one number of GPUs and return the row that rank 0 wrote.

    Raises:
        subprocess.CalledProcessError: if the run fails.
    """
    words = ["--folder", folder, "--images", str(options.images * gpus), *(["--tiny"] if options.tiny else [])]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    subprocess.run([*torchrun, __file__, *words], check=True)
    return json.loads((Path(folder) / "row.json").read_text(encoding="utf-8"))


def measure(options: argparse.Namespace) -> int:
    """Answer this rank's share of the questions, after a warm-up; rank 0 writes the rate."""
    rank = read_rank()
    device = torch.device(rank.device(None) or "cpu")
    bench_options = parse_bench_options(["--device", str(device), *(["--tiny"] if options.tiny else [])])
    bench = Bench(bench_options, device, Path(options.folder), rank)
    questions = bench.questions(options.images)
    with process_group(rank) as wait:
        bench.answer(bench.questions(max(1, options.images // 4)), ANSWER_TOKENS, wait)
        seconds = bench.answer(questions, ANSWER_TOKENS, wait)
        if rank.rank == 0:
            rate = len(questions) / seconds
            row = {"machine": describe_machine(device), "questions_per_second": rate, "seconds": seconds}
            (Path(options.folder) / "row.json").write_text(json.dumps(row), encoding="utf-8")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
