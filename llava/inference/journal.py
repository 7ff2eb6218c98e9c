"""A file that grows by whole lines, survives any interruption, and belongs to one process while it is open."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where two runs are not kept apart
    fcntl = None


class Journal:
    """Lines in the order in which they were appended.

    Opening changes nothing; `begin` drops a torn last line.

    Args:
        path: the file, made if it is missing, and removed again by `close` if it stays empty.

    Attributes:
        lines: complete ones, without their ends.
        size: bytes of these.

    Raises:
        ValueError: if another process has it open.
        OSError: if it can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _open_locked(path)
        self.lines = split_lines(path.read_bytes())
        self.size = sum(len(line) + 1 for line in self.lines)

    def begin(self, *, anew: bool = False) -> None:
        """Make the file ready for the next line.

        Args:
            anew: forget all lines.

        Raises:
            OSError: if it can't be written.
        """
        if anew:
            self.lines, self.size = [], 0
        os.ftruncate(self._descriptor, self.size)

    def append(self, line: bytes) -> None:
        """Write a line, as a whole or not at all; it is with the operating system when this returns.

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
        self.lines.append(line)
        self.size += len(line) + 1

    def close(self) -> None:
        """Let other processes have the file, or remove it if it is empty."""
        is_empty = os.fstat(self._descriptor).st_size == 0
        if is_empty and fcntl is not None:  # while nobody else can have it
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        if is_empty and fcntl is None:
            self.path.unlink(missing_ok=True)


def split_lines(content: bytes) -> list[bytes]:
    """Return the complete lines; what follows the last line end is torn, or nothing."""
    return content.split(b"\n")[:-1]


def _open_locked(path: Path) -> int:
    """Open a file for appending and take its lock, which ends with the process."""
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
        except OSError:  # a file system without locks
            return descriptor
        if _is_same(descriptor, path):
            return descriptor
        os.close(descriptor)  # its last owner removed it in between


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)
