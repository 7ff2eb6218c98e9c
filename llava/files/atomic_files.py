"""Atomic writes of files and directories: written beside the target and renamed to it once they are complete."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llava.files.home_directory import expand_home

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NAME_SHOWN = 40
_PARTIAL = ".partial"
_BEGINNING_SECONDS = 60


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO]:
    """Open a hidden temporary file beside `path` and rename it to `path` once its content is safely on disk.

    Whatever goes wrong before the rename (an exception, a full disk), `path` keeps its previous content and the
    temporary file is removed. Missing parent directories are created; a symbolic link is followed; the permissions of
    an existing file are kept.

    Args:
        path: the file to write.
        mode: "w" for UTF-8 text with `\\n` line ends on every system, "wb" for bytes.

    Yields:
        The open stream.

    Raises:
        ValueError: if `mode` is neither "w" nor "wb".
        OSError: if the file cannot be written, or `path` exists and is not a regular file.

    Example:
        >>> with atomic_write("data.json") as stream:
        ...     json.dump(records, stream)
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode {mode!r} is not supported; use 'w' for text or 'wb' for bytes")
    target = Path(os.path.realpath(expand_home(path)))
    if target.exists() and not target.is_file():
        raise OSError(f"{target} exists and is not a regular file; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden_sibling(target)
    try:
        with temporary.open(mode, **({} if mode == "wb" else {"encoding": "utf-8", "newline": "\n"})) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden empty directory beside `path` that is renamed to `path` once everything in it is safely on disk.

    After an exception the hidden directory is removed and `path` is as it was before. What a killed process
    left is removed by the next one that writes the same directory.

    Args:
        path: the directory to write; its missing parents are created and a symbolic link is followed.
        replace: whether a directory that already holds something is replaced.

    Yields:
        The hidden directory, to be filled by the caller.

    Raises:
        FileExistsError: if `path` is a file, or holds something and `replace` is false.
        OSError: if the directory cannot be written.
    """
    target = Path(os.path.realpath(expand_home(path)))
    _refuse_occupied(target, replace)
    temporary = _hidden_sibling(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        temporary.mkdir()
    except OSError as error:
        raise OSError(
            f"{target} can't be written ({error.strerror}); choose another directory, or let yourself write there"
        ) from error
    try:
        with _locked(temporary):
            yield temporary
            sync_tree(temporary)
            _refuse_occupied(target, replace)
            move_directory(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(target.parent)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Hold a directory's lock, which ends with the process; yield whether it could be had."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_held = True
    except OSError:  # another process has it, or the file system knows no locks
        is_held = False
    try:
        yield is_held
    finally:
        os.close(descriptor)


def remove_leftovers(target: str | os.PathLike[str]) -> None:
    """Remove the hidden directories of killed processes that were writing `target`; those of living ones stay."""
    target = Path(os.path.realpath(expand_home(target)))
    name = re.compile(rf"\.{re.escape(target.name[:_NAME_SHOWN])}\.[0-9a-f]{{8}}{re.escape(_PARTIAL)}")
    for path in target.parent.glob(f".*{_PARTIAL}"):
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with _locked(path) as is_held:
                if is_held and not _is_beginning(path):  # nobody writes it any more
                    shutil.rmtree(path, ignore_errors=True)


def _is_beginning(directory: Path) -> bool:
    """Return whether a directory is empty and so young that its process may not have locked it yet."""
    return not any(directory.iterdir()) and time.time() - directory.stat().st_mtime < _BEGINNING_SECONDS


def _hidden_sibling(target: Path) -> Path:
    return target.with_name(f".{target.name[:_NAME_SHOWN]}.{os.urandom(4).hex()}{_PARTIAL}")


def _refuse_occupied(target: Path, replace: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file, a directory was to be written there; choose another name")
    if target.exists() and not replace and any(target.iterdir()):
        raise FileExistsError(f"{target} already holds files; choose another directory or empty this one")


def move_directory(source: Path, target: Path) -> None:
    """Rename `source` to `target`, which it replaces; what stood there is put back if the rename fails.

    Raises:
        OSError: if it can't be renamed.
    """
    if not target.exists():
        source.rename(target)
        return
    previous = _hidden_sibling(target)
    target.rename(previous)
    try:
        source.rename(target)
    except BaseException:
        previous.rename(target)
        raise
    shutil.rmtree(previous)


def sync_tree(directory: Path) -> None:
    """Return once every file below `directory`, and their names, are safely on disk."""
    for parent, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(Path(parent, name), os.O_RDWR if os.name == "nt" else os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(parent))


def sync_directory(directory: Path) -> None:
    """Return once the names in `directory` are safely on disk."""
    if os.name == "nt":  # Windows cannot open a directory as a file
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
