"""The projector: vision features to LLM embeddings."""

from __future__ import annotations

import re

from torch import nn


def build_projector(kind: str, vision_width: int, llm_width: int) -> nn.Module:
    """Build the module that maps (..., V) to (..., D).

    Args:
        kind: "linear", or "mlpNx_gelu" for N linear layers with GELU between them (LLaVA-1.5: "mlp2x_gelu").
        vision_width: V.
        llm_width: D.

    Raises:
        ValueError: if the kind is unknown.
    """
    depth = projector_depth(kind)
    first = nn.Linear(vision_width, llm_width)
    if kind == "linear":
        return first
    layers: list[nn.Module] = [first]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(llm_width, llm_width)]
    return nn.Sequential(*layers)


def projector_depth(kind: str) -> int:
    """Return the number of linear layers of a kind of projector, at most 99.

    Raises:
        ValueError: if the kind is unknown.
    """
    match = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    if not match and kind != "linear":
        raise ValueError(f"mm_projector_type is {kind!r:.60}; choose linear or mlp2x_gelu")
    return int(match[1]) if match else 1
