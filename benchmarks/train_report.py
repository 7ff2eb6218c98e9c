"""Report of `train_speed.py`: the machine, its limits, the table."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import statistics
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "peft", "accelerate")


def matmul_ceiling() -> float | None:
    """Return the TFLOP/s of a bf16 product of 8192 x 8192 matrices, the median of 20."""
    if not torch.cuda.is_available():
        return None
    one, two = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    times = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(one, two)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return round(2 * 8192**3 / statistics.median(times[5:]) / 1e12, 1)


def peak_memory() -> float | None:
    """Return the most memory that was in use, in GB."""
    return round(torch.cuda.max_memory_allocated() / 1e9, 1) if torch.cuda.is_available() else None


def release() -> None:
    """Free the last run's memory and compiled code."""
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def machine() -> str:
    """Return the GPU's name and the libraries' versions."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}; " + ", ".join(f"{library} {importlib.metadata.version(library)}" for library in LIBRARIES)


def as_table(report: dict[str, Any]) -> str:
    """Return the figures as a table in Markdown."""
    ceiling = report["ceiling_tflops"]
    lines = [report["machine"], f"8192^3 product in bf16: {ceiling} TFLOP/s", ""]
    lines += [
        "| run | batch | samples/s | TFLOP/s | of the product's | kernels of one step, ms | of its time | peak GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in report["rows"].items():
        if "samples_per_s" in row:
            share = f"{100 * row['tflops'] / ceiling:.0f} %" if ceiling and row.get("tflops") else "-"
            busy = f"{100 * row['busy']:.0f} %" if row.get("busy") else "-"
            speeds = (row["variant"]["batch"], row["samples_per_s"], row.get("tflops"), share)
            figures = (*speeds, row.get("kernels_ms") or "-", busy, row["peak_gb"])
            lines.append(f"| {name} | " + " | ".join(map(str, figures)) + " |")
        else:
            lines.append(f"| {name} | {json.dumps(row)} |")
    return "\n".join(lines)
