"""Figures of a benchmark as plain text for the terminal."""

from __future__ import annotations

from llava.eval.benchmarks.result import BenchmarkResult, Figure
from llava.eval.scoring.text import align


def format_result(result: BenchmarkResult, published: float | None = None) -> str:
    """Lay out a result: its notes, then a line for each figure with its 95 % interval.

    Args:
        result: of a scorer.
        published: the 7B model's counterpart of the first figure; None leaves the column out.
    """
    lines = [["", "value", "95 % interval"]]
    lines += [[figure.name, format_value(figure), format_interval(figure)] for figure in result.figures]
    if published is not None:
        column = ["LLaVA-1.5 7B", f"{published:.1f}"] + [""] * len(lines)
        lines = [[*line, cell] for line, cell in zip(lines, column, strict=False)]
    notes = [f"note: {note}" for note in result.notes]
    return "\n".join([*notes, *([""] if notes else []), align(lines)])


def format_value(figure: Figure) -> str:
    """Return the number of a figure: two decimals and the sign of percent, one decimal of points."""
    return f"{figure.value:.2f} %" if figure.unit == "%" else f"{figure.value:.1f}"


def format_interval(figure: Figure) -> str:
    """Return the bounds of a figure, "" if it has none."""
    return f"{figure.interval.low:.1f} to {figure.interval.high:.1f}" if figure.interval else ""
