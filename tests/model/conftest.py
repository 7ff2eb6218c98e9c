"""Directories for the tests of checkpoints: copies of the goldens to be changed, and no network."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants


@pytest.fixture
def copy_golden(goldens: Path) -> Callable[[str, Path], Path]:
    """Return the function (name, target) -> target that copies a golden directory so that its files may be changed."""

    def copy(name: str, target: Path) -> Path:
        shutil.copytree(goldens / name, target)
        for path in target.iterdir():
            path.chmod(0o644)
        return target

    return copy


@pytest.fixture
def change_config() -> Callable[..., None]:
    """Return the function that sets keys of a directory's `config.json`; `...` as a value removes the key."""

    def change(directory: Path, **changes: object) -> None:
        path = directory / "config.json"
        settings = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))

    return change


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt to open a connection fails the test."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path, str], Path]:
    """Return the function (id, source, revision) -> snapshot that lays a directory out as the hub's client does."""
    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))

    def lay_out(name: str, source: Path, revision: str) -> Path:
        repository = root / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir()
        for path in source.iterdir():  # snapshots are links to blobs
            shutil.copyfile(path, repository / "blobs" / path.name)
            (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(revision)
        return snapshot

    return lay_out
