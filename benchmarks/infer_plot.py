#!/usr/bin/env python3
"""Draw what `infer_speed.py` measured: questions a second, and tokens a second of long answers.

Example: python benchmarks/infer_plot.py --input benchmarks/results/infer_speed.json --output docs/infer_speed.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

OURS, THEIRS, GRID = "#4477aa", "#999999", "#dddddd"
SHORT, LONG = ("grouped", "shuffled", "single", "transformers", "vllm"), ("captions", "vllm")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the file that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="JSON of infer_speed.py")
    parser.add_argument("--output", type=Path, required=True, help="PNG or SVG to write")
    options = parser.parse_args(argv)
    draw(json.loads(options.input.read_text(encoding="utf-8")), options.output)
    print(f"wrote {options.output}")
    return 0


def bars(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, float]]:
    """Return case and value of the rows that belong into the panel of a key, in the order of the file."""
    is_long = key == "tokens_per_second"
    return [
        (row["case"], row[key])
        for row in rows
        if row["part"] in (LONG if is_long else SHORT) and key in row and ("captions" in row["case"]) == is_long
    ]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw a panel of short and one of long answers, as far as they were measured.

    Raises:
        ValueError: if nothing of it was measured.
    """
    panels = {
        title: found
        for title, key in (
            ("Short answers: questions a second", "questions_per_second"),
            ("Captions: tokens a second", "tokens_per_second"),
        )
        if (found := bars(report["rows"], key))
    }
    if not panels:
        raise ValueError("the file holds no speeds; measure the parts grouped, single or captions")
    counts = [len(found) for found in panels.values()]
    figure = Figure(figsize=(9, 1.0 + 0.42 * sum(counts) + 0.5 * len(counts)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, height_ratios=counts, squeeze=False)[:, 0]
    for panel, (title, found) in zip(axes, panels.items(), strict=True):
        cases, values = zip(*found, strict=True)
        colours = [OURS if case.startswith("ours") else THEIRS for case in cases]
        drawn = panel.barh(cases, values, color=colours)
        panel.bar_label(
            drawn, labels=[f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" for value in values], padding=3
        )
        panel.invert_yaxis()
        panel.margins(x=0.12)
        panel.set_title(title, loc="left", fontsize=10)
        panel.grid(axis="x", color=GRID)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(report["machine"], fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
