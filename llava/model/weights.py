"""Weight files, read lazily and written in shards; nothing here knows what the tensors mean."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
WEIGHT_FILES = (SAFETENSORS_INDEX, SAFETENSORS_FILE, PICKLE_INDEX, PICKLE_FILE)
MAX_SHARD_BYTES = 5_000_000_000
_FINGERPRINT_SAMPLES = 64


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for and not kept.

    Args:
        readers: by name, a function that returns the tensor on the CPU.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.readers = dict(readers)

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)

    def overlaid(self, readers: Mapping[str, Callable[[], Tensor]]) -> LazyTensors:
        """Return the same tensors with some replaced or added."""
        return LazyTensors({**self.readers, **readers})


def find_weight_file(directory: Path) -> Path | None:
    """Return the index or file that holds a directory's weights; None if there are none."""
    return next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)


def open_weights(directory: str | Path) -> LazyTensors:
    """Open the weights of a directory, sharded or not, safetensors or pickles.

    Raises:
        FileNotFoundError: if there are no weights, or a shard is missing.
        ValueError: if a file is damaged or holds anything but tensors.
    """
    directory = Path(directory)
    entry = find_weight_file(directory)
    if entry is None:
        raise FileNotFoundError(f"{directory} holds no weights ({', '.join(WEIGHT_FILES)}); fetch it again")
    if not entry.name.endswith(".index.json"):
        return open_tensor_file(entry)
    try:
        locations = dict(json.loads(entry.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{entry} is no index of weights ({error!r}); fetch the file again") from error
    missing = sorted({name for name in locations.values() if not (directory / name).is_file()})
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)}, named in {entry.name}; fetch the missing files"
        )
    shards = {name: open_tensor_file(directory / name) for name in sorted(set(locations.values()))}
    lying = sorted(name for name, shard in locations.items() if name not in shards[shard])
    if lying:
        raise ValueError(f"{entry} places {lying[0]} in {locations[lying[0]]}, which lacks it; fetch both files again")
    return LazyTensors({name: shards[shard].readers[name] for name, shard in locations.items()})


def open_tensor_file(path: str | Path) -> LazyTensors:
    """Open one file of tensors by its ending: `.safetensors`, or a pickle of a dictionary of tensors.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is damaged or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; fetch it again")
    if path.suffix == ".safetensors":
        try:
            handle = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
        names = handle.keys()
        return LazyTensors({name: functools.partial(handle.get_tensor, name) for name in names})
    tensors = load_pickle(path)
    return LazyTensors({name: functools.partial(tensors.__getitem__, name) for name in tensors})


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Load a pickled dictionary of tensors without running code from it.

    Raises:
        ValueError: if it is damaged or holds anything but tensors.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = _first_line(error)
        raise ValueError(
            f"{path} holds more than tensors and was not loaded ({reason}); don't trust its source"
        ) from error
    except Exception as error:  # a damaged pickle fails in many ways, which all mean the same
        raise ValueError(f"{path} is damaged ({_first_line(error)}); fetch it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} is no dictionary of tensors; use a file of weights")
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def write_weights(
    tensors: Mapping[str, Tensor],
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write safetensors, in shards if they are many; at most one shard is in memory at a time.

    Args:
        tensors: by name, read one by one.
        directory: exists already.
        dtype: of floating-point tensors in the file; None leaves them as they are.
        max_shard_bytes: a shard ends before it would grow beyond this.
        progress: called with the bytes of each tensor.
    """
    directory = Path(directory)
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    shard_bytes = total_bytes = 0

    def flush() -> None:
        save_tensors(shard, directory / _part_name(len(shards)))
        shards.append(list(shard))
        shard.clear()

    for name in tensors:
        tensor = tensors[name].detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            shard_bytes = 0
        shard[name] = tensor.cpu().contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        if progress:
            progress(tensor.nbytes)
    flush()
    _name_shards(directory, shards, total_bytes)


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
        raise OSError(f"{path} could not be written ({error}); free some space or choose another directory") from error


def _part_name(index: int) -> str:
    return f"part-{index}.safetensors"


def _name_shards(directory: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the parts their final names, which tell how many there are, and write the index."""
    if len(shards) == 1:
        (directory / _part_name(0)).rename(directory / SAFETENSORS_FILE)
        return
    locations = {}
    for index, names in enumerate(shards):
        file_name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        (directory / _part_name(index)).rename(directory / file_name)
        locations.update(dict.fromkeys(names, file_name))
    index_text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": locations}, indent=2) + "\n"
    (directory / SAFETENSORS_INDEX).write_text(index_text, encoding="utf-8")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a short identity of weights: the same from pickles or safetensors, in one file or many.

    Names, shapes and 64 values spread over each tensor are hashed, so that only a small part of the files is read.
    The image encoder is left out, since some directories carry it and others don't.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in tensors if "vision_tower" not in name and "inv_freq" not in name):
        flat = tensors[name].detach().flatten()
        spread = torch.linspace(0, max(flat.numel() - 1, 0), _FINGERPRINT_SAMPLES, dtype=torch.float64).long()
        digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
        digest.update(flat[spread].float().numpy().tobytes())
    return digest.hexdigest()[:32]
