"""Writing weight files: a few tensors in memory at a time, whatever the size of the whole."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llava.files import write_settings
from llava.model.lazy_tensors import LazyTensor, LazyTensors, check_finite, is_finite
from llava.model.weights import SAFETENSORS_DTYPES, SAFETENSORS_FILE, SAFETENSORS_INDEX

MAX_SHARD_BYTES = 5_000_000_000
_ALIGNMENT = 64
_MAX_READERS = 4
_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}


def write_weights(
    tensors: LazyTensors,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write safetensors, in shards if they are many, with an index then.

    While a tensor is written the next ones are read, at most four, so that few of them are in memory at a time.

    Args:
        tensors: by name, read one by one.
        directory: exists already.
        dtype: of floating-point tensors in the file; None leaves them as they are.
        max_shard_bytes: a shard ends before it would grow beyond this.
        progress: called with the bytes of each tensor written.

    Raises:
        ValueError: if a tensor holds NaN or infinity, or a value too large for `dtype`.
        OSError: if a file can't be written.
    """
    directory = Path(directory)
    kinds = {
        name: dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype
        for name, entry in tensors.entries.items()
    }
    sizes = {name: entry.shape.numel() * kinds[name].itemsize for name, entry in tensors.entries.items()}
    shards = divide(sizes, max_shard_bytes)
    names = [SAFETENSORS_FILE]
    if len(shards) > 1:
        names = [f"model-{index + 1:05}-of-{len(shards):05}.safetensors" for index in range(len(shards))]
    order = [name for shard in shards for name in shard]
    tasks = [functools.partial(_prepare, name, tensors.entries[name], kinds[name]) for name in order]
    with contextlib.closing(_read_ahead(tasks)) as prepared:
        for file_name, shard in zip(names, shards, strict=True):
            path = directory / file_name
            path.unlink(missing_ok=True)  # a file of this name may be mapped: what is read from it stays as it was
            try:
                with path.open("wb", buffering=0) as stream:
                    _write_all(stream, memoryview(_header(tensors, shard, kinds)))
                    for name in shard:
                        _write_all(stream, next(prepared))
                        if progress:
                            progress(sizes[name])
            except OSError as error:
                path.unlink(missing_ok=True)
                raise _unwritable(path, error) from error
    if len(shards) > 1:
        locations = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": locations}
        write_settings(index, directory / SAFETENSORS_INDEX)


def refuse_full_disk(tensors: LazyTensors, dtype: torch.dtype | None, target: Path) -> None:
    """Make sure before any work that there is room for the weights.

    Raises:
        OSError: if there is not.
    """
    sizes = (entry.shape.numel() * (dtype or entry.dtype).itemsize for entry in tensors.entries.values())
    needed = sum(sizes)
    place = next(parent for parent in target.resolve().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"{target} needs {needed / 1e9:.1f} GB, but {place} has {free / 1e9:.1f} GB; free some space or choose "
            "another directory"
        )


def divide(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Split names into runs of at most `max_bytes` each, larger ones alone; at least one run."""
    runs: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if runs[-1] and filled + size > max_bytes:
            runs.append([])
            filled = 0
        runs[-1].append(name)
        filled += size
    return runs


def _header(tensors: LazyTensors, names: list[str], kinds: Mapping[str, torch.dtype]) -> bytes:
    """Return what stands in a safetensors file before the values."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name in names:
        start, shape = stop, tensors.entries[name].shape
        stop = start + shape.numel() * kinds[name].itemsize
        header[name] = {"dtype": _CODES[kinds[name]], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _read_ahead(tasks: Sequence[Callable[[], memoryview]]) -> Iterator[memoryview]:
    """Yield each task's result in order, with the next ones under way.

    Several threads of one core each: torch's own threads, which share a tensor, would wait for each other and for the
    one that writes.
    """
    cores = torch.get_num_threads()
    workers = min(cores, _MAX_READERS)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            under_way = deque(pool.submit(task) for task in tasks[:workers])
            for index in range(len(tasks)):
                result = under_way.popleft().result()
                under_way.extend(pool.submit(task) for task in tasks[index + workers : index + workers + 1])
                yield result
    finally:
        torch.set_num_threads(cores)


def _prepare(name: str, entry: LazyTensor, dtype: torch.dtype) -> memoryview:
    """Return the bytes of a tensor as they stand in the file."""
    tensor = entry.read().detach().cpu()
    written = tensor.to(dtype).contiguous()
    if not is_finite(written):
        check_finite(name, tensor, entry.source)
        raise ValueError(f"{name} holds values too large for {dtype}; write bfloat16 or float32 instead")
    return memoryview(written.reshape(-1).view(torch.uint8).numpy())


def _write_all(stream: IO[bytes], content: memoryview) -> None:
    while content:  # an unbuffered stream may take less than it is given
        content = content[stream.write(content) :]


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one file of tensors: safetensors, or a pickle of nothing but tensors where the ending is `.bin`.

    Raises:
        OSError: if it can't be written; the file is removed then.
    """
    try:
        if path.suffix == ".bin":
            with path.open("wb") as stream:
                torch.save(dict(tensors), stream)
        else:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
            path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors keeps files to their owner
    except (SafetensorError, RuntimeError, OSError) as error:
        path.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> OSError:
    return OSError(f"{path} could not be written ({error}); free some space or choose another directory")
