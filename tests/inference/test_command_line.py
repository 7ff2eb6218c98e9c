"""The line about the device that inference programs start with, and flags that the device can't follow."""

from __future__ import annotations

import argparse

import pytest
import torch

from llava.inference.command_line import add_model_arguments, describe_machine
from llava.model import devices


@pytest.fixture
def describe(pretend_gpu, monkeypatch):
    """Return the function (capability, flags, compiles) -> line; without a capability on a machine without GPU."""

    def run(capability, flags="", compiles=None):
        if capability:
            pretend_gpu(capability)
            monkeypatch.setattr(devices, "best_device", lambda: torch.device("cuda"))
        parser = argparse.ArgumentParser()
        add_model_arguments(parser)
        return describe_machine(parser.parse_args(["--model-path", "x", *flags.split()]), compiles)

    return run


TURING, AMPERE = "GPU (compute capability 7.5, Turing)", "GPU (compute capability 8.6, Ampere)"
NO_TRITON = " (Triton needs compute capability 8.0)"


@pytest.mark.parametrize(
    ("capability", "flags", "compiles", "line"),
    [
        ((7, 5), "", None, f"{TURING}: fp16, SDPA, CUDA graphs, no Triton kernels{NO_TRITON}"),
        ((7, 5), "--load-4bit", None, f"{TURING}: fp16, SDPA, CUDA graphs, no Triton kernels{NO_TRITON}"),
        ((7, 5), "--dtype float32", "auto", f"{TURING}: fp32, SDPA, CUDA graphs, no compilation{NO_TRITON}"),
        ((8, 6), "", None, f"{AMPERE}: bf16, SDPA, CUDA graphs, Triton kernels"),
        ((8, 6), "--load-8bit", None, f"{AMPERE}: bf16, SDPA, no CUDA graphs, no Triton kernels"),
        ((8, 6), "", "auto", f"{AMPERE}: bf16, SDPA, CUDA graphs, compilation in long runs"),
        ((8, 6), "", "on", f"{AMPERE}: bf16, SDPA, CUDA graphs, compilation"),
        ((8, 6), "--dtype float16", "off", f"{AMPERE}: fp16, SDPA, no CUDA graphs, no compilation"),
        ((8, 6), "--load-4bit", "auto", f"{AMPERE}: bf16, SDPA, no CUDA graphs, no compilation"),
        (None, "--device cpu", None, "CPU: fp32, SDPA, no CUDA graphs, no Triton kernels"),
        (None, "--device cpu --dtype bfloat16", "on", "CPU: bf16, SDPA, no CUDA graphs, compilation"),
    ],
)
def test_the_line(describe, capability, flags, compiles, line):
    assert describe(capability, flags, compiles) == line


@pytest.mark.parametrize(
    ("flags", "compiles", "message"),
    [
        ("--dtype bfloat16", "auto", f"--dtype bfloat16: {TURING} does not compute in bf16; leave it out for float16"),
        ("", "on", f"--compile on: {TURING} has no compilation{NO_TRITON}; leave it out"),
    ],
)
def test_what_a_t4_does_not_compute_is_refused(describe, flags, compiles, message):
    with pytest.raises(ValueError) as caught:
        describe((7, 5), flags, compiles)
    assert str(caught.value) == message
