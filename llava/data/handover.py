"""How batches come from the processes that read rows: small tensors as bytes, large ones in shared memory.

PyTorch hands each tensor over as a file of its own, for which the trainer asks the worker through a new connection: at
0.5 ms each a pack's indices took longer than its pictures (`benchmarks/host_time.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MOST_BYTES = 1 << 20
"""Of a tensor that travels as bytes."""


class Batch(dict):
    """A batch, which arrives from another process as a dict of tensors."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (_as_arrays(self),)


def _as_arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_arrays(inner) for key, inner in value.items()}
    is_small = isinstance(value, Tensor) and value.dtype is torch.int64 and value.nbytes <= MOST_BYTES
    return _Array(value.numpy()) if is_small else value


class _Array:
    """Tells an array that was a tensor from others."""

    def __init__(self, values: Any) -> None:
        self.values = values


def _arrived(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _arrived(inner) for key, inner in value.items()}
    return torch.from_numpy(value.values) if isinstance(value, _Array) else value
