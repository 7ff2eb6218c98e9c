"""Texts of users and models in Markdown: shown letter by letter, and tables of cells."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llava.files.terminal_text import escape_controls, shorten

_ACTS = re.compile(r"[\\`*\[\]<>|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""What acts inside a line; within a word an underscore does not."""
_TEXT_SHOWN = 300  # characters


def escape_markdown(text: str, most: int = _TEXT_SHOWN) -> str:
    """Return a text on one line that Markdown and HTML show letter by letter."""
    line = " ".join(escape_controls(shorten(text, most)).split())
    return _ACTS.sub(lambda found: f"&#{ord(found[0])};", line)


def format_markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, which are Markdown, as a table; the first row is its head."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])
