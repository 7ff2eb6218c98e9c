"""The page on benchmarks says what the catalog says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llava.eval.benchmarks.catalog import BENCHMARKS

PAGE = (Path(__file__).resolve().parents[3] / "docs/benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_a_row_of_figures_and_one_of_files(benchmark):
    images = "-" if benchmark.distinct_images is None else f"{benchmark.distinct_images:,}"
    published = f"{benchmark.published.small} / {benchmark.published.large}"
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| {benchmark.title} |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [cells[1], cells[2], cells[4]] == [f"{benchmark.questions:,}", images, published]
    [files] = [line for line in PAGE.splitlines() if line.startswith(f"| {benchmark.title}, `{benchmark.name}.sh` |")]
    assert f"| `{benchmark.folder}` |" in files
    for path, origin in benchmark.origins.items():
        [address] = re.findall(r"https?://[^\s:]+", origin)
        assert f"`{path}`" in files
        assert address in PAGE
