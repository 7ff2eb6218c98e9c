"""A killed data worker changes nothing in a training run; the second one ends it with a message."""

from __future__ import annotations

import json
import os
import signal

import pytest

from llava.model.checkpoint.read_tensors import open_tensor_file
from llava.train.fault_tolerance.nonfinite import NumberedRows

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork"),
    pytest.mark.usefixtures("quick_look_for_dead_workers"),
]

IMAGES = ["landscape.jpg", "portrait.png", "square.png", "tiny.png", "gray.jpg", "alpha.png"]
ROWS = [
    {
        "id": number,
        "image": name,
        "conversations": [
            {"from": "human", "value": "<image>\nWhich?"},
            {"from": "gpt", "value": f"it is {number}"},
        ],
    }
    for number, name in enumerate(IMAGES)
]
FLAGS = ["--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0.3"]
FLAGS += ["--learning_rate", "1e-3", "--per_device_train_batch_size", "1", "--num_train_epochs", "2"]
FLAGS += ["--save_strategy", "steps", "--save_steps", "2", "--lr_scheduler_type", "constant"]
FLAGS += ["--dataloader_num_workers", "1", "--skip_data_check", "True", "--share_image_prefix", "False"]


def killed_at(place, *reads):
    """Make the process of the given reads, counted over all processes, kill itself."""

    def prepare():
        read = NumberedRows.__getitems__

        def counted(self, indices):
            with (place / "reads").open("a") as stream:
                stream.write("x")
            if (place / "reads").stat().st_size in reads:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(self, indices)

        NumberedRows.__getitems__ = counted

    return prepare


def log(output):
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_killed_worker_changes_nothing_and_a_second_ends_the_run_resumable(train_forked, tmp_path):
    uninterrupted = train_forked("uninterrupted", ROWS, *FLAGS, processes=1)
    killed = train_forked("killed", ROWS, *FLAGS, processes=1, before=killed_at(tmp_path, 5))
    assert (tmp_path / "reads").stat().st_size > 12
    assert log(killed) == log(uninterrupted)
    left, right = (dict(open_tensor_file(path / "adapter_model.safetensors")) for path in (uninterrupted, killed))
    assert sorted(left) == sorted(right)
    assert [name for name in left if not (left[name] == right[name]).all()] == []

    (tmp_path / "reads").unlink()
    output = train_forked("out", ROWS, *FLAGS, processes=1, before=killed_at(tmp_path, 7, 8), code=1)
    assert (tmp_path / "out.0.log").read_text().splitlines()[-1] == (
        "error: worker processes were killed twice, perhaps for want of memory; pass a smaller "
        "--dataloader_num_workers (0: none), and run the same command again to go on"
    )
    assert (output / "checkpoint-2").is_dir()
    (tmp_path / "reads").unlink()
    train_forked("out", ROWS, *FLAGS, processes=1, before=killed_at(tmp_path, 2))  # in the resumed epoch
    assert log(output) == log(uninterrupted)
