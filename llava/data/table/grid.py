"""What the reader of a kind of file gives: a header, and columns of cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

Problems = defaultdict[int, list[str]]
"""Number of a row, from 0 -> what is wrong with it."""


class ImageCell(NamedTuple):
    """An image inside a table: the content of its file, None where there is none, and its name or ""."""

    content: bytes | None
    path: str


class Grid(NamedTuple):
    """A table as its file has it.

    Attributes:
        header: names of the columns.
        lines: of each row its line or number, from 1, in the file.
        unit: what `lines` count: "line" or "row".
        read_column: number of a column, and where to note what is wrong with its cells -> their texts; lists are
            written as JSON.
        notes: what was found out about the file and must be said.
        may_contain: text -> whether a cell may contain it; asked before all cells are looked through.
        image_columns: number of a column with images -> function that reads them one by one, whenever it is called, so
            that they need not fit the memory.
        empty_hint: why a cell may be read as empty although it is not, for messages.
    """

    header: list[str]
    lines: Sequence[int]
    unit: str
    read_column: Callable[[int, Problems], list[str]]
    notes: list[str]
    may_contain: Callable[[str], bool] = lambda text: True
    image_columns: Mapping[int, Callable[[], Iterator[ImageCell]]] = {}
    empty_hint: str = ""
