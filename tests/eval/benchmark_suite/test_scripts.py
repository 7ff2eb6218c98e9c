"""The benchmarks' scripts start the suite with the model, the folder and as many processes as there are GPUs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def start(tmp_path):
    """Return the function (script, words, **variables) -> command line that stubs see, else exit code and error."""
    for program in ("python", "torchrun"):
        stub = tmp_path / program
        stub.write_text(f'#!/bin/bash\necho {program} "$@"\n', encoding="utf-8")
        stub.chmod(0o755)

    def run(script: str, *words: str, **variables: str) -> str:
        kept = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        command = ["bash", f"scripts/v1_5/eval/{script}.sh", *words]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=kept | variables, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else f"{done.returncode}: {done.stderr.strip()}"

    return run


def test_one_process_with_the_originals_defaults(start):
    assert start("mmbench_cn") == (
        "python -m llava.eval.suite --suite mmbench_cn --model-path liuhaotian/llava-v1.5-7b "
        "--data playground/data/eval"
    )


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({"GPUS": "2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,1,4"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "0,1,4", "GPUS": "2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "3"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"GPUS": "1"}, 1),
    ],
)
def test_processes(start, variables, processes):
    launcher = f"torchrun --standalone --nproc_per_node {processes}" if processes > 1 else "python"
    assert start("sqa", "--limit", "5", MODEL="my model", DATA="/d", **variables) == (
        f"{launcher} -m llava.eval.suite --suite scienceqa --model-path my model --data /d --limit 5"
    )


@pytest.mark.parametrize("gpus", ["x", "0", "-1", "2 4", "1.5"])
def test_a_number_of_gpus_that_is_none(start, gpus):
    assert start("pope", GPUS=gpus) == f"2: error: GPUS={gpus} is not a number of GPUs; give 1 or more, or leave it out"


def test_missing_files_are_listed_once_before_processes_start(tmp_path):
    variables = {**os.environ, "MODEL": "playground/llava-tiny", "DATA": str(tmp_path / "none"), "GPUS": "2"}
    command = ["bash", "scripts/v1_5/eval/pope.sh"]
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: POPE (pope) can't run:\n")
    assert done.stderr.count("llava_pope_test.jsonl is missing") == 1
