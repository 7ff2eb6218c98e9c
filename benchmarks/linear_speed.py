#!/usr/bin/env python3
"""Time linear layers with LoRA adapters at LLaVA-1.5-7B's sizes: the layers alone, and ways to add the adapters.

Forward it is `y = x W^T + s (x A^T) B^T`, backward `dx = dy W + dlow A`; the products that make `x A^T` and `dlow`, the
same in every way, are left out. "apart" is a sum of products, each with a result of its own.

Example: python benchmarks/linear_speed.py --output linear_speed.json
         python benchmarks/linear_speed.py --tiny
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.model import adapted_linear

sys.path.insert(0, str(Path(__file__).parent))
from train_report import machine, matmul_ceiling

WIDE, INNER, RANK, POSITIONS = 4096, 11008, 128, 7424
LAYERS = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=POSITIONS, help="of a step (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="small matrices, to try this program on a CPU")
    options = parser.parse_args(argv)
    by = 64 if options.tiny else 1
    wide, inner, rank, positions = WIDE // by, INNER // by, RANK // by, options.positions // by
    layers = {"q, k, v": ([wide] * 3, wide), "o": ([wide], wide), "gate, up": ([inner] * 2, wide)}
    layers["down"] = ([wide], inner)
    report: dict[str, Any] = {"machine": machine(), "ceiling_tflops": matmul_ceiling(), "positions": positions}
    report["ms"] = {name: measure(widths, into, rank, positions) for name, (widths, into) in layers.items()}
    ways = next(iter(report["ms"].values()))
    report["step_ms"] = {way: round(LAYERS * sum(row[way] for row in report["ms"].values()), 2) for way in ways}
    print(f"{report['machine']}; 8192^3 product in bf16: {report['ceiling_tflops']} TFLOP/s\n")
    print(f"| ms | {' | '.join(layers)} | {LAYERS} layers |\n| --- |{' --- |' * (len(layers) + 1)}")
    for way in ways:
        print(f"| {way} | {' | '.join(str(row[way]) for row in report['ms'].values())} | {report['step_ms'][way]} |")
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(widths: Sequence[int], into: int, rank: int, positions: int) -> dict[str, float]:
    """Return the milliseconds of each way for layers of one input.

    Args:
        widths: outputs of each layer.
        into: width of the input.
        rank: of each adapter.
        positions: rows of the input.
    """
    on_cuda = torch.cuda.is_available()
    draw = functools.partial(torch.randn, device="cuda" if on_cuda else "cpu", dtype=torch.bfloat16)
    inputs, gradient = draw(positions, into), draw(positions, sum(widths))
    low = draw(positions, rank * len(widths))
    weight, downs = draw(sum(widths), into), draw(rank * len(widths), into)
    ups = [draw(width, rank) for width in widths]
    starts = [sum(widths[:index]) for index in range(len(widths))]
    add = adapted_linear._sum_of_products
    forward = functools.partial(add, inputs, weight.t(), low, [up.t() for up in ups], starts)
    backward = functools.partial(add, gradient, weight, low, [downs], [0])

    def apart() -> Tensor:
        parts = zip(low.split(rank, dim=1), ups, strict=True)
        return inputs @ weight.t() + torch.cat([part @ up.t() for part, up in parts], dim=1)

    times = {
        "forward, layers alone": milliseconds(lambda: inputs @ weight.t()),
        "forward, apart": milliseconds(apart),
        "backward, layers alone": milliseconds(lambda: gradient @ weight),
        "backward, apart": milliseconds(lambda: gradient @ weight + low @ downs),
    }
    for order, is_first in (("adapters second", False), ("adapters first", True)):
        times[f"forward, {order}"] = milliseconds(functools.partial(forward, low_first=is_first))
        times[f"backward, {order}"] = milliseconds(functools.partial(backward, low_first=is_first))
    return dict(sorted(times.items(), reverse=True))


@torch.no_grad()
def milliseconds(run: Callable[[], Tensor], repeats: int = 30) -> float:
    """Return the median time of a call, after a few that don't count."""
    run()
    if not torch.cuda.is_available():
        started = time.perf_counter()
        run()
        return round(1000 * (time.perf_counter() - started), 4)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 6)]
    for mark in marks:
        run()
        mark.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in itertools.pairwise(marks[5:])]
    return round(statistics.median(times), 4)


if __name__ == "__main__":
    sys.exit(main())
