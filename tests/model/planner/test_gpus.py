"""The table of GPUs: setups that fit, hours from counted operations, and its copy in the documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.model.plan import main
from llava.model.planner.gpus import FUSED_SHARE, GPUS, Gpu, describe_gpus, planned_hours, step_flops
from llava.model.planner.setups import Training
from llava.model.planner.workload import Packs
from llava.train.batch_fit import choose_batch, describe_choice
from tests.model.test_memory import LLAVA_7B

ROOT = Path(__file__).parents[3]
TABLE = Packs.of_mean(4.25, patches=576)
HEAD = "| GPU memory | GPU |"


def test_the_measured_speed_gives_the_share():
    """86 samples/s in batches of 16 on an H200, whose peak is the H100's."""
    flops = step_flops(LLAVA_7B, Training(TABLE), checkpointed=0)
    assert flops * 86 / 16 / 989e12 == pytest.approx(FUSED_SHARE, rel=0.02)


def test_computing_all_layers_again_is_half_of_the_rest_more():
    run = Training(TABLE)
    none, every = (step_flops(LLAVA_7B, run, checkpointed) for checkpointed in (0, 32))
    assert every / none == pytest.approx(1.49, abs=0.02)


def test_hours_fall_with_the_peak():
    run = Training(TABLE)
    slow, fast = (planned_hours(LLAVA_7B, run, Gpu("x", 48, peak)) for peak in (100, 200))
    assert slow == pytest.approx(2 * fast)


def test_a_gpu_that_is_too_small():
    line = describe_gpus(LLAVA_7B, Training(TABLE), [Gpu("small", 3, 10)]).splitlines()[-1]
    assert line == "| 3 GB | small | does not fit | | | | |"


def test_one_row_for_each_gpu(capsys):
    assert main(["--table"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(GPUS)
    assert {row.split(" ")[1] for row in rows} == {"16", "24", "40", "48", "80"}
    assert [row for row in rows if "measured" in row] == [rows[-1]]


def test_the_readme_holds_the_commands_table(capsys):
    """Paste what `python -m llava.model.plan --table` prints where this fails."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith(HEAD)), None)
    if start is None:
        pytest.skip("README.md has no such table")
    assert main(["--table"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert lines[start : start + len(printed)] == printed


def test_docs_show_what_the_planner_prints(capsys):
    text = (ROOT / "docs/finetune.md").read_text(encoding="utf-8")
    assert main(["--train", "--questions-per-image", "4.25", "--gpu-memory", "16"]) == 1
    assert f"```text\n{capsys.readouterr().out}```" in text
    asked = Training(TABLE)
    chosen = choose_batch(LLAVA_7B, asked, 23 * 10**9)
    line = describe_choice(LLAVA_7B, asked, chosen, 23 * 10**9, is_former=False)
    assert f"```text\n{line}\n```" in text
