"""What several tests of training share: whole runs in this process on the small model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava.model.checkpoint import open_checkpoint, save_checkpoint
from llava.train.train import main

TINY = Path(__file__).parents[2] / "playground/llava-tiny"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """Return a directory of llava-tiny in fp32, so that sums are not rounded to the fp16 it is released in."""
    directory = tmp_path_factory.mktemp("base") / "llava-tiny"
    checkpoint = open_checkpoint(TINY)
    directory.mkdir()
    save_checkpoint(
        checkpoint.tensors,
        checkpoint.config,
        checkpoint.tokenizer,
        checkpoint.image_processor,
        directory,
        dtype=torch.float32,
    )
    return directory


@pytest.fixture(scope="session")
def train_tiny(goldens, tiny_base, tmp_path_factory) -> Callable[..., int]:
    """Return the function (output directory, rows, *flags) -> exit code of a run that starts from llava-tiny."""

    def run(output, rows, *flags, base=tiny_base):
        data = tmp_path_factory.mktemp("data") / "data.json"
        data.write_text(json.dumps(rows))
        words = ["--model_name_or_path", base, "--data_path", data, "--image_folder", goldens / "images"]
        words += ["--output_dir", output, "--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True"]
        words += ["--logging_steps", "1", "--save_strategy", "no", "--model_max_length", "256"]
        words += ["--lr_scheduler_type", "constant", *flags]
        return main([str(word) for word in words])

    return run


@pytest.fixture(scope="session")
def read_log() -> Callable[[Path, str], list[float]]:
    """Return the function (output directory, key) -> what was logged under that key."""

    def read(output, key):
        lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
        return [line[key] for line in lines if key in line]

    return read
