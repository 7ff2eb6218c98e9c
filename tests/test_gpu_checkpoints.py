"""`benchmarks/gpu_checkpoints.sh`: a step that fails is told and does not stop the next."""

from __future__ import annotations

import os
import subprocess

import pytest

PYTHON = """#!/usr/bin/env bash
echo "$1"
case "$1" in *load_speed.py) echo "no such device" >&2; exit 3;; esac
"""


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        ("", ["random_checkpoint", "load_speed", "memory_plan", "quantized_chat"]),
        ("some/model", ["load_speed", "memory_plan", "quantized_chat"]),
    ],
)
def test_every_step_is_tried(request, tmp_path, model, steps):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "benchmarks/gpu_checkpoints.sh", str(tmp_path / "out")],
        cwd=request.config.rootpath,
        env={**os.environ, "PYTHON": str(python), "MODEL": model},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    told = [line for line in done.stdout.splitlines() if line.startswith("benchmarks/")]
    assert told == [f"benchmarks/{step}.py" for step in steps]
    assert "== load_speed failed after 0 s; the end of " in done.stdout
    assert "no such device" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{step}.{ending}" for step in steps for ending in ("txt", "err")}
