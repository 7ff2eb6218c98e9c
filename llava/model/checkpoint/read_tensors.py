"""Open weight files lazily: safetensors and pickles, in one file or in shards with an index.

Files are mapped into memory, and the pages of tensors that were read are given back as reading goes on: a program that
reads 13 GB of weights one by one holds a few hundred megabytes of them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava.files.json_files import parse_json, read_settings
from llava.files.regular_files import check_content
from llava.model.checkpoint.lazy_tensors import LazyTensor, LazyTensors

logger = logging.getLogger(__name__)

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
WEIGHT_FILES = (SAFETENSORS_FILE, SAFETENSORS_INDEX, PICKLE_FILE, PICKLE_INDEX)
"""In the order of transformers: safetensors before pickles, one file before an index, which may be stale."""
INDEX_ENDING = ".index.json"
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
_DTYPES = frozenset(SAFETENSORS_DTYPES.values())
MAX_MAPPED_BYTES = 64 * 2**20
"""Of each file; beyond it the pages of the tensors read so far are given back."""
_MADV_DONTNEED = 4  # Linux
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
_INNER_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Keys of the weights in training programs' pickles, which hold an optimizer's state and more."""


def find_weight_file(directory: Path) -> Path | None:
    """Return the index or file that holds a directory's weights; None if there are none."""
    return next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)


def open_weights(directory: str | Path) -> LazyTensors:
    """Open the weights of a directory, sharded or not, safetensors or pickles, without the prefix of a wrapper.

    Raises:
        FileNotFoundError: if there are no weights, or a shard is missing.
        ValueError: if a file is damaged or holds anything but tensors, or the index does not fit the shards.
    """
    tensors = _open_entry(Path(directory))
    prefix = wrapper_prefix(tensors)
    if prefix:
        logger.info("%s: names are read without the prefix %r of a wrapper of the model", directory, prefix)
    return tensors.renamed(lambda name: name.removeprefix(prefix))


def wrapper_prefix(names: Iterable[str]) -> str:
    """Return the prefix that wrappers of a model (DDP, torch.compile, peft) added to every name; usually none."""
    prefix, rest = "", list(names)
    while found := next((each for each in _WRAPPERS if rest and all(name.startswith(each) for name in rest)), None):
        prefix, rest = prefix + found, [name.removeprefix(found) for name in rest]
    return prefix


def _open_entry(directory: Path) -> LazyTensors:
    entry = find_weight_file(directory)
    if entry is None:
        raise FileNotFoundError(f"{directory} holds no weights ({', '.join(WEIGHT_FILES)}); fetch it again")
    if not entry.name.endswith(INDEX_ENDING):
        if (stale := directory / f"{entry.name}{INDEX_ENDING}").is_file():
            logger.info("%s is not read: %s holds all weights", stale, entry.name)
        return open_tensor_file(entry)
    locations = read_index(entry)
    missing = missing_shards(entry)
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)}, named in {entry.name}; fetch the missing files"
        )
    shards = {name: open_tensor_file(directory / name) for name in sorted(set(locations.values()))}
    absent = sorted(name for name, shard in locations.items() if name not in shards[shard])
    if absent:
        raise ValueError(
            f"{entry} places {absent[0]} in {locations[absent[0]]}, which lacks it; fetch both files again"
        )
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
        ValueError: if it is not an index, or names a file outside its directory.
    """
    check_content(path)
    try:
        locations = {str(name): str(file) for name, file in read_settings(path)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of weights ({error!r}); fetch the file again") from error
    outside = sorted({file for file in locations.values() if Path(file).name != file})
    if outside:
        raise ValueError(f"{path} names {outside[0]!r}, which is not a file beside it; don't trust its source")
    return locations


def missing_shards(index: Path) -> list[str]:
    """Return the files that an index names and its directory lacks."""
    return sorted({name for name in read_index(index).values() if not (index.parent / name).is_file()})


def open_tensor_file(path: str | Path) -> LazyTensors:
    """Open one file of tensors by its ending: `.safetensors`, or a pickle of a dictionary of tensors.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is damaged or holds anything but tensors; while tensors are read, if it was cut off since.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; fetch it again")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


class _MappedTensors:
    """Tensors of a file, whose pages are given back as reading goes on; they are read again when they are touched.

    Args:
        path: of the file.
        tensors: views of the mapped file; in memory without a mapping.
        mapping: tells the size of the file, which another program may cut while it is in use.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], mapping: mmap.mmap | None) -> None:
        self._path, self._tensors, self._mapping = path, tensors, mapping
        self._size = mapping.size() if mapping else 0
        self._pages = _whole_pages(tensors.values()) if mapping and sys.platform == "linux" else []
        self._touched = 0

    def lazy(self) -> LazyTensors:
        """Return them as lazy tensors."""
        return LazyTensors(
            {
                name: LazyTensor(tensor.shape, tensor.dtype, functools.partial(self._get, name), str(self._path))
                for name, tensor in self._tensors.items()
            }
        )

    def _get(self, name: str) -> Tensor:
        if self._mapping is None:
            return self._tensors[name]
        _refuse_cut(self._path, self._mapping.size(), self._size)
        if self._touched > MAX_MAPPED_BYTES:
            self._touched = 0
            for first, length in self._pages:
                ctypes.CDLL(None).madvise(first, length, ctypes.c_int(_MADV_DONTNEED))
        self._touched += self._tensors[name].nbytes
        return self._tensors[name]


def _whole_pages(tensors: Iterable[Tensor]) -> list[tuple[ctypes.c_void_p, ctypes.c_size_t]]:
    """Return address and length of the pages of mapped tensors; storages less than a page apart are joined."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.numel()]
    joined: list[list[int]] = []
    for start, stop in sorted((storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages):
        if joined and start - joined[-1][1] < mmap.PAGESIZE:
            joined[-1][1] = max(stop, joined[-1][1])
        else:
            joined.append([start, stop])
    page = mmap.PAGESIZE
    inside = [(-(-start // page) * page, stop // page * page) for start, stop in joined]  # no page of other memory
    return [(ctypes.c_void_p(first), ctypes.c_size_t(last - first)) for first, last in inside if last > first]


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _refuse_cut(path: Path, size: int, expected: int) -> None:
    """Refuse a mapped file that has become too short: reading beyond its end would kill the process (SIGBUS).

    Another program may still cut it between this check and the reading.
    """
    if size < expected:
        raise ValueError(
            f"{path} is damaged ({size:,} bytes instead of {expected:,}, cut off since it was opened); fetch it again, "
            "and don't write over weights that are in use"
        )


def _open_safetensors(path: Path) -> LazyTensors:
    check_content(path)
    try:
        with safe_open(path, framework="pt"):  # validates sizes and offsets
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = parse_json(stream.read(header_bytes))
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - SAFETENSORS_DTYPES.keys())
    if unknown:
        raise ValueError(f"{path} holds tensors of dtype {unknown[0]}, which is not supported; use 16-bit weights")
    start, mapping = 8 + header_bytes, _map(path)
    _refuse_cut(path, mapping.size(), start + max((entry["data_offsets"][1] for entry in header.values()), default=0))
    tensors = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        for name, entry in header.items():
            shape, dtype = torch.Size(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]]
            count, offset = shape.numel(), start + entry["data_offsets"][0]
            if count == 0:  # which `frombuffer` refuses
                tensors[name] = torch.empty(shape, dtype=dtype)
            else:
                flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset)
                tensors[name] = flat.reshape(shape)
    return _MappedTensors(path, tensors, mapping).lazy()


def _open_pickle(path: Path) -> LazyTensors:
    return _MappedTensors(path, load_pickle(path), _map(path) if zipfile.is_zipfile(path) else None).lazy()


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Load a pickled dictionary of tensors without running code from it; files of PyTorch before 1.6 are not mapped.

    Raises:
        ValueError: if it is damaged or holds anything but tensors.
    """
    content = load_plain_pickle(path)
    entries = content.items() if isinstance(content, dict) else ()
    key = next((key for key, value in entries if key in _INNER_KEYS and value and _is_state(value)), None)
    if key is not None:
        logger.info("%s: the weights are those under %r", path, key)
        content = content[key]
    if not _is_state(content):
        found = next((f" ({key!r} is not a tensor)" for key, value in entries if not isinstance(value, Tensor)), "")
        raise ValueError(f"{path} is not a dictionary of tensors{found}; use a file of weights")
    dtype = next((value.dtype for value in content.values() if value.dtype not in _DTYPES), None)
    if dtype is not None:
        raise ValueError(f"{path} holds tensors of dtype {dtype}, which is not supported; use 16-bit weights")
    return content


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(each, Tensor) for each in value.values())


def load_plain_pickle(path: Path) -> object:
    """Load a pickle of tensors in plain containers without running code from it.

    Raises:
        ValueError: if it is damaged or holds anything else.
    """
    check_content(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle fails in many ways, which all mean the same
        if is_refusal(error):
            raise ValueError(describe_refusal(path, error)) from None  # PyTorch's text advises weights_only=False
        raise ValueError(f"{path} is damaged ({_first_line(error)}); fetch it again") from error


def is_refusal(error: BaseException) -> bool:
    """Tell whether `torch.load` refused a file because it holds more than data."""
    return isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)


def describe_refusal(path: str | Path, error: BaseException) -> str:
    """Return the message about a file, or a directory, that `torch.load` refused."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    reason = f"it names {found[1]}" if found else "it is not made of tensors and plain containers"
    return f"{path} holds more than tensors and was not loaded ({reason}); don't trust its source"


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
