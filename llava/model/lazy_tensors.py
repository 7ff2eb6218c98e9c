"""Tensors by name whose shapes are known and whose values are read when they are asked for."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_FINGERPRINT_PLACES, _FINGERPRINT_RUN = 4, 16


class LazyTensor(NamedTuple):
    """A tensor not read yet.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        read: returns it on the CPU. Its memory may be a file's: copy it before writing into it.
        source: file or files it comes from, for messages.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]
    source: str = "memory"

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for and not kept.

    Args:
        entries: by name.
    """

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LazyTensors:
        """Return tensors that are in memory already under this interface."""
        return cls(
            {
                name: LazyTensor(tensor.shape, tensor.dtype, functools.partial(tensors.__getitem__, name))
                for name, tensor in tensors.items()
            }
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def overlaid(self, entries: Mapping[str, LazyTensor]) -> LazyTensors:
        """Return the same tensors with some replaced or added."""
        return LazyTensors({**self.entries, **entries})

    def renamed(self, rename: Callable[[str], str | None]) -> LazyTensors:
        """Return the same tensors by other names, without those whose other name is None.

        Raises:
            ValueError: if two tensors would get the same name.
        """
        entries: dict[str, LazyTensor] = {}
        for name, entry in self.entries.items():
            other = rename(name)
            if other in entries:
                raise ValueError(f"{entry.source} holds {other} twice, once as {name}; fetch the file again")
            if other is not None:
                entries[other] = entry
        return LazyTensors(entries)


def check_finite(name: str, tensor: Tensor, source: str) -> None:
    """Make sure that a tensor holds numbers alone.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    if not is_finite(tensor):
        raise ValueError(
            f"{name} in {source} holds values that are no numbers (NaN or infinity); the file is damaged or the "
            "training that wrote it diverged: fetch it again or use an earlier checkpoint"
        )


def is_finite(tensor: Tensor) -> Tensor:
    """Return a scalar that tells whether every value is finite; it stays on the tensor's device."""
    if not tensor.is_floating_point() or not tensor.numel():
        return torch.tensor(True)
    low, high = tensor.detach().aminmax()  # NaN becomes both; one pass that writes nothing
    return low.isfinite() & high.isfinite()


def fingerprint(tensors: LazyTensors) -> str:
    """Return a short identity of weights: the same from pickles or safetensors, in one file or many.

    Names, shapes and four runs of 16 values spread over each tensor are hashed, so that little of the files is read.
    The image encoder is left out, since some directories carry it and others don't.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in tensors if "vision_tower" not in name and "inv_freq" not in name):
        flat = tensors[name].detach().flatten()
        digest.update(f"{name} {list(tensors.entries[name].shape)}\n".encode())
        for place in range(_FINGERPRINT_PLACES):
            start = max(flat.numel() - _FINGERPRINT_RUN, 0) * place // (_FINGERPRINT_PLACES - 1)
            digest.update(flat[start : start + _FINGERPRINT_RUN].float().numpy().tobytes())
    return digest.hexdigest()[:32]
