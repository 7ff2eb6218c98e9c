"""Placement of a model: one device, or accelerate's map from module to device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import accelerate
import torch
from torch import nn

from llava.model.devices import best_device, parse_device
from llava.model.quantization import narrow_dtypes

DeviceMap = str | int | torch.device | Mapping[str, Any] | None
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` by which accelerate chooses."""
_UNDIVIDED = ["LlamaDecoderLayer", "CLIPVisionTower"]
_MEMORY_FOR_WEIGHTS = 0.9  # share of the first GPU's free memory; "auto" spreads larger models


def is_strategy(device_map: DeviceMap) -> bool:
    """Tell whether a `device_map` is a strategy of accelerate instead of devices."""
    return isinstance(device_map, str) and device_map in STRATEGIES


def stays_on_host(device_map: DeviceMap) -> bool:
    """Tell whether a `device_map` loads to the CPU, from where callers of the original move the model themselves."""
    return device_map is None or (not isinstance(device_map, Mapping) and str(device_map) == "cpu")


def first_device(device_map: DeviceMap) -> torch.device:
    """Return the first device of a `device_map`, or the best device if accelerate chooses or the map is empty.

    Raises:
        ValueError: if the map names the disk or a device that is unknown or not in this machine.
    """
    if is_strategy(device_map) or device_map in ({}, ""):
        return best_device()
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, Mapping):
        return torch.device(next(iter(_parse_map(device_map).values())))
    return parse_device(device_map, f"pass a device, a map from module to device, or {', '.join(STRATEGIES)}")


def spread_model(
    model: nn.Module,
    device_map: DeviceMap,
    dtype: torch.dtype,
    bits: int | str,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> dict[str, str | int] | None:
    """Return the device of each module, or None where one device holds the whole model.

    Args:
        model: with parameters on `meta`.
        device_map: "auto" spreads over all GPUs what the first one can't hold, "balanced" spreads evenly,
            "balanced_low_0" leaves memory on the first GPU, "sequential" fills one GPU after the other.
        dtype: of the weights.
        bits: 16, or 8, 4 or "fp8" for the LLM's linear layers.
        max_memory: by device, as accelerate takes it; None = free memory.

    Raises:
        ValueError: if the GPUs and the CPU together can't hold the model.
    """
    if isinstance(device_map, Mapping):
        parts = _parse_map(device_map)
        return parts if len(set(parts.values())) > 1 else None
    if not is_strategy(device_map) or torch.cuda.device_count() < 2:
        return None
    sizes = {"dtype": dtype, "special_dtypes": narrow_dtypes(model, bits)}
    weight_bytes = accelerate.utils.compute_module_sizes(model, **sizes)[""]
    if device_map == "auto" and max_memory is None:
        if weight_bytes < _MEMORY_FOR_WEIGHTS * torch.cuda.mem_get_info(0)[0]:
            return None
    elif device_map in ("balanced", "balanced_low_0"):
        max_memory = accelerate.utils.get_balanced_memory(
            model,
            max_memory and dict(max_memory),
            no_split_module_classes=_UNDIVIDED,
            low_zero=device_map == "balanced_low_0",
            **sizes,
        )
    spread = accelerate.infer_auto_device_map(
        model, max_memory and dict(max_memory), no_split_module_classes=_UNDIVIDED, **sizes
    )
    _refuse_disk(spread)
    return spread


def _parse_map(device_map: Mapping[str, Any]) -> dict[str, str]:
    _refuse_disk(device_map)
    return {module: str(parse_device(place)) for module, place in device_map.items()}


def _refuse_disk(device_map: Mapping[str, Any]) -> None:
    for name, place in device_map.items():
        if place == "disk":
            raise ValueError(f"device_map leaves {name or 'the model'} on disk; load 4 bit, or use more or larger GPUs")
