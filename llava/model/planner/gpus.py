"""GPUs by memory: flags, memory and hours of the LoRA recipe on each, as a table for the documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from llava.model.memory import ModelSizes
from llava.model.planner.estimate import checkpointed_layers, fitting_training, format_gigabytes, needed_bytes
from llava.model.planner.setups import Training

TABLE_ROWS = 66_668
"""Questions of the VQA table."""
FUSED_SHARE = 0.40
"""Share of the GPU's peak that counted operations reach in batches of 16, compiled and fused: measured on an H200
(86 samples/s), with the host as the limit."""
UNFUSED_SHARE = 0.26
"""The same layer by layer: transformers with peft on an H100 (262 TFLOP/s, docs/performance.md)."""


class Gpu(NamedTuple):
    """A GPU model.

    Attributes:
        name: as its maker writes it.
        memory: in GB (10⁹ bytes), at most what programs can use.
        peak: TFLOP/s of dense 16-bit matrix products summed in fp32, from the maker's data sheet.
        has_flex: whether FlexAttention runs on it (Ampere and later).
        measured: lowest and highest samples/s of the recipe measured on it, None = not measured.
    """

    name: str
    memory: float
    peak: float
    has_flex: bool = True
    measured: tuple[float, float] | None = None


GPUS = (
    Gpu("T4", 15.8, 65, has_flex=False),
    Gpu("RTX 3090", 24, 71),
    Gpu("RTX 4090", 24, 165.2),
    Gpu("A100 40 GB", 40, 312),
    Gpu("RTX A6000", 48, 154.8),
    Gpu("L40S", 48, 362),
    Gpu("A100 80 GB", 80, 312),
    Gpu("H100 80 GB", 80, 989, measured=(68.1, 90.0)),
)
"""Peaks: NVIDIA's data sheets (T4, A100, RTX A6000, L40S, H100 SXM) and white papers (Ampere GA102, Ada), without
sparsity. The measured speed is that of docs/performance.md, on two hosts."""


def step_flops(sizes: ModelSizes, run: Training, checkpointed: int) -> float:
    """Return the floating-point operations of a mean micro-batch under LoRA, without attention and padding.

    At a position a frozen weight counts 4 (forward, and backward to the activations), a trainable one 6, and each 2
    more where the layer is computed again; the vision tower counts its forward pass.
    """
    load, adapters = run.workload.mean_load(run.batch, run.gpus), sizes.lora_parameters(run.rank)
    llm = 4 * sizes.block_weights + 6 * adapters
    llm += 2 * (sizes.block_weights + adapters) * checkpointed / sizes.layers
    image = 2 * sizes.tower_parameters * (sizes.patches + 1) + 6 * sizes.projector_parameters * sizes.patches
    return load.positions * llm + load.images * image


def planned_hours(sizes: ModelSizes, run: Training, gpu: Gpu, rows: int = TABLE_ROWS) -> float:
    """Return the hours of an epoch of `rows` on a GPU, from its peak and the share reached on a measured one."""
    checkpointed = checkpointed_layers(sizes, run, round(gpu.memory * 1e9))
    share = FUSED_SHARE if run.is_fused else UNFUSED_SHARE
    return rows / run.batch * step_flops(sizes, run, checkpointed) / (share * gpu.peak * 1e12) / 3600


def describe_gpus(sizes: ModelSizes, run: Training, gpus: Sequence[Gpu] = GPUS) -> str:
    """Return a Markdown table: for each GPU the nearest setup that fits, its memory and its hours."""
    lines = [
        "| GPU memory | GPU | flags to add | batch x accumulation | checkpointed layers | memory needed | hours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for gpu in gpus:
        available = round(gpu.memory * 1e9)
        asked = dataclasses.replace(run, has_flex=gpu.has_flex)
        found = fitting_training(sizes, asked, available)
        size = f"{gpu.memory:.0f} GB"
        if found is None:
            lines.append(f"| {size} | {gpu.name} | does not fit | | | | |")
            continue
        again = checkpointed_layers(sizes, found, available)
        cells = [
            size,
            gpu.name,
            f"`{flags}`" if (flags := _added_flags(asked, found)) else "none",
            f"{found.batch} x {found.accumulation}",
            f"{again} of {sizes.layers}" if again else "none",
            format_gigabytes(needed_bytes(sizes, found, available)),
            _describe_hours(sizes, found, gpu),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _added_flags(asked: Training, found: Training) -> str:
    """Return the flags that `--fit auto` does not choose itself."""
    words = [f"--bits {found.bits}"] if found.bits != asked.bits else []
    if (found.zero, found.offload) != (asked.zero, asked.offload):
        words.append(f"--deepspeed scripts/zero{found.zero}{'_offload' if found.offload else ''}.json")
    return " ".join(words)


def _describe_hours(sizes: ModelSizes, run: Training, gpu: Gpu) -> str:
    if gpu.measured is None:
        return f"{planned_hours(sizes, run, gpu):.2g} (planned)"
    low, high = (TABLE_ROWS / speed / 3600 for speed in reversed(gpu.measured))
    return f"{low:.2g} to {high:.2g} (measured)"
