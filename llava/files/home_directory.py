"""Expand `~` in paths, which a shell leaves as it is in quotes and after `--flag=`, and Python always."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

Arguments = TypeVar("Arguments")


def expand_home(path: str | os.PathLike[str]) -> str:
    """Expand a leading `~` or `~user` in a path; without such a user it stays as it is."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises where there is no such user


def expand_homes(arguments: Arguments, *names: str) -> Arguments:
    """Apply `expand_home` to those attributes of parsed arguments that are paths or lists of paths, and return them."""
    for name in names:
        value = getattr(arguments, name)
        if isinstance(value, str | Path):
            setattr(arguments, name, type(value)(expand_home(value)))
        elif isinstance(value, list):
            setattr(arguments, name, [expand_home(path) for path in value])
    return arguments
