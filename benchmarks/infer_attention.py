"""Ways to compute attention at the shapes of the batch engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from infer_bench import Bench, synchronize
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

ATTENTION_CASES = {
    "trunks": (24, 576, 616),
    "whole rows": (24, 640, 688),
    "branches": (24, 72, 688),
    "step": (128, 1, 768),
    "step of 8": (96, 8, 768),
}
"""Rows, queries and keys of the engine's calls."""


@torch.no_grad()
def measure_attention(bench: Bench) -> Iterator[dict[str, Any]]:
    """Ways to compute attention at the engine's shapes."""
    for case, (rows, queries, keys) in ATTENTION_CASES.items():
        ways = ways_to_attend(bench, 2 if bench.options.tiny else rows, queries, keys)
        for way, compute in ways.items():
            first, taken = microseconds(compute, bench.device)
            yield {"part": "attention", "case": f"{case}: {way}", "microseconds": taken, "first_microseconds": first}


def ways_to_attend(bench: Bench, rows: int, queries: int, keys: int) -> dict[str, Callable[[], Any]]:
    """Return calls of the same size by PyTorch's kernels, with an added mask, as a square, and without a mask."""
    heads, width = (2, 16) if bench.options.tiny else (32, 128)
    made = {"device": bench.device, "dtype": torch.bfloat16 if bench.device.type == "cuda" else torch.float32}
    query = torch.randn(rows, queries, heads, width, **made).transpose(1, 2)
    key, value = (torch.randn(rows, keys + 56, heads, width, **made)[:, :keys].transpose(1, 2) for _ in range(2))
    bias = torch.zeros(rows, 1, queries, keys, **made)
    attend = torch.nn.functional.scaled_dot_product_attention
    pad = torch.nn.functional.pad

    def square() -> Any:
        return attend(
            pad(query.transpose(1, 2), (0, 0, 0, 0, keys - queries, 0)).transpose(1, 2), key, value, None, 0, True
        )

    ways: dict[str, Callable[[], Any]] = {
        "added mask, default": lambda: attend(query, key, value, bias),
        "added mask of one row, default": lambda: attend(query, key, value, bias[:1]),
        "lower right": lambda: attend(query, key, value, causal_lower_right(queries, keys)),
        "square, default": square,
    }
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION):
        ways[f"added mask, {backend.name}"] = in_backend(backend, ways["added mask, default"])
        ways[f"square, {backend.name}"] = in_backend(backend, square)
        ways[f"no mask, {backend.name}"] = in_backend(backend, lambda: attend(query, key, value))
    return ways


def in_backend(backend: SDPBackend, compute: Callable[[], Any]) -> Callable[[], Any]:
    """Return the same computation by one of PyTorch's kernels."""

    def run() -> Any:
        with sdpa_kernel(backend):
            return compute()

    return run


def microseconds(compute: Callable[[], Any], device: torch.device) -> tuple[float | None, float | None]:
    """Return the times of the first call and of a later one, None where it is not possible."""
    synchronize(device)
    start = time.perf_counter()
    try:
        compute()
    except RuntimeError:
        return None, None
    synchronize(device)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(20):
        compute()
    synchronize(device)
    return first * 1e6, (time.perf_counter() - start) / 20 * 1e6
