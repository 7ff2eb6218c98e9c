"""No program raises, prints or logs that something it calls is deprecated, on whichever libraries are installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "tests/data/goldens/images"
MODEL = "playground/llava-tiny"
CATEGORIES = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")


@pytest.fixture
def run(tmp_path):
    """Return the function (words of a Python command, input) -> what it prints, if it ends well and names nothing."""

    def run_program(*words, text=""):
        command = [sys.executable, *(f"-Werror::{name}" for name in CATEGORIES), *map(str, words)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            input=text,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "warning"},
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed
        assert re.findall(r"(?i).*(?:deprecat|futurewarning|will be removed).*", printed) == []
        return printed

    return run_program


def test_training_and_merging(run, tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "yes"}]
    rows = [{"id": name, "image": name, "conversations": turns} for name in ("square.png", "gray.jpg", "tiny.png")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    words = ["--model_name_or_path", MODEL, "--data_path", tmp_path / "data.json", "--image_folder", IMAGES]
    words += ["--output_dir", tmp_path / "lora", "--use_cpu", "True", "--lora_enable", "True", "--lora_r", "4"]
    words += ["--gradient_checkpointing", "True", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
    words += ["--val_share", "0.4", "--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "True"]
    run("llava/train/train_mem.py", *words, "--report_to", "tensorboard")
    merged = tmp_path / "merged"
    words = ["--model-path", tmp_path / "lora", "--model-base", MODEL, "--save-model-path", merged]
    run("scripts/merge_lora_weights.py", *words)
    assert (merged / "config.json").is_file()


@pytest.mark.parametrize("flags", [[], ["--num_beams", "2"], ["--load-8bit"]], ids=["engine", "beams", "8 bit"])
def test_batch_inference(run, tmp_path, flags):
    if "--load-8bit" in flags:
        pytest.importorskip("bitsandbytes")
    question = {"question_id": 1, "image": "square.png", "text": "What?"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    words = ["--model-path", MODEL, "--question-file", tmp_path / "questions.jsonl", "--image-folder", IMAGES]
    words += ["--answers-file", tmp_path / "answers.jsonl", "--device", "cpu", "--max_new_tokens", "4", *flags]
    printed = run("-m", "llava.eval.model_vqa_loader", *words)
    assert "CPU: fp32, SDPA, no CUDA graphs, no compilation\n" in printed


def test_chat(run):
    words = ["--model-path", MODEL, "--image-file", IMAGES / "square.png", "--device", "cpu", "--max-new-tokens", "4"]
    printed = run("-m", "llava.serve.cli", *words, text="What?\nAnd now?\n/exit\n")
    assert "CPU: fp32, SDPA, no CUDA graphs, no Triton kernels\n" in printed
