"""Write safetensors files, a few tensors in memory at a time, whatever the size of the whole.

Why not `huggingface_hub.split_torch_state_dict_into_shards` with `safetensors.save_file`: a whole shard has to be in
memory before it is written. Merging a rank-128 adapter into 4.4 GB of weights of 7B's layout (8 layers, 2 cores, torch
2.13, safetensors 0.8) peaked at 0.93 GB here, and there at 1.6 GB in shards of 1 GB and at 4.8 GB in shards of 5 GB.
One thread a tensor took 10 s of CPU time here; torch's threads inside each product took 15 s to 30 s there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
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

from llava.files.atomic_files import remove_leftovers
from llava.files.json_files import write_settings
from llava.files.terminal_text import format_size
from llava.model.checkpoint.lazy_tensors import LazyTensor, LazyTensors, check_finite, is_finite
from llava.model.checkpoint.read_tensors import SAFETENSORS_DTYPES, SAFETENSORS_FILE, SAFETENSORS_INDEX

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
    """Write safetensors into an existing directory: one file, or shards with an index.

    While a tensor is written, at most four of the next ones are read.

    Args:
        tensors: read one by one.
        directory: exists already.
        dtype: of floating-point tensors in the file; None = as they are.
        max_shard_bytes: largest shard, unless a single tensor is larger.
        progress: called with the bytes of each tensor written.

    Raises:
        ValueError: if a tensor holds NaN or infinity, or a value too large for `dtype`.
        OSError: if a file can't be written.
    """
    directory = Path(directory)
    entries = stored_entries(tensors, dtype)
    shards = divide({name: entry.nbytes for name, entry in entries.items()}, max_shard_bytes)
    files = [SAFETENSORS_FILE]
    if len(shards) > 1:
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    tasks = [functools.partial(_read_bytes, name, tensors.entries[name], entries[name].dtype) for name in entries]
    with contextlib.closing(_read_ahead(tasks)) as contents:
        for file, shard in zip(files, shards, strict=True):
            path = directory / file
            path.unlink(missing_ok=True)  # a file of this name may be mapped: what is read from it stays as it was
            try:
                with path.open("wb", buffering=0) as stream:
                    write_all(stream, memoryview(_header({name: entries[name] for name in shard})))
                    for name in shard:
                        write_all(stream, next(contents))
                        if progress:
                            progress(entries[name].nbytes)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise _unwritable(path, error) from error
    if len(shards) > 1:
        locations = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": stored_size(tensors, dtype)}, "weight_map": locations}
        write_settings(index, directory / SAFETENSORS_INDEX)


def stored_entries(tensors: LazyTensors, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Return shapes and dtypes of tensors in a file; `dtype` is that of floating-point tensors, None = as they are."""
    return {
        name: entry._replace(dtype=dtype) if dtype is not None and entry.dtype.is_floating_point else entry
        for name, entry in tensors.entries.items()
    }


def stored_size(tensors: LazyTensors, dtype: torch.dtype | None = None) -> int:
    """Return the bytes that tensors take in a file; `dtype` as in `stored_entries`."""
    return sum(entry.nbytes for entry in stored_entries(tensors, dtype).values())


def refuse_full_disk(tensors: LazyTensors, dtype: torch.dtype | None, target: Path) -> None:
    """Make sure before any work that there is room for the weights, once leftovers of killed processes are removed.

    Raises:
        OSError: if there is not.
    """
    needed = stored_size(tensors, dtype)
    remove_leftovers(target)
    place = next(parent for parent in Path(os.path.realpath(target)).parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"{target} needs {format_size(needed)}, but {place} has {format_size(free)}; free some space or choose "
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


def _header(entries: Mapping[str, LazyTensor]) -> bytes:
    """Return the part of a safetensors file before the values."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, entry in entries.items():
        start, stop = stop, stop + entry.nbytes
        header[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _read_ahead(tasks: Sequence[Callable[[], memoryview]]) -> Iterator[memoryview]:
    """Yield each task's result in order, while threads work on the next ones.

    Each thread computes on one core: torch's threads inside a product wait for each other and for the writer.
    """
    cores = torch.get_num_threads()
    workers = min(cores, _MAX_READERS)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            pending = deque(pool.submit(task) for task in tasks[:workers])
            for index in range(len(tasks)):
                result = pending.popleft().result()
                pending.extend(pool.submit(task) for task in tasks[index + workers : index + workers + 1])
                yield result
    finally:
        torch.set_num_threads(cores)


def _read_bytes(name: str, entry: LazyTensor, dtype: torch.dtype) -> memoryview:
    """Return a tensor's bytes in the file."""
    tensor = entry.read().detach().cpu()
    written = tensor.to(dtype).contiguous()
    if not is_finite(written):
        check_finite(name, tensor, entry.source)
        raise ValueError(f"{name} holds values too large for {dtype}; write bfloat16 or float32 instead")
    return memoryview(written.reshape(-1).view(torch.uint8).numpy())


def write_all(stream: IO[bytes], content: memoryview) -> None:
    """Write the whole content to an unbuffered stream, which may take less than it is given."""
    while content:
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
