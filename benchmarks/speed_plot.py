#!/usr/bin/env python3
"""Draw what `infer_speed.py` or `train_speed.py` measured: questions, tokens of long answers or samples a second.

Example: python benchmarks/speed_plot.py --input benchmarks/results/infer_speed.json --output docs/infer_speed.png
         python benchmarks/speed_plot.py --input benchmarks/results/train_speed.json --output docs/train_speed.png
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

from llava.files.overwrite_check import find_overwrite, output_file

OURS, THEIRS, GRID = "#4477aa", "#999999", "#dddddd"
SHORT, LONG = ("grouped", "shuffled", "single", "transformers", "vllm"), ("captions", "vllm")
PANELS = {
    "Short answers: questions a second": "questions_per_second",
    "Captions: tokens a second": "tokens_per_second",
    "LoRA training, r = 128: samples a second": "samples_per_s",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the file that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="JSON of one of them")
    parser.add_argument("--output", type=Path, required=True, help="PNG or SVG to write")
    options = parser.parse_args(argv)
    output = {"--output": output_file(options.output, replaces_images=True)}
    if message := find_overwrite(output, {"--input": options.input}):
        parser.error(message)
    draw(json.loads(options.input.read_text(encoding="utf-8")), options.output)
    print(f"wrote {options.output}")
    return 0


def bars(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, float]]:
    """Return case and value of the rows that belong into the panel of a key, in the order of the file."""
    if key == "samples_per_s":
        return [(row["case"], row[key]) for row in rows if key in row]
    is_long = key == "tokens_per_second"
    return [
        (row["case"], row[key])
        for row in rows
        if row.get("part") in (LONG if is_long else SHORT) and key in row and ("captions" in row["case"]) == is_long
    ]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each kind of speed that was measured.

    Raises:
        ValueError: if nothing of it was measured.
    """
    rows = report["rows"]
    rows = list(rows.values()) if isinstance(rows, Mapping) else rows
    panels = {title: found for title, key in PANELS.items() if (found := bars(rows, key))}
    if not panels:
        raise ValueError("the file holds no speeds; see the measuring program's --parts or --only")
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
