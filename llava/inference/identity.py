"""Which weights a directory holds, told from the content of its files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llava.model.checkpoint import resolve_directory

_SUFFIXES = (".json", ".safetensors", ".bin", ".model")
_CHUNK_BYTES = 4096
_CHUNKS = 64


def directory_identity(name: str | Path) -> str:
    """Return a short identity of a model directory: names, sizes and samples of its files.

    Small files are read whole, of large ones 64 stretches spread evenly, so that 7B weights take well under a second.

    Args:
        name: directory or hub id.

    Raises:
        FileNotFoundError: if there is no such directory.
    """
    directory = resolve_directory(name)
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.suffix in _SUFFIXES and path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(_sample(path))
    return digest.hexdigest()[:32]


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= _CHUNKS * _CHUNK_BYTES:
        return path.read_bytes()
    with path.open("rb") as stream:
        samples = []
        for index in range(_CHUNKS):
            stream.seek((size - _CHUNK_BYTES) * index // (_CHUNKS - 1))
            samples.append(stream.read(_CHUNK_BYTES))
    return b"".join(samples)
