"""Errors of tables and of files of records: every bad row is counted, the first of them are listed."""

from __future__ import annotations

_ROWS_SHOWN = 20


class TableError(ValueError):
    """A table, or a file of records, that cannot be used; the message says where and what to do about it."""


class BadRows:
    """Collects what is wrong with the lines of a file, for one message with a count and the first of them."""

    def __init__(self, source: str, unit: str = "line") -> None:
        """Start empty; the message names the file `source` and counts its rows in `unit`."""
        self.source = source
        self.unit = unit
        self._rows: list[tuple[int, str]] = []

    def add(self, number: int, problem: str) -> None:
        """Note one bad row by its line (or other unit), counted from 1."""
        self._rows.append((number, problem))

    def raise_if_any(self, way_out: str) -> None:
        """Raise `TableError` with the count, the first rows and `way_out`, unless nothing was noted.

        Raises:
            TableError: if a bad row was noted.
        """
        if not self._rows:
            return
        count = len(self._rows)
        shown = [f"  {self.unit} {number}: {problem}" for number, problem in sorted(self._rows)[:_ROWS_SHOWN]]
        hidden = [f"  and {count - _ROWS_SHOWN} more"] if count > _ROWS_SHOWN else []
        rows = "1 bad row" if count == 1 else f"{count} bad rows"
        raise TableError("\n".join([f"{self.source}: {rows}", *shown, *hidden, way_out]))
