"""Step times of a training on the device, and the kernels of one profiled step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from device_share import as_lines, device_share, device_spans
from torch.autograd import DeviceType
from transformers import TrainerCallback

KINDS = (
    (("flex_attention",), "FlexAttention"),
    (("flash", "fmha", "cudnn", "softmax"), "other attention"),
    (("nvjet", "gemm", "cutlass", "splitK"), "matrix products"),
    (("write_qkv_gradient",), "RoPE gradient"),
    (("silu",), "SwiGLU"),
    (("triton_red", "triton_per", "layer_norm"), "norms"),
    (("flip",), "RoPE"),
    (("multi_tensor",), "optimizer, clipping"),
)
"""Words in the names of kernels, and what the kernels are for; the first that fits counts."""


class Clock(TrainerCallback):
    """Records when the device finishes each step, without synchronising, and profiles one step.

    Args:
        on_cuda: else times are the CPU's.
        profile: file for the table of the profiled step's kernels and operations; None = their sum alone.
        profiled_step: number of steps before it.

    Attributes:
        kernels_ms: of the profiled step, time in which the device ran anything; None without CUDA.
        profiled_ms: time of that step, which profiling makes longer.
        kinds_ms: time of that step's kernels by `kind_of`.
    """

    def __init__(self, on_cuda: bool, profile: Path | None, profiled_step: int) -> None:
        self.on_cuda, self.profile, self.profiled_step = on_cuda, profile, profiled_step
        self.marks: list[float | torch.cuda.Event] = []
        self.profiler: torch.profiler.profile | None = None
        self.kernels_ms: float | None = None
        self.profiled_ms: float | None = None
        self.kinds_ms: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the profiler before the step that is profiled."""
        if state.global_step == self.profiled_step and (self.on_cuda or self.profile):
            activities = [torch.profiler.ProfilerActivity.CUDA] if self.on_cuda else []
            activities += [torch.profiler.ProfilerActivity.CPU] if self.profile else []
            if self.on_cuda:
                torch.cuda.synchronize()
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()
            self.profiled_ms = -1000 * time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the time."""
        self.mark()
        if self.profiler:
            if self.on_cuda:
                torch.cuda.synchronize()
            self.profiled_ms += 1000 * time.perf_counter()
            self.profiler.stop()
            if self.on_cuda:
                self.kernels_ms = device_time(self.profiler)
                for span in device_spans(self.profiler):
                    kind = kind_of(span.name)
                    self.kinds_ms[kind] = self.kinds_ms.get(kind, 0.0) + 1000 * (span.end - span.start)
            if self.profile:
                averages = self.profiler.key_averages()
                by = "self_device_time_total" if self.on_cuda else "self_cpu_time_total"
                table = averages.table(sort_by=by, row_limit=60, max_name_column_width=90)
                share = device_share(device_spans(self.profiler))
                self.profile.write_text(f"{as_lines(share, self.profiled_ms / 1000, count=40)}\n\n{table}")
            self.profiler = None
        if state.is_world_process_zero:
            print(f"  step {state.global_step}", flush=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the time."""
        self.mark()

    def mark(self) -> None:
        """Record the time at which the device has finished all work launched so far."""
        if self.on_cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the time of each step, idle time included."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if not self.on_cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]


def kind_of(kernel: str) -> str:
    """Return what a kernel of a training step is for, from its name."""
    return next((kind for words, kind in KINDS if any(word in kernel for word in words)), "other")


def device_time(profiler: torch.profiler.profile) -> float:
    """Return how long the device ran kernels or copies, in ms; what ran at the same time counts once."""
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    total, reached = 0.0, 0.0
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events if is_work(event)):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1000


def is_work(event: Any) -> bool:
    """Tell kernels and copies from the profiler's own marks on the device, such as that of the optimizer's step."""
    return not event.is_user_annotation and not event.name.startswith(("Optimizer.", "ProfilerStep"))
