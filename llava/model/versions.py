"""The libraries this package needs, checked once at import: an old one fails here, with the command that mends it."""

from __future__ import annotations

from importlib.metadata import version

OLDEST = {"torch": (2, 10), "transformers": (5, 10), "peft": (0, 20), "accelerate": (1, 10)}
"""Oldest supported versions, as in `pyproject.toml`."""


def check_versions() -> None:
    """Compare installed versions with the oldest supported ones.

    Raises:
        ImportError: if one is older; the message holds the command that updates it.
    """
    old = [
        f"{name} {version(name)} (needs {'.'.join(map(str, oldest))})"
        for name, oldest in OLDEST.items()
        if tuple(int(part) for part in version(name).split(".")[:2]) < oldest
    ]
    if old:
        wanted = " ".join(f'"{name}>={".".join(map(str, oldest))}"' for name, oldest in OLDEST.items())
        raise ImportError(f"too old: {', '.join(old)}; run: pip install --upgrade {wanted}")
