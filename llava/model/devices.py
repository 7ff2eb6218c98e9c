"""Where to compute and in which precision."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def best_device() -> torch.device:
    """Return CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Return bf16 where the device computes in it, fp16 on older GPUs and Apple's, fp32 on the CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if kind == "mps" else torch.float32


def parse_dtype(value: str | torch.dtype | None, device: torch.device | str) -> torch.dtype:
    """Return the dtype of a name, or of the device for None and "auto".

    Raises:
        ValueError: if the name is unknown.
    """
    if isinstance(value, torch.dtype):
        return value
    if value in (None, "auto"):
        return default_dtype(device)
    if value not in DTYPES:
        raise ValueError(f"dtype {value!r} is unknown; choose {', '.join(DTYPES)} or auto")
    return DTYPES[value]


def free_memory(device: torch.device | str) -> int:
    """Return the bytes a program may still take on a device."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for what the device is doing."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
