"""The planner's bytes against peaks that were measured on GPUs, at LLaVA-1.5-7B's true sizes: within 10 %."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from llava.model.planner.estimate import needed_bytes, plan_training
from llava.model.planner.setups import Training
from llava.model.planner.workload import Packs, PaddedRows
from tests.model.test_memory import LLAVA_7B

ROOT = Path(__file__).parents[3]
GB = 10**9
WITHIN = 0.10

QUESTIONS = json.loads((ROOT / "benchmarks/vqa_lengths.json").read_text())["questions"]
VQA = Packs.of_counts([len(asked) for asked in QUESTIONS], patches=576, system_prefix=34)
"""Data of `benchmarks/train_speed.py`."""
ONE_QUESTION = Packs.of_counts([1] * sum(map(len, QUESTIONS)), patches=576, system_prefix=34)
FOUR_QUESTIONS = Packs.of_counts([4] * 60, patches=576, system_prefix=33, suffix=18)
"""Data of `benchmarks/end_to_end.sh`: 60 images, four questions about each, tokens of the small model's tokenizer."""
ROWS = PaddedRows(639)
"""Data of `benchmarks/memory_plan.py`."""

BENCHMARK = {"zero": 0, "checkpointing": False}
"""`benchmarks/train_speed.py` runs without DeepSpeed and without activation checkpointing."""

ALLOCATED = {
    # docs/performance.md and benchmarks/results/train_speed*.json (H100); the first two again on an H200, torch 2.11.
    "batches of 64": (Training(VQA, batch=64, dropout=0.0, **BENCHMARK), 72.0),
    "batches of 16, the recipe": (Training(VQA, batch=16, **BENCHMARK), 38.1),
    "batches of 24": (Training(VQA, batch=24, dropout=0.0, **BENCHMARK), 38.1),
    "batches of 48, two GPUs": (Training(VQA, batch=48, dropout=0.0, gpus=2, **BENCHMARK), 58.4),
    "one question per image": (Training(ONE_QUESTION, batch=14, dropout=0.0, **BENCHMARK), 59.2),
    # docs/checkpoints.md, "What fits on the GPU": rows of up to 639 positions, `--share_image_prefix False`.
    "rows, batch 16": (Training(ROWS), 26.36),
    "rows, batch 4": (Training(ROWS, batch=4, checkpointing=False), 39.79),
    "rows, batch 8, 4 bit": (Training(ROWS, batch=8, rank=64, bits=4), 10.83),
    "rows, batch 8, without DeepSpeed": (Training(ROWS, batch=8, zero=0), 22.62),
}
"""Peaks of `torch.cuda.max_memory_allocated`, in GB."""

ON_DEVICE = {
    "task_lora": Training(FOUR_QUESTIONS),  # on 80 GB no layer is checkpointed
    "trained_tower": Training(FOUR_QUESTIONS, checkpoint_layers="all", trains_tower=True),
    "4bit": Training(FOUR_QUESTIONS, bits=4),  # layer by layer, all of them checkpointed
}
"""Runs of `benchmarks/end_to_end.sh`, the shell script with its own flags, on an H100 80 GB."""
TSV = list(csv.reader((ROOT / "benchmarks/results/end_to_end.tsv").open(), delimiter="\t"))
MEASURED = {name: float(peak.removesuffix(" GB")) for name, _, _, peak, *_ in TSV}
"""Peaks of the device in GB, as nvidia-smi shows them, CUDA and the allocator's free blocks included."""


@pytest.mark.parametrize(("run", "measured"), ALLOCATED.values(), ids=ALLOCATED)
def test_allocated_bytes(run, measured):
    assert sum(plan_training(LLAVA_7B, run).values()) == pytest.approx(measured * GB, rel=WITHIN)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_bytes_of_the_device(name):
    assert needed_bytes(LLAVA_7B, ON_DEVICE[name], 80 * GB) == pytest.approx(MEASURED[name] * GB, rel=WITHIN)


def test_bytes_of_the_device_while_weights_are_fused():
    """Training needs less than this run's peak: the blocks of the weights that fusing copied stayed with the allocator.

    They are given back to the device since (`prepare_model`).
    """
    needed = needed_bytes(LLAVA_7B, Training(FOUR_QUESTIONS, checkpoint_layers="all"), 80 * GB)
    query, key, value, _, gate, up, _ = (2 * out * into for out, into in LLAVA_7B.linear_shapes)
    while_fusing = 2 * (LLAVA_7B.llm_parameters + LLAVA_7B.tower_parameters + LLAVA_7B.lora_parameters(128))
    while_fusing += LLAVA_7B.layers * (query + key + value + gate + up) + 0.8 * GB
    assert needed < while_fusing
    assert while_fusing == pytest.approx(MEASURED["checkpointing_all"] * GB, rel=WITHIN)


def test_the_recipe_fits_24_gb():
    """22.4 GB with all layers checkpointed; room for the update's gradients in fp32 is planned besides."""
    run = Training(VQA)
    assert needed_bytes(LLAVA_7B, run, 24 * GB) == pytest.approx(22.4 * GB, rel=WITHIN)
    assert needed_bytes(LLAVA_7B, run, 24 * GB) <= 24 * GB
