"""Append-only journal of lines, which survives any interruption and is locked by one process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from llava.files.regular_files import refuse_non_file

try:
    import fcntl
except ImportError:  # Windows, where the journal is not locked
    fcntl = None

_BLOCK = 1 << 16  # bytes


class Journal:
    """Journal file, open for appending.

    Opening changes nothing; `begin` drops an incomplete last line.

    Args:
        path: created if it is missing; `close` removes it if it is empty.

    Attributes:
        size: bytes of the complete lines.

    Raises:
        ValueError: if another process has it open.
        OSError: if it can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with contextlib.suppress(FileNotFoundError):
            refuse_non_file(path)
        self._descriptor = _open_locked(path)
        self.size = _complete_size(path)

    def begin(self, *, truncate: bool = False) -> None:
        """Prepare the file for the next line.

        Args:
            truncate: drop all lines.

        Raises:
            OSError: if it can't be written.
        """
        if truncate:
            self.size = 0
        os.ftruncate(self._descriptor, self.size)

    def append(self, line: bytes) -> None:
        """Write a line atomically; the operating system has it when this returns.

        Raises:
            OSError: if the disk is full or the file can't be written.
        """
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            os.ftruncate(self._descriptor, self.size)
            raise
        self.size += len(line) + 1

    def close(self) -> None:
        """Unlock the file, and remove it if it is empty."""
        is_empty = os.fstat(self._descriptor).st_size == 0
        if is_empty and fcntl is not None:  # while it is locked
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        if is_empty and fcntl is None:
            self.path.unlink(missing_ok=True)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and content of each complete line; an incomplete last line is skipped.

    A missing file has no lines: it was the empty journal of a rank that has exited since.
    """
    try:
        refuse_non_file(path)
        stream = path.open("rb")
    except FileNotFoundError:
        return
    offset = 0
    with stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return
            yield offset, line[:-1]
            offset += len(line)


def _complete_size(path: Path) -> int:
    """Return the number of bytes up to and including the last newline."""
    with path.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _BLOCK)
            stream.seek(start)
            found = stream.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _open_locked(path: Path) -> int:
    """Open a file for appending, and lock it until the process ends."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        if fcntl is None:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"{path} is being written by another process; wait for it, or choose another --answers-file"
            ) from None
        except OSError:  # the file system has no locks
            return descriptor
        if _is_same(descriptor, path):
            return descriptor
        os.close(descriptor)  # its last owner removed it before the lock was taken


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)
