"""Devices of this machine, their default dtype and free memory."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from llava.constants import DTYPE_NAMES
from llava.model.capabilities import capabilities_of

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def best_device() -> torch.device:
    """Return CUDA, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def available_devices() -> list[str]:
    """Return the names of this machine's devices, such as `cpu` and `cuda:0`."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator is not None else 0
    return ["cpu", *(f"{accelerator.type}:{index}" for index in range(count))]


def parse_device(value: str | int | torch.device, choices: str | None = None) -> torch.device:
    """Return a device of this machine.

    Args:
        value: `cpu`, `cuda`, `cuda:1`, `mps`, a device, or the number of a GPU.
        choices: end of the message for an unknown name; None = this machine's devices.

    Raises:
        ValueError: if this machine lacks the device, or the name is unknown; the message lists those it has.
    """
    here = available_devices()
    named = f"{here[-1].partition(':')[0]}:{value}" if isinstance(value, int) and len(here) > 1 else value
    try:
        device = torch.device(named)
    except (RuntimeError, TypeError):
        if isinstance(value, int):
            raise _absent(value, here) from None
        raise ValueError(f"device {value!r} is unknown; {choices or 'choose ' + ', '.join(here)}") from None
    name = str(device) if device.index is not None else f"{device.type}:0"
    if device.type not in ("cpu", "meta") and name not in here:
        raise _absent(value, here)
    return device


def _absent(value: str | int | torch.device, here: list[str]) -> ValueError:
    lacks_cuda = "cuda" in str(value) and torch.version.cuda is None
    reason = " (this PyTorch was installed without CUDA)" if lacks_cuda else ""
    return ValueError(f"device {str(value)!r} is not available{reason}; this machine has {', '.join(here)}")


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Return bf16 where the device computes in it, fp16 on older GPUs and Apple's, fp32 on the CPU."""
    return capabilities_of(device).dtype


def parse_dtype(value: str | torch.dtype | None, device: torch.device | str) -> torch.dtype:
    """Return a dtype by name; None and "auto" = the device's default.

    Raises:
        ValueError: if the name is unknown, or the device only emulates bf16.
    """
    if value in (None, "auto"):
        return default_dtype(device)
    if not isinstance(value, torch.dtype) and value not in DTYPES:
        raise ValueError(f"dtype {value!r} is unknown; choose {', '.join(DTYPES)} or auto")
    dtype = value if isinstance(value, torch.dtype) else DTYPES[value]
    if dtype is torch.bfloat16 and not (here := capabilities_of(device)).has_bf16:
        raise ValueError(f"dtype bfloat16: {here.machine} does not compute in bf16; leave it out for float16")
    return dtype


def free_memory(device: torch.device | str) -> int:
    """Return the free bytes of a device."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device asynchronously, through pinned memory on CUDA."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
