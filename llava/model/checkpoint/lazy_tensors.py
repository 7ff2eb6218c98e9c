"""Lazy tensors: names, shapes and dtypes are known, values are read on access. And their fingerprint."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

_RUNS, _RUN_VALUES = 7, 2048  # sampled from each tensor for a fingerprint
_WHOLE_VALUES = 16_384  # values of the largest tensor that is hashed as a whole
_READERS = 16  # threads: a disk serves many small reads at once
_MADV_NORMAL, _MADV_RANDOM = 0, 1  # Linux
_DIGITS = 16  # of each part of a fingerprint
_FORMER_RUNS, _FORMER_VALUES, _FORMER_DIGITS = 4, 16, 32  # of the part that earlier versions recorded
_SEPARATOR = "-"
_TOWER = "vision_tower"
DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Endings of tensors in older checkpoints that are computed from the config."""


class LazyTensor(NamedTuple):
    """A tensor that is not read yet; the memory of what `read` returns may be a mapped file's: don't write into it."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]  # to the CPU
    source: str = "memory"  # file or files, for messages

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read on every access and not kept."""

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LazyTensors:
        """Wrap tensors that are in memory."""
        read = {name: functools.partial(tensors.__getitem__, name) for name in tensors}
        return cls({name: LazyTensor(tensor.shape, tensor.dtype, read[name]) for name, tensor in tensors.items()})

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
        """Return the same tensors under new names; a new name of None leaves the tensor out.

        Raises:
            ValueError: if two tensors would get the same name.
        """
        entries: dict[str, LazyTensor] = {}
        for name, entry in self.entries.items():
            new = rename(name)
            if new in entries:
                raise ValueError(f"{entry.source} holds {new} twice, once as {name}; fetch the file again")
            if new is not None:
                entries[new] = entry
        return LazyTensors(entries)


def check_finite(name: str, tensor: Tensor, source: str) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Raises:
        ValueError: naming the tensor and its file.
    """
    if not is_finite(tensor):
        raise ValueError(
            f"{name} in {source} holds NaN or infinity; the file is damaged or the "
            "training that wrote it diverged: fetch it again or use an earlier checkpoint"
        )


def is_finite(tensor: Tensor) -> Tensor:
    """Return a scalar on the tensor's device: whether every value is finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return torch.tensor(True)
    low, high = tensor.detach().aminmax()  # NaN becomes both; one pass that writes nothing
    return low.isfinite() & high.isfinite()


def fingerprint(tensors: LazyTensors) -> str:
    """Return a hash of weights that does not depend on the file format, the shards, or a dtype that is exact.

    It has up to three parts: that of earlier versions (64 values of each tensor outside the vision tower), samples of
    every tensor outside the vision tower, and samples of the vision tower, which some checkpoints lack. Compare two
    with `is_same_fingerprint`.
    """
    names = sorted(name for name in tensors if not name.endswith(DERIVED))
    rest = [name for name in names if _TOWER not in name]
    parts = [digest_tensors(tensors, rest)]  # first: its parallel reads also load the pages for the former part
    former = hashlib.sha256()
    for name in sorted(name for name in tensors if _TOWER not in name and "inv_freq" not in name):
        former.update(f"{name} {list(tensors.entries[name].shape)}\n".encode())
        former.update(_sample(tensors[name], _FORMER_RUNS, _FORMER_VALUES))
    parts.insert(0, former.hexdigest()[:_FORMER_DIGITS])
    tower = [name for name in names if _TOWER in name]
    return join_fingerprints(*parts, *([digest_tensors(tensors, tower)] if tower else []))


def digest_tensors(tensors: LazyTensors, names: Iterable[str]) -> str:
    """Return a short hash of names, shapes and values of tensors, in well under a second for 14 GB of weights.

    Of a tensor with more than 16,384 values, seven evenly spread runs of 2,048 are hashed.
    """
    digest = hashlib.sha256()
    names = list(names)
    with ThreadPoolExecutor(_READERS) as pool:
        samples = pool.map(lambda name: _sample(tensors[name], _RUNS, _RUN_VALUES, whole=_WHOLE_VALUES), names)
        for name, sample in zip(names, samples, strict=True):
            digest.update(f"{name} {list(tensors.entries[name].shape)}\n".encode())
            digest.update(sample)
    return digest.hexdigest()[:_DIGITS]


def join_fingerprints(*parts: str) -> str:
    """Join the parts of a fingerprint, the oldest kind first."""
    return _SEPARATOR.join(parts)


def is_same_fingerprint(recorded: str | None, found: str | None) -> bool:
    """Compare two fingerprints in the parts that both have; None equals any.

    Older versions recorded fewer parts, and weights without a vision tower have no part for it.
    """
    if recorded is None or found is None:
        return True
    return all(one == two for one, two in zip(recorded.split(_SEPARATOR), found.split(_SEPARATOR), strict=False))


def _sample(tensor: Tensor, runs: int, length: int, *, whole: int = 0) -> bytes:
    """Return evenly spread runs of a tensor's values in fp32; all values of a tensor with up to `whole`."""
    with _without_readahead(tensor):
        flat = tensor.detach().flatten()
        if flat.numel() <= whole:
            return flat.float().numpy().tobytes()
        starts = (max(flat.numel() - length, 0) * run // (runs - 1) for run in range(runs))
        return torch.cat([flat[start : start + length] for start in starts]).float().numpy().tobytes()


@contextlib.contextmanager
def _without_readahead(tensor: Tensor) -> Iterator[None]:
    """Switch off readahead for a mapped tensor: up to 8 MB around each sample would read half of the file."""
    if sys.platform != "linux":
        yield
        return
    madvise = ctypes.CDLL(None).madvise
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    pages = ctypes.c_void_p(first), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - first)
    madvise(*pages, ctypes.c_int(_MADV_RANDOM))
    try:
        yield
    finally:
        madvise(*pages, ctypes.c_int(_MADV_NORMAL))
