"""Batches that can be looked at before they are due."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Lookahead(Iterator[dict[str, Any]]):
    """Yields what an iterator yields; an error that came while looking ahead is raised when the batch is due.

    Args:
        batches: not read further than one batch ahead.
    """

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        self.batches = batches
        self._seen: list[dict[str, Any] | BaseException] = []

    def __next__(self) -> dict[str, Any]:
        seen = self._seen.pop() if self._seen else next(self.batches)
        if isinstance(seen, BaseException):
            raise seen
        return seen

    def peek(self) -> dict[str, Any] | None:
        """Return the next batch, which stays the next one; None if there is none, or an error in its place."""
        if not self._seen:
            try:
                self._seen.append(next(self.batches))
            except Exception as error:
                self._seen.append(error)
        (seen,) = self._seen
        return None if isinstance(seen, BaseException) else seen
