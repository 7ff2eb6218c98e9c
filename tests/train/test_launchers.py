"""Validation, the best checkpoint and complete output on two ranks of DDP, ZeRO-2, ZeRO-3, offload and FSDP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint.read_tensors import open_tensor_file, open_weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
IMAGES = ["landscape.jpg", "portrait.png", "square.png", "tiny.png", "gray.jpg"]


def row(index, image=None):
    question = ("<image>\n" if image else "") + f"What number is {index}?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": str(index)}]
    return {"id": index, "conversations": turns, **({"image": image} if image else {})}


ROWS = [*(row(index, name) for index, name in enumerate(IMAGES)), row(6), row(7), row(8)]
HELD_OUT = [row(3, "wide.png"), row(4, "palette.png"), row(9)]  # an odd number, and one process gets text alone
LORA = ["--lora_enable", "True", "--lora_r", "4", "--lora_dropout", "0"]
TOWER = ["--unfreeze_mm_vision_tower", "True", "--mm_vision_tower_lr", "1e-3"]
STEPS = ["--per_device_train_batch_size", "2", "--max_steps", "3", "--save_strategy", "steps", "--save_steps", "1"]
RATE = ["--learning_rate", "0.03", "--lr_scheduler_type", "constant", "--save_total_limit", "1"]
# the loss falls with every step: with greater is better the first checkpoint is the best
BEST = ["--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "True"]
BEST += ["--metric_for_best_model", "eval_loss", "--greater_is_better", "True"]
BATCH = ["--per_device_eval_batch_size", "1", "--eval_max_new_tokens", "8"]


def shard_on_the_cpu():
    """Let accelerate shard over the CPU with FSDP, which it ignores there otherwise."""
    from accelerate import state

    from llava.train.flags import command_line

    start = state.AcceleratorState.__init__

    def initialise(self, *values, **options):
        state.PartialState(options.get("cpu", True))
        state.PartialState._shared_state["distributed_type"] = state.DistributedType.MULTI_GPU
        start(self, *values, **options)

    state.AcceleratorState.__init__ = initialise
    command_line.check_arguments = lambda *_: None  # it refuses --fsdp on the CPU


WAYS = {
    "ddp": ([], None),
    "zero2": (["--deepspeed", str(ROOT / "scripts/zero2.json")], None),
    "zero3": (["--deepspeed", str(ROOT / "scripts/zero3.json")], None),
    "offload": (["--deepspeed", str(ROOT / "scripts/zero3_offload.json")], None),
    "fsdp": (["--fsdp"], shard_on_the_cpu),
}


def log_lines(output):
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]


def figures(output):
    """Losses of training, and loss and accuracy of validation, in order."""
    return [line[key] for line in log_lines(output) for key in ("loss", "eval_loss", "eval_accuracy") if key in line]


def weights(directory):
    if (directory / "model.safetensors").exists():
        return open_weights(directory)
    adapter = open_tensor_file(directory / "adapter_model.safetensors")
    return adapter.overlaid(open_tensor_file(directory / "non_lora_trainables.bin").entries)


@pytest.fixture
def held_out(tmp_path):
    (tmp_path / "held_out.json").write_text(json.dumps(HELD_OUT))
    return ["--eval_data_path", str(tmp_path / "held_out.json")]


@pytest.mark.parametrize(
    ("kind", "ways"),
    [(LORA, ["ddp", "zero2", "offload", "fsdp"]), (TOWER, ["zero3", "fsdp"])],
    ids=["lora", "full with tower"],
)
def test_however_the_work_is_divided(train_forked, held_out, goldens, kind, ways):
    """Same losses, same validation as on one process, the best checkpoint in the output, complete and loadable."""
    flags = [*STEPS, *RATE, *BEST, *BATCH, *held_out, *kind]
    alone = train_forked("alone", ROWS, *flags, "--per_device_train_batch_size", "4", processes=1)
    expected = figures(alone)
    validation = [line["eval_loss"] for line in log_lines(alone) if "eval_loss" in line]
    best_checkpoint = f"checkpoint-{1 + validation.index(max(validation))}"
    assert best_checkpoint != "checkpoint-3"  # else the result would be the best one without being chosen
    for name in ways:
        words, before = WAYS[name]
        output = train_forked(name, ROWS, *flags, *words, before=before)
        assert figures(output) == pytest.approx(expected, rel=2e-3), name
        assert [line["eval_questions"] for line in log_lines(output) if "eval_loss" in line] == [3, 3, 3]
        state = json.loads((output / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]).name == best_checkpoint
        result, best = weights(output), weights(output / best_checkpoint)
        assert sorted(result) == sorted(best)
        assert all(torch.equal(result[key], best[key]) for key in result), name
        base = str(goldens / "llava-v1.5-golden") if kind is LORA else None
        model = load_pretrained_model(str(output), base, "x", device="cpu", dtype="float32")[1]
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", list(WAYS))
def test_packs_however_the_work_is_divided(train_forked, name):
    """Packed rows on two ranks give the losses of unpacked rows on one; each step holds all rows."""
    rows = [row(index, IMAGES[index // 3]) for index in range(6)] + [row(6, "gray.jpg"), row(7)]
    flags = ["--max_steps", "3", "--save_strategy", "no", *RATE, *LORA]
    apart = ["--share_image_prefix", "False", "--per_device_train_batch_size", "8"]
    expected = figures(train_forked("apart", rows, *flags, *apart, processes=1))
    words, before = WAYS[name]
    output = train_forked(name, rows, *flags, *words, "--per_device_train_batch_size", "4", before=before)
    assert len(expected) == 3
    assert figures(output) == pytest.approx(expected, rel=1e-5)


def test_two_nodes_of_torchrun(goldens, tmp_path):
    """Two launchers of one process each, as on two machines, meet on the loopback."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps(ROWS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launchers = []
    for node in range(2):
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node)]
        words += ["--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port]
        words += ["llava/train/train_mem.py", "--model_name_or_path", str(goldens / "llava-v1.5-golden")]
        words += ["--data_path", str(data), "--image_folder", str(goldens / "images"), *LORA]
        words += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "True", "--report_to", "none"]
        words += ["--per_device_train_batch_size", "2", "--max_steps", "2", "--logging_steps", "1"]
        words += ["--save_strategy", "no", "--model_max_length", "256"]
        words += ["--val_share", "0.3", "--eval_strategy", "steps", "--eval_steps", "1", "--eval_max_new_tokens", "4"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        launchers.append(subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.STDOUT, stdout=-1))
    printed = [launcher.communicate(timeout=240)[0].decode() for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], printed
    assert "2 process(es)" in printed[0]
    assert "trainable parameters" not in printed[1]  # only rank 0 prints
    assert len([line for line in log_lines(tmp_path / "out") if "eval_loss" in line]) == 2
    base = str(goldens / "llava-v1.5-golden")
    assert load_pretrained_model(str(tmp_path / "out"), base, "x", device="cpu")[1] is not None
