"""Fingerprints of the checkpoints that a run's weights come from, and their comparison."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from llava.files.overwrite_check import is_model_file
from llava.model.adapter.recorded_base import recorded_base
from llava.model.checkpoint.checkpoint import Layout, detect_layout, find_config
from llava.model.checkpoint.find_vision_tower import find_tower
from llava.model.checkpoint.hub import resolve_directory
from llava.model.checkpoint.lazy_tensors import digest_tensors, is_same_fingerprint, join_fingerprints
from llava.model.checkpoint.read_tensors import open_tensor_file

_CHUNK_BYTES = 4096
_CHUNKS = 64
_WHOLE_BYTES = 64 * 2**20  # smaller files, such as configs and vocabularies, are hashed whole
_TENSOR_FILES = (".safetensors", ".bin", ".pt")


class ModelSources(NamedTuple):
    """Checkpoints that a model's weights come from.

    Attributes:
        model: full weights, adapter or projector.
        model_base: base of the adapter or projector; None for full weights.
        vision_tower: as given, else as the config names it; None if that is not on this machine.
    """

    model: Path
    model_base: Path | None
    vision_tower: Path | None

    @classmethod
    def find(cls, model_path: str, model_base: str | None = None, vision_tower: str | None = None) -> ModelSources:
        """Find what `open_checkpoint` reads for these arguments, without opening weights.

        Raises:
            FileNotFoundError: if a directory is missing.
            ValueError: if a config is damaged.
        """
        directory = resolve_directory(model_path)
        config, base = find_config(directory), model_base and resolve_directory(model_base)
        if not base and detect_layout(directory) in (Layout.LORA, Layout.PROJECTOR):
            name, revision = recorded_base(directory, config)
            base = name and resolve_directory(name, revision=revision)
        tower = vision_tower and resolve_directory(vision_tower)
        if not tower and config is not None and config.mm_vision_tower:
            near = [directory, *([base] if base else [])]
            tower = find_tower(config.mm_vision_tower, near, revision=config.mm_vision_tower_revision)
        return cls(directory, base or None, tower or None)

    def fingerprints(self) -> dict[str, str | None]:
        """Return the fingerprint of each checkpoint, by field name."""
        return {name: directory and checkpoint_fingerprint(directory) for name, directory in self._asdict().items()}

    def stamps(self) -> tuple[tuple[Any, ...], ...]:
        """Return sizes and times of all files, which change when their content does."""
        return tuple(_stamp(path) for directory in self if directory for path in _model_files(directory))


def checkpoint_fingerprint(name: str | Path) -> str:
    """Return the fingerprint of a checkpoint: a hash of its settings and of samples of every tensor.

    The first half is the format of earlier versions, a hash of 64 samples of each file.

    Args:
        name: directory or hub id.

    Raises:
        FileNotFoundError: if there is no such directory.
    """
    directory = resolve_directory(name)
    sampled, digest = hashlib.sha256(), hashlib.sha256()
    for path in _model_files(directory):
        sampled.update(f"{path.name} {path.stat().st_size}\n".encode())
        sampled.update(_sample(path))
        digest.update(f"{path.name} {_digest_file(path)}\n".encode())
    return join_fingerprints(sampled.hexdigest()[:32], digest.hexdigest()[:32])


def is_same_run_value(key: str, before: Any, now: Any) -> bool:
    """Return whether a setting of two batch runs is equal; fingerprints are compared in the halves that both have."""
    is_recorded = all(value is None or isinstance(value, str) for value in (before, now))
    return is_same_fingerprint(before, now) if key in ModelSources._fields and is_recorded else before == now


def _model_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if is_model_file(path.name) and path.is_file())


def _stamp(path: Path) -> tuple[Any, ...]:
    found = path.stat()
    return str(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest_file(path: Path) -> str:
    """Hash names, shapes and samples of a file's tensors, or the bytes of another file."""
    if path.suffix in _TENSOR_FILES:
        try:
            tensors = open_tensor_file(path)
            return digest_tensors(tensors, sorted(tensors))
        except (ValueError, OSError):  # damaged, or not tensors; loading raises if it needs the file
            pass
    return hashlib.sha256(path.read_bytes() if path.stat().st_size <= _WHOLE_BYTES else _sample(path)).hexdigest()


def _sample(path: Path) -> bytes:
    """Return a file's content, or 64 evenly spread chunks of a large file."""
    size = path.stat().st_size
    if size <= _CHUNKS * _CHUNK_BYTES:
        return path.read_bytes()
    with path.open("rb") as stream:
        samples = []
        for index in range(_CHUNKS):
            stream.seek((size - _CHUNK_BYTES) * index // (_CHUNKS - 1))
            samples.append(stream.read(_CHUNK_BYTES))
    return b"".join(samples)
