"""Stubs that stand for the launchers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PYTHON = sys.executable
VARIABLES = ("BASE_MODEL", "DATA", "OUT", "VAL_SHARE", "EVAL_STEPS", "LAUNCHER", "GPUS", "ZERO", "PORT", "HOSTFILE")


@pytest.fixture
def stubs(tmp_path):
    """Return the function names of launchers -> folder with stubs of them and of Python, which print their words."""

    def write(launchers):
        folder = tmp_path / "-".join(["bin", *launchers])
        folder.mkdir(exist_ok=True)
        python = f'case "$1" in *train_mem.py) ;; *) exec {PYTHON} "$@";; esac'
        for name in ("python", *launchers):
            stub = folder / name
            stub.write_text(
                f'#!/bin/sh\n{python if name == "python" else ""}\nprintf "%s\\n" {name} "$@"\n', encoding="utf-8"
            )
            stub.chmod(0o755)
        return folder

    return write


@pytest.fixture
def launched(stubs):
    """Return the function (script, *flags, launchers=, **variables) -> words that the launcher was started with.

    Stubs stand for the launchers; nothing else of theirs is on the PATH.
    """

    def run(script, *flags, launchers=("deepspeed",), **variables):
        names = {"PATH": f"{stubs(launchers)}:/usr/bin:/bin", **variables}
        environment = {key: value for key, value in os.environ.items() if key not in VARIABLES} | names
        command = ["bash", str(ROOT / "scripts/v1_5" / script), *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        run.error = done.stderr
        return done.stdout.splitlines() if done.returncode == 0 else done.returncode

    return run
