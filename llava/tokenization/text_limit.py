"""Longest text that is encoded, and the clause that says so of a longer one."""

from __future__ import annotations

MAX_TEXT = 1_000_000
"""Longest text that is encoded, in characters: far beyond any context; a hundred megabytes would take minutes."""
_START_SHOWN = 40  # characters of a text that is too long


def describe_long_text(text: str) -> str:
    """Return what is wrong with a text that is longer than `MAX_TEXT`, as a clause."""
    return f"has {len(text):,} characters, and at most {MAX_TEXT:,} are read (it begins {text[:_START_SHOWN]!r})"
