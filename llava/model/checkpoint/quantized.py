"""Quantised weights in files, as bitsandbytes and transformers' quantiser lay them out: several tensors a weight.

NF4: `weight` (packed), `weight.absmax`, `weight.quant_map`, `weight.nested_absmax`, `weight.nested_quant_map` and JSON
text, `weight.quant_state.bitsandbytes__nf4`. LLM.int8: `weight`, `SCB` (scales), `weight_format` (0 = by rows).

Why not transformers' quantiser (`from_pretrained` with `quantization_config`, then `save_pretrained`): it holds the
whole model in memory, can't merge an adapter on the way, and logs missing or unexpected tensors as warnings. Here one
weight is in memory at a time, and loading compares names, shapes and dtypes of all parts before it reads one.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava.files.json_files import parse_json
from llava.model.checkpoint.lazy_tensors import LazyTensor, LazyTensors, check_finite, is_finite
from llava.model.devices import DTYPES
from llava.model.quantization import (
    BLOCK,
    import_bitsandbytes,
    int8_parameter,
    is_quantized_weight,
    quantize_4bit,
    quantize_8bit,
)

STATE_BYTES = 256
"""Length of NF4's JSON text in the files we write, padded with spaces: sizes are known before values."""
_STATE = "quant_state.bitsandbytes__nf4"
_NESTED_BLOCK = 256
_NESTED_LEVELS = 256
_LEVELS = 16
_FIXED_STATE = {"quant_type": "nf4", "blocksize": BLOCK, "nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32"}


class StoredPart(NamedTuple):
    """Shape and dtype that a tensor in a file must have; None = any."""

    shape: torch.Size | None
    dtype: torch.dtype | None


def stored_parts(name: str, shape: torch.Size, bits: int) -> dict[str, StoredPart]:
    """Return the tensors in which a weight (out, in) is stored in 4 or 8 bit, by name in the file."""
    if bits == 8:
        layer = name.removesuffix("weight")
        return {
            name: StoredPart(shape, torch.int8),
            f"{layer}SCB": StoredPart(shape[:1], torch.float32),
            f"{layer}weight_format": StoredPart(torch.Size(), torch.uint8),
        }
    blocks = math.ceil(shape.numel() / BLOCK)
    return {
        name: StoredPart(torch.Size((math.ceil(shape.numel() / 2), 1)), torch.uint8),
        f"{name}.absmax": StoredPart(torch.Size((blocks,)), torch.uint8),
        f"{name}.quant_map": StoredPart(torch.Size((_LEVELS,)), torch.float32),
        f"{name}.nested_absmax": StoredPart(torch.Size((math.ceil(blocks / _NESTED_BLOCK),)), torch.float32),
        f"{name}.nested_quant_map": StoredPart(torch.Size((_NESTED_LEVELS,)), torch.float32),
        f"{name}.{_STATE}": StoredPart(None, torch.uint8),
    }


def stored_layout(model: nn.Module, bits: int | None) -> dict[str, dict[str, StoredPart]]:
    """Return the stored parts of each weight of an empty model that its files hold in 4 or 8 bit; None = in none."""
    if bits is None:
        return {}
    return {
        name: stored_parts(name, weight.shape, bits)
        for name, weight in model.named_parameters()
        if is_quantized_weight(name, weight.shape)
    }


def quantize_tensors(tensors: LazyTensors, bits: int, dtype: torch.dtype, device: torch.device) -> LazyTensors:
    """Return a model's tensors as they are stored in 4 or 8 bit; each is read and quantised on access.

    Args:
        tensors: by released name.
        bits: 4 or 8, for the linear layers of the LLM's blocks.
        dtype: of all other weights, and of those layers before NF4.
        device: where to quantise.
    """
    entries: dict[str, LazyTensor] = {}
    single_bytes: dict[str, LazyTensor] = {}  # at the end: they would shift the other tensors off their alignment
    for name, entry in tensors.entries.items():
        if is_quantized_weight(name, entry.shape):
            group = _Group(name, entry, bits, dtype, device)
            for part, kind in stored_parts(name, entry.shape, bits).items():
                shape = torch.Size((STATE_BYTES,)) if kind.shape is None else kind.shape
                place = entries if shape else single_bytes
                place[part] = LazyTensor(shape, kind.dtype, functools.partial(group.read, part), entry.source)
        elif entry.dtype.is_floating_point:
            read = functools.partial(_read_cast, name, entry, dtype, torch.device("cpu"))
            entries[name] = LazyTensor(entry.shape, dtype, read, entry.source)
        else:
            entries[name] = entry
    return LazyTensors({**entries, **single_bytes})


class _Group:
    """The parts of one weight: quantised when the first is read, each dropped once it is read."""

    def __init__(self, name: str, entry: LazyTensor, bits: int, dtype: torch.dtype, device: torch.device) -> None:
        self._name, self._entry, self._bits = name, entry, bits
        self._dtype, self._device = dtype, device
        self._parts: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def read(self, part: str) -> Tensor:
        """Return a part, by its name in the file, on the CPU."""
        with self._lock:
            if part not in self._parts:
                dtype = torch.float16 if self._bits == 8 else self._dtype
                weight = _read_cast(self._name, self._entry, dtype, self._device)
                self._parts = {key: tensor.cpu() for key, tensor in _quantized_parts(self._name, weight, self._bits)}
            return self._parts.pop(part)


def _quantized_parts(name: str, weight: Tensor, bits: int) -> list[tuple[str, Tensor]]:
    if bits == 8:
        layer, parameter = name.removesuffix("weight"), quantize_8bit(weight)
        by_rows = torch.tensor(0, dtype=torch.uint8)
        return [(name, parameter.data), (f"{layer}SCB", parameter.SCB), (f"{layer}weight_format", by_rows)]
    parameter = quantize_4bit(weight)
    statistics = parameter.quant_state.as_dict(packed=True)
    text = statistics[_STATE]
    filled = torch.full((STATE_BYTES,), ord(" "), dtype=torch.uint8)
    filled[: len(text)] = text
    return [
        (name, parameter.data),
        *((f"{name}.{key}", value) for key, value in {**statistics, _STATE: filled}.items()),
    ]


def _read_cast(name: str, entry: LazyTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor's values in another dtype.

    Raises:
        ValueError: if a value is NaN or infinite, or too large for the dtype.
    """
    tensor = entry.read().to(device)
    cast = tensor.to(dtype)
    if not is_finite(cast):
        check_finite(name, tensor, entry.source)
        raise ValueError(f"{name} holds values too large for {dtype}; quantise with bfloat16 and 4 bit instead")
    return cast


def stored_parameter(module: nn.Module, name: str, parts: Mapping[str, Tensor]) -> nn.Parameter:
    """Return the weight of a module of `quantize_linears`, made of its stored parts on the weight's device.

    Raises:
        ValueError: if they were quantised in another way than here.
    """
    bnb = import_bitsandbytes()
    if isinstance(module, bnb.nn.Linear8bitLt):
        layer = name.removesuffix("weight")
        if parts[f"{layer}weight_format"].item() != 0:
            raise ValueError(
                f"{layer}weight_format is not 0, the layout by rows; quantise the 16-bit weights again with "
                "scripts/quantize_checkpoint.py"
            )
        return int8_parameter(parts[name], parts[f"{layer}SCB"])
    _check_state(name, parts[f"{name}.{_STATE}"], [module.out_features, module.in_features])
    statistics = {part.removeprefix(f"{name}."): tensor for part, tensor in parts.items() if part != name}
    data = parts[name]
    return bnb.nn.Params4bit.from_prequantized(data, statistics, device=data.device, module=module)


def _check_state(name: str, text: Tensor, shape: list[int]) -> None:
    """Make sure that NF4's settings are those that this code and the layer assume."""
    try:
        state: dict[str, Any] = parse_json(bytes(text.tolist()))
        offset, dtype = float(state["nested_offset"]), state["dtype"]
        found = {key: state[key] for key in _FIXED_STATE} | {"shape": state["shape"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}.{_STATE} is damaged ({error!r}); quantise the 16-bit weights again") from error
    if found != {**_FIXED_STATE, "shape": shape} or dtype not in DTYPES or not math.isfinite(offset):
        raise ValueError(
            f"{name}.{_STATE} says {state}, which does not fit the layer of shape {shape} and NF4 in blocks of {BLOCK} "
            "with double quantisation; quantise the 16-bit weights again with scripts/quantize_checkpoint.py"
        )
