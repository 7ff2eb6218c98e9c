"""What a device computes with: dtype, attention, compilation, CUDA graphs, Triton kernels, by GPU generation.

`choose` is the one place that decides; programs read its result, and their flags override it. PyTorch's own
`torch.cuda.is_bf16_supported()` is no substitute: it returns True for GPUs that only emulate bf16.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

CAPABILITY_VARIABLE = "LLAVA_COMPUTE_CAPABILITY"
"""Environment variable with the compute capability of an older GPU, such as 7.5, whose choice this GPU is to take."""
TRITON, COMPILER = "Triton", "a C compiler"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

ComputeCapability = tuple[int, int]


@dataclass(frozen=True)
class Generation:
    """NVIDIA GPUs of one architecture.

    Attributes:
        name: NVIDIA's name.
        since: lowest compute capability; the next generation's is the end.
        examples: GPUs that users have.
        has_bf16: computes in bf16; others emulate it, slowly.
        has_triton: runs Triton's kernels, and so what `torch.compile` writes and FlexAttention.
        has_flash_attention: runs FlashAttention 2.
        has_int8: runs bitsandbytes' LLM.int8; all run its NF4.
        has_fp8: multiplies matrices in FP8.
    """

    name: str
    since: ComputeCapability
    examples: str
    has_bf16: bool
    has_triton: bool
    has_flash_attention: bool
    has_int8: bool
    has_fp8: bool


GENERATIONS = (
    Generation("Pascal", (6, 0), "P100, GTX 10xx", False, False, False, False, False),
    Generation("Volta", (7, 0), "V100, Titan V", False, False, False, False, False),
    Generation("Turing", (7, 5), "T4, RTX 20xx, GTX 16xx", False, False, False, True, False),
    Generation("Ampere", (8, 0), "A100, A10, RTX 30xx", True, True, True, True, False),
    Generation("Ada", (8, 9), "L4, L40, RTX 40xx", True, True, True, True, True),
    Generation("Hopper", (9, 0), "H100, H200, GH200", True, True, True, True, True),
    Generation("Blackwell", (10, 0), "B200, RTX 50xx, DGX Spark", True, True, True, True, True),
)
"""Oldest first; a GPU older than the first counts as it, a newer one as the last.

Sources: requirements of Triton, FlashAttention 2 and bitsandbytes; NVIDIA's list of compute capabilities.
"""
OTHER_GPU = Generation("AMD", (0, 0), "through ROCm", True, True, True, True, False)
"""GPUs of PyTorch's CUDA device without a compute capability."""


class Machine(NamedTuple):
    """A device, and the software that kernels need.

    Attributes:
        device_type: PyTorch's, such as cuda, mps or cpu.
        name: of the GPU.
        capability: compute capability; None = not an NVIDIA GPU.
        is_forced: the capability is that of `CAPABILITY_VARIABLE`.
        installed: which of `TRITON` and `COMPILER`, which Triton needs, are there.
    """

    device_type: str
    name: str = ""
    capability: ComputeCapability | None = None
    is_forced: bool = False
    installed: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """`Tesla T4 (compute capability 7.5, Turing)`, `MPS`, `CPU`."""
        if self.capability is None:
            return self.name or self.device_type.upper()
        forced = f", set by {CAPABILITY_VARIABLE}" if self.is_forced else ""
        number = "{}.{}".format(*self.capability)
        return f"{self.name} (compute capability {number}, {generation_of(self.capability).name}{forced})"


@dataclass(frozen=True)
class Capabilities:
    """What a machine computes with unless flags say otherwise.

    Attributes:
        machine: the device.
        dtype: of weights and computation.
        has_bf16: bf16 is not emulated.
        has_triton: Triton kernels are used, and layers over packs are compiled and go through FlexAttention.
        has_cuda_graphs: decode steps are captured as CUDA graphs.
        has_flash_attention: FlashAttention 2 can be asked for; PyTorch's SDPA is the default everywhere.
        has_int8: LLM.int8 can be asked for.
        has_fp8: FP8 can be asked for; the CPU's is for trying it out.
        lacks: why a CUDA device has no Triton kernels; "" for others, and if it has them.
    """

    machine: Machine
    dtype: torch.dtype
    has_bf16: bool
    has_triton: bool
    has_cuda_graphs: bool
    has_flash_attention: bool
    has_int8: bool
    has_fp8: bool
    lacks: str = ""

    def refuse_compilation(self) -> str | None:
        """Return why `torch.compile` can't be asked for; None if it can, as on the CPU."""
        return f"{self.machine} has no compilation ({self.lacks})" if self.lacks else None

    def describe(self, dtype: torch.dtype, *features: str) -> str:
        """Return the line that a program prints at its start: machine, dtype, attention and what else it uses."""
        reason = f" ({self.lacks})" if self.lacks else ""
        return f"{self.machine}: {', '.join([NAMES.get(dtype, str(dtype)), 'SDPA', *features])}{reason}"


def choose(machine: Machine) -> Capabilities:
    """Return what a machine computes with: a pure function, the only one that decides by device and generation."""
    if machine.device_type != "cuda":
        dtype = torch.float16 if machine.device_type == "mps" else torch.float32
        return Capabilities(
            machine,
            dtype,
            has_bf16=True,
            has_triton=False,
            has_cuda_graphs=False,
            has_flash_attention=False,
            has_int8=machine.device_type == "cpu",
            has_fp8=machine.device_type == "cpu",
        )
    generation = OTHER_GPU if machine.capability is None else generation_of(machine.capability)
    lacks = _why_no_triton(machine, generation)
    return Capabilities(
        machine,
        torch.bfloat16 if generation.has_bf16 else torch.float16,
        has_bf16=generation.has_bf16,
        has_triton=not lacks,
        has_cuda_graphs=True,
        has_flash_attention=generation.has_flash_attention,
        has_int8=generation.has_int8,
        has_fp8=generation.has_fp8,
        lacks=lacks,
    )


def _why_no_triton(machine: Machine, generation: Generation) -> str:
    if not generation.has_triton:
        first = next(each for each in GENERATIONS if each.has_triton)
        return "Triton needs compute capability {}.{}".format(*first.since)
    missing = [name for name in (TRITON, COMPILER) if name not in machine.installed]
    return f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not installed" if missing else ""


def generation_of(capability: ComputeCapability) -> Generation:
    """Return the generation of a compute capability."""
    reached = [generation for generation in GENERATIONS if generation.since <= capability]
    return reached[-1] if reached else GENERATIONS[0]


def feature(name: str, is_used: bool) -> str:
    """Return a feature for `Capabilities.describe`: its name, or that it is not used."""
    return name if is_used else f"no {name}"


def capabilities_of(device: torch.device | str) -> Capabilities:
    """Return what one of this machine's devices computes with.

    Raises:
        ValueError: if `CAPABILITY_VARIABLE` is not a compute capability, or higher than the GPU's.
    """
    return choose(inspect_machine(torch.device(device)))


def inspect_machine(device: torch.device) -> Machine:
    """Read the machine of a device; distributed ranks, which must agree, read the least capable GPU that they see."""
    if device.type != "cuda":
        return Machine(device.type)
    installed = frozenset(name for name, is_there in _SOFTWARE.items() if is_there())
    name = torch.cuda.get_device_name(device)
    if torch.version.hip:
        return Machine("cuda", name, installed=installed)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    devices = range(torch.cuda.device_count()) if several else [device]
    capability = min(torch.cuda.get_device_capability(each) for each in devices)
    forced = forced_capability(os.environ, capability)
    return Machine("cuda", name, forced or capability, is_forced=forced is not None, installed=installed)


def forced_capability(environment: Mapping[str, str], highest: ComputeCapability) -> ComputeCapability | None:
    """Return the compute capability that `CAPABILITY_VARIABLE` sets; None without it.

    Raises:
        ValueError: if it is not a compute capability, or above `highest`.
    """
    text = environment.get(CAPABILITY_VARIABLE, "")
    if not text:
        return None
    major, dot, minor = text.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise ValueError(f"{CAPABILITY_VARIABLE} is {text!r}; give a compute capability such as 7.5, or unset it")
    forced = int(major), int(minor)
    if forced > highest:
        raise ValueError(f"{CAPABILITY_VARIABLE} is {text}, above the GPU's {highest[0]}.{highest[1]}; unset it")
    return forced


def _has_c_compiler() -> bool:
    """Whether Triton can build the launchers of its kernels; on Windows it brings a compiler."""
    return sys.platform == "win32" or bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


_SOFTWARE = {TRITON: lambda: importlib.util.find_spec("triton") is not None, COMPILER: _has_c_compiler}
