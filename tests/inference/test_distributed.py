"""Ranks as a launcher sets them, and a run under torch.distributed.run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.eval.model_vqa_loader import main
from llava.inference.distributed import DistributedRank, process_group, read_rank

REPOSITORY = Path(__file__).resolve().parents[2]


def test_alone_without_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert read_rank() == (0, 1, 0)
    with process_group(read_rank()) as wait:
        wait()


def test_what_the_launcher_says(monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert read_rank() == DistributedRank(3, 4, 1)


@pytest.mark.parametrize(
    "requested, has_gpus, expected",
    [
        (None, True, "cuda:1"),
        ("cuda", True, "cuda:1"),
        ("cuda:0", True, "cuda:0"),
        ("cpu", True, "cpu"),
        (None, False, None),
    ],
)
def test_a_device_for_each(monkeypatch, requested, has_gpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert DistributedRank(3, 4, 3).device(requested) == expected
    assert DistributedRank().device(requested) == requested


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(goldens, tmp_path, capsys):
    rows = [
        {"question_id": key, "image": ["landscape.jpg", "tiny.png", "none.png"][key % 3], "text": f"What is {key}?"}
        for key in range(30)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        *("--model-path", str(goldens / "llava-v1.5-golden"), "--device", "cpu", "--max_new_tokens", "4"),
        *("--image-folder", str(goldens / "images"), "--question-file", str(tmp_path / "questions.jsonl")),
    ]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llava.eval.model_vqa_loader"]
    shared = subprocess.run(
        [sys.executable, "-m", *launcher, *flags, "--answers-file", str(tmp_path / "shared.jsonl")],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert main([*flags, "--answers-file", str(tmp_path / "alone.jsonl")]) == 1  # a third of the images is missing
    message = "error: 10 questions have no answer (image_missing 10)"
    assert message in capsys.readouterr().err
    assert message in shared.stderr
    assert shared.stdout.count("20 of 30 questions answered") == 1, shared.stderr
    assert (tmp_path / "shared.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.journal*"))
