"""Weight files, read lazily; nothing here knows what the tensors mean.

Files are mapped into memory, and the pages of tensors that were read are given back as reading goes on, so that a
program that streams through 13 GB of weights holds a few hundred megabytes of them.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import pickle
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava.model.lazy_tensors import LazyTensor, LazyTensors

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
WEIGHT_FILES = (SAFETENSORS_INDEX, SAFETENSORS_FILE, PICKLE_INDEX, PICKLE_FILE)
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_MAPPED_BYTES = 64 * 2**20
"""Of a file; beyond it the pages read so far are given back."""
_MADV_DONTNEED = 4  # Linux


def find_weight_file(directory: Path) -> Path | None:
    """Return the index or file that holds a directory's weights; None if there are none."""
    return next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)


def open_weights(directory: str | Path) -> LazyTensors:
    """Open the weights of a directory, sharded or not, safetensors or pickles.

    Raises:
        FileNotFoundError: if there are no weights, or a shard is missing.
        ValueError: if a file is damaged or holds anything but tensors, or the index does not fit the shards.
    """
    directory = Path(directory)
    entry = find_weight_file(directory)
    if entry is None:
        raise FileNotFoundError(f"{directory} holds no weights ({', '.join(WEIGHT_FILES)}); fetch it again")
    if not entry.name.endswith(".index.json"):
        return open_tensor_file(entry)
    locations = read_index(entry)
    missing = missing_shards(entry)
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)}, named in {entry.name}; fetch the missing files"
        )
    shards = {name: open_tensor_file(directory / name) for name in sorted(set(locations.values()))}
    lying = sorted(name for name, shard in locations.items() if name not in shards[shard])
    if lying:
        raise ValueError(f"{entry} places {lying[0]} in {locations[lying[0]]}, which lacks it; fetch both files again")
    entries: dict[str, LazyTensor] = {}
    for shard in shards.values():
        twice = sorted(entries.keys() & shard.keys())
        if twice:
            raise ValueError(
                f"{directory} holds {twice[0]} in two of its files; fetch it again into an empty directory"
            )
        entries.update(shard.entries)
    return LazyTensors(entries)


def read_index(path: Path) -> dict[str, str]:
    """Return which file holds each tensor.

    Raises:
        ValueError: if the file is no index, or names a file outside its directory.
    """
    try:
        locations = {str(name): str(file) for name, file in json.loads(path.read_text("utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of weights ({error!r}); fetch the file again") from error
    strangers = sorted({file for file in locations.values() if Path(file).name != file})
    if strangers:
        raise ValueError(f"{path} names {strangers[0]!r}, which is no file beside it; don't trust its source")
    return locations


def missing_shards(index: Path) -> list[str]:
    """Return the files that an index names and that are not beside it."""
    return sorted({name for name in read_index(index).values() if not (index.parent / name).is_file()})


def open_tensor_file(path: str | Path) -> LazyTensors:
    """Open one file of tensors by its ending: `.safetensors`, or a pickle of a dictionary of tensors.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is damaged or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; fetch it again")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


class _MappedFile:
    """A file in memory whose pages are given back as reading goes on; they come again from the disk when touched."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._touched = 0

    def tensor(self, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a view of the file."""
        count = shape.numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if self._touched > MAX_MAPPED_BYTES and hasattr(self._map, "madvise"):  # Windows has no such call
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        self._touched += count * dtype.itemsize
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).reshape(shape)


def _open_safetensors(path: Path) -> LazyTensors:
    try:
        with safe_open(path, framework="pt"):  # validates sizes and offsets
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - SAFETENSORS_DTYPES.keys())
    if unknown:
        raise ValueError(f"{path} holds tensors of dtype {unknown[0]}, which is not supported; use 16-bit weights")
    mapped = _MappedFile(path)
    entries = {}
    for name, entry in header.items():
        shape, dtype = torch.Size(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]]
        start = 8 + header_bytes + entry["data_offsets"][0]
        entries[name] = LazyTensor(shape, dtype, functools.partial(mapped.tensor, start, shape, dtype), str(path))
    return LazyTensors(entries)


class _MappedPickle:
    """The tensors of a pickle, with the pages of a mapped one given back as reading goes on."""

    def __init__(self, tensors: dict[str, Tensor], *, is_mapped: bool) -> None:
        self._tensors = tensors
        self._advise = ctypes.CDLL(None).madvise if is_mapped and sys.platform == "linux" else None
        self._read: list[Tensor] = []
        self._touched = 0

    def tensor(self, name: str) -> Tensor:
        """Return a view of the file."""
        if self._advise is not None and self._touched > MAX_MAPPED_BYTES:
            for tensor in self._read:
                self._give_back(tensor)
            self._read, self._touched = [], 0
        tensor = self._tensors[name]
        self._read.append(tensor)
        self._touched += tensor.nbytes
        return tensor

    def _give_back(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages inside the storage alone
        last = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(_MADV_DONTNEED))


def _open_pickle(path: Path) -> LazyTensors:
    tensors = load_pickle(path)
    mapped = _MappedPickle(tensors, is_mapped=zipfile.is_zipfile(path))
    return LazyTensors(
        {
            name: LazyTensor(tensor.shape, tensor.dtype, functools.partial(mapped.tensor, name), str(path))
            for name, tensor in tensors.items()
        }
    )


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Load a pickled dictionary of tensors without running code from it; a file as PyTorch 1.6 and later write it is
    mapped, an older one is read whole.

    Raises:
        ValueError: if it is damaged or holds anything but tensors.
    """
    tensors = load_plain_pickle(path)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} is no dictionary of tensors; use a file of weights")
    return tensors


def load_plain_pickle(path: Path) -> object:
    """Load a pickle of tensors in plain containers without running code from it.

    Raises:
        ValueError: if it is damaged or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = _first_line(error)
        raise ValueError(
            f"{path} holds more than tensors and was not loaded ({reason}); don't trust its source"
        ) from error
    except Exception as error:  # a damaged pickle fails in many ways, which all mean the same
        raise ValueError(f"{path} is damaged ({_first_line(error)}); fetch it again") from error


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
