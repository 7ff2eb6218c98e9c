#!/usr/bin/env python3
"""Time FlexAttention over a pack of VQA questions, forward and backward, for masks and kernel options.

The mask is that of a real pack: 11 images, 4 or 5 questions behind each, LLaVA-1.5-7B's heads. The fastest
options are printed and written as JSON; training takes the defaults.

Example: python benchmarks/attention_speed.py --output attention_speed.json
         python benchmarks/attention_speed.py --tiny
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llava.data.packing import pack_records
from llava.model.tree_attention import block_pack_mask, block_tree_mask

sys.path.insert(0, str(Path(__file__).parent))
from train_report import machine
from vqa_workload import make_records

IMAGES, PATCHES, HEADS, WIDTH = 11, 576, 32, 128
BACKWARD = [  # BLOCK_M1, BLOCK_N1, BLOCK_M2, BLOCK_N2, num_stages, num_warps
    (64, 128, 128, 64, 2, 8),
    (64, 64, 64, 64, 3, 4),
    (64, 64, 64, 64, 2, 4),
    (64, 128, 128, 64, 1, 8),
    (32, 128, 128, 32, 3, 8),
    (32, 128, 128, 32, 2, 4),
    (32, 64, 64, 32, 3, 4),
    (64, 128, 128, 64, 3, 4),
    (128, 128, 128, 128, 1, 8),
    (128, 128, 128, 128, 2, 8),
    (64, 64, 64, 64, 1, 4),
]
FORWARD = [  # BLOCK_M, BLOCK_N, num_stages, num_warps
    (128, 128, 2, 8),
    (128, 64, 2, 8),
    (128, 64, 3, 4),
    (64, 64, 3, 4),
    (128, 128, 3, 8),
    (128, 32, 3, 4),
    (64, 128, 3, 4),
]
FURTHER = [{"ROWS_GUARANTEED_SAFE": True}, {"fwd_USE_TMA": True}, {"bwd_USE_TMA": True}]
"""Every position sees itself, so that rows are safe."""
WORTH_IT = 0.99
"""A choice replaces another if it takes at most this share of its time."""
LARGEST_DIFFERENCE = 0.05
"""Relative to the default's result, in bf16."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line for each choice, and return the exit code."""
    options = build_parser().parse_args(argv)
    trial = Trial(options.tiny)
    begun = time.perf_counter()
    report: dict[str, Any] = {"machine": machine(), "positions": trial.groups.shape[1], "rows": []}

    def measure(choice: dict[str, Any]) -> dict[str, Any]:
        if time.perf_counter() - begun > options.limit:
            return choice | {"error": "the time was up"}
        row = choice | trial.measure(choice)
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        usable = [row for row in report["rows"] if "both_ms" in row and "mask" not in row]
        write(min(usable, key=lambda row: row["both_ms"], default={}))
        return row

    def write(best: dict[str, Any]) -> None:
        report["best"] = {key: best[key] for key in ("options", "both_ms") if key in best}
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    write(choose(measure))
    print(f"best: {json.dumps(report['best'])}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=240, help="seconds of choices (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="a small pack, to try this program on a CPU")
    return parser


def choose(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Measure masks, then backward and forward options on top of the best so far; return the best."""
    measure({"mask": "lookups of groups and branches", "options": {}})
    best = measure({"options": {}})
    for stage in (_backward_options(), _forward_options(), FURTHER):
        start = best["options"]
        for further in stage:
            # Further options are independent of each other; block sizes replace one another.
            base = best["options"] if stage is FURTHER else start
            best = _better(best, measure({"options": base | further}))
    return best


def _better(best: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return row if row.get("both_ms", float("inf")) < WORTH_IT * best["both_ms"] else best


def _backward_options() -> Iterator[dict[str, Any]]:
    names = ("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2", "bwd_num_stages", "bwd_num_warps")
    return (dict(zip(names, values, strict=True)) for values in BACKWARD)


def _forward_options() -> Iterator[dict[str, Any]]:
    names = ("fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_stages", "fwd_num_warps")
    return (dict(zip(names, values, strict=True)) for values in FORWARD)


class Trial:
    """A pack's attention, and what the first choice gave for it.

    Args:
        tiny: a few short groups; without CUDA the forward pass alone runs, uncompiled.
    """

    def __init__(self, tiny: bool) -> None:
        self.on_cuda = torch.cuda.is_available()
        device = torch.device("cuda" if self.on_cuda else "cpu")
        images, patches, heads = (2, 40, 2) if tiny else (IMAGES, PATCHES, HEADS)
        questions = [[(13, 3), (15, 2), (12, 4), (14, 3), (17, 3)][: 4 + image % 2] for image in range(images)]
        records = make_records(questions, [Path(str(image)) for image in range(images)], 32000)
        features = [
            [range(int(r.images[0].name) * patches, int(r.images[0].name) * patches + patches)] for r in records
        ]
        pack = pack_records(records, features, multiple=128)
        self.groups, self.branches = pack.groups.to(device), pack.branches.to(device)
        length = self.groups.shape[1]
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if self.on_cuda else torch.float32
        draw = functools.partial(torch.randn, device=device, dtype=dtype, generator=generator)
        joined = draw(1, length, 3 * heads, WIDTH).transpose(1, 2)
        self.tensors = [part.requires_grad_(self.on_cuda) for part in joined.detach().split(heads, dim=1)]
        self.upstream = draw(1, length, heads, WIDTH).transpose(1, 2)
        self.reference: list[Tensor] | None = None

    def measure(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Return times in ms, the number of blocks, and the largest relative difference from the first choice."""
        torch._dynamo.reset()
        try:
            mask = self._mask(choice)
            compute = torch.compile(flex_attention, dynamic=False) if self.on_cuda else flex_attention
            compute = functools.partial(compute, block_mask=mask, kernel_options=dict(choice["options"]))
            both = functools.partial(self._run, compute)
            results = both()
            times = {"both_ms": self._time(both)}
            if self.on_cuda:
                times["forward_ms"] = self._time(functools.partial(compute, *self.tensors))
        except Exception as error:  # Triton, inductor and CUDA refuse options in ways of their own
            return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"}
        self.reference = self.reference or results
        pairs = zip(results, self.reference, strict=True)
        difference = max(((one - other).norm() / other.norm()).item() for one, other in pairs)
        if difference > LARGEST_DIFFERENCE:
            return {"error": f"the result differs by {difference:.3f}"}
        blocks = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
        return times | {"partial_blocks": int(mask.kv_num_blocks.sum()), "all_blocks": blocks, "difference": difference}

    def _mask(self, choice: dict[str, Any]) -> BlockMask:
        if "mask" in choice:
            return block_tree_mask(self.groups, self.branches)
        return block_pack_mask(self.groups, self.branches)

    def _run(self, compute: Callable[..., Tensor]) -> list[Tensor]:
        if not self.on_cuda:
            return [compute(*self.tensors)]
        output = compute(*self.tensors)
        return [output.detach(), *torch.autograd.grad(output, self.tensors, self.upstream)]

    def _time(self, run: Callable[[], Any], repeats: int = 20) -> float:
        """Return the mean over repeats in ms, after a few that don't count."""
        for _ in range(3 if self.on_cuda else 0):
            run()
        if not self.on_cuda:
            started = time.perf_counter()
            run()
            return round(1000 * (time.perf_counter() - started), 3)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return round(start.elapsed_time(end) / repeats, 4)


if __name__ == "__main__":
    sys.exit(main())
