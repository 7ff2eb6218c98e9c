"""The projector: from the encoder's features to the LLM's embeddings."""

from __future__ import annotations

import re

from torch import nn


def build_projector(kind: str, vision_width: int, llm_width: int) -> nn.Module:
    """Return the module that maps (..., V) to (..., D).

    Args:
        kind: "linear", or "mlpNx_gelu" for N linear layers with GELU between them (LLaVA-1.5: "mlp2x_gelu").
        vision_width: V.
        llm_width: D.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind == "linear":
        return nn.Linear(vision_width, llm_width)
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if not match:
        raise ValueError(f"mm_projector_type is {kind!r}; choose linear or mlp2x_gelu")
    layers: list[nn.Module] = [nn.Linear(vision_width, llm_width)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(llm_width, llm_width)]
    return nn.Sequential(*layers)
