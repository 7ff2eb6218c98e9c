"""Read whole regular files of limited size; refuse pipes, devices and what broken downloads leave.

A named pipe lets its reader wait for ever, and a device such as /dev/zero has no end.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from llava.files.terminal_text import format_size

MAX_DATA_BYTES = 4_000_000_000
"""Largest file of records, questions, answers or annotations, which is read whole."""
MAX_SETTINGS_BYTES = 100_000_000
"""Largest JSON file of a model directory; the largest published tokenizer.json has a third of it."""
_BYTES_LOOKED_AT = 64
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_WEB_PAGES = (b"<!doctype html", b"<html")
_NON_FILES = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}  # fmt: skip


def describe_non_file(mode: int) -> str | None:
    """Return what a path leads to instead of a regular file, by its `st_mode`; None for a file."""
    return next((kind for is_kind, kind in _NON_FILES.items() if is_kind(mode)), None)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a path leads to a regular file; a looping link or an impossible name does not."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for such paths


def refuse_non_file(path: str | os.PathLike[str]) -> os.stat_result:
    """Return the state of a regular file or folder, before it is opened.

    Raises:
        OSError: EINVAL if it is a pipe, a device or a socket, or no path at all; ENOENT and the like from the system.
    """
    try:
        found = Path(path).stat()
    except ValueError as error:  # a zero byte
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from None
    kind = describe_non_file(found.st_mode)
    if kind is not None and not stat.S_ISDIR(found.st_mode):  # a folder: `open` says so
        raise OSError(errno.EINVAL, f"it is {kind}, not a file; write its content to a file", os.fspath(path))
    return found


def read_bytes(path: str | os.PathLike[str], *, most: int = MAX_DATA_BYTES) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file.
        most: largest size, in bytes.

    Raises:
        OSError: as `open` does; EINVAL if it is a pipe, a device or a socket, EFBIG if it is larger than `most`. All
            have `strerror` and `filename`.
    """
    found = refuse_non_file(path)
    if found.st_size > most:
        size, limit = format_size(found.st_size), format_size(most)
        raise OSError(errno.EFBIG, f"it has {size}, and at most {limit} are read; divide it", os.fspath(path))
    with Path(path).open("rb") as stream:
        return stream.read()


def read_text(path: str | os.PathLike[str], *, most: int = MAX_DATA_BYTES, encoding: str = "utf-8") -> str:
    r"""Return the text of a regular file, with `\n` as the only line end.

    Raises:
        OSError: as `read_bytes`.
        UnicodeDecodeError: if it is not in this encoding.
    """
    return read_bytes(path, most=most).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def check_content(path: Path) -> None:
    """Refuse an empty file, a Git LFS pointer and a web page, which broken downloads leave in the place of a file.

    Raises:
        OSError: if it is a pipe, a device or a socket.
        ValueError: naming the file, what it is, and how to get the real one.
    """
    refuse_non_file(path)
    with path.open("rb") as stream:
        start = stream.read(_BYTES_LOOKED_AT)
    if not start:
        raise ValueError(f"{path} is damaged (empty, 0 bytes); fetch it again")
    if start.startswith(_LFS_POINTER):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in {path.parent}, or download the "
            "file again"
        )
    if start.lstrip().lower().startswith(_WEB_PAGES):
        raise ValueError(
            f"{path} is a web page, not the file itself; download it again, logged in if its repository asks for that"
        )
