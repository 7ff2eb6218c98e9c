"""Published figures of LLaVA-1.5 on its benchmarks.

Source: H. Liu, C. Li, Y. Li and Y. J. Lee, Improved Baselines with Visual Instruction Tuning, CVPR 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Published(NamedTuple):
    """Figure of the 7B and of the 13B model: percent, of MME points."""

    small: float
    large: float


PUBLISHED: Mapping[str, Published] = {
    "vqav2": Published(78.5, 80.0),
    "gqa": Published(62.0, 63.3),
    "vizwiz": Published(50.0, 53.6),
    "scienceqa": Published(66.8, 71.6),
    "textvqa": Published(58.2, 61.3),
    "pope": Published(85.9, 85.9),
    "mme": Published(1510.7, 1531.3),
    "mmvet": Published(31.1, 36.1),
}
"""By the benchmark's folder in playground/data/eval."""
