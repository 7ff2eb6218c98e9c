"""Read text tables: columns divided by commas, semicolons or tabs, which the header shows."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator, Sequence
from operator import itemgetter

from llava.data.table.bad_rows import BadRows, TableError
from llava.data.table.grid import Grid
from llava.files.terminal_text import show, show_list

_DELIMITERS = (",", ";", "\t")
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab"}
_LINE_END = re.compile(r"\r\n|\n|\r")
_DECLARED = re.compile(r'"?sep=(.)"?(?:\r\n|\n|\r)')  # first line of tables that Excel opens
_COLUMNS_SHOWN = 6


def read_csv_grid(text: str, name: str, bad: BadRows, *, delimiter: str | None, wanted: Collection[str]) -> Grid:
    """Parse a text table; rows of another width, and what follows an unbalanced quote, are noted in `bad`.

    A row whose cells are all empty is no row, as an empty line is none: spreadsheets export such rows.

    Args:
        text: decoded, without a byte order mark.
        name: of the file, for messages.
        bad: collects bad rows.
        delimiter: character between columns; None = the one with which the header has most of the `wanted` columns.
        wanted: names of columns.

    Raises:
        TableError: if there is no header, or its delimiter is ambiguous.
    """
    declared = _DECLARED.match(text)
    notes = []
    if delimiter is None:
        delimiter = declared[1] if declared else _find_delimiter(text, name, wanted)
        if delimiter != ",":
            notes.append(f"columns are divided by {_title(delimiter)}")
    if declared:
        text = text[declared.end() - 1 :]  # an empty line instead, so that lines keep their numbers
    reader = _csv_reader(text, delimiter)
    header = _read_header(reader, name)
    lines, rows = _read_rows(reader, text, header, delimiter, bad)
    return Grid(header, lines, "line", lambda number, _: list(map(itemgetter(number), rows)), notes, text.__contains__)


def _read_rows(
    reader: csv.reader, text: str, header: list[str], delimiter: str, bad: BadRows
) -> tuple[Sequence[int], list[list[str]]]:
    """Return the rows after the header, and the line on which each begins."""
    first = reader.line_num + 1
    try:
        rows = list(reader)
    except csv.Error:
        rows = []
    # Most tables have a line for each row; only where that is not so are lines counted row by row.
    is_even = reader.line_num == first - 1 + len(rows) and set(map(len, rows)) == {len(header)}
    if is_even and [""] * len(header) not in rows:
        return range(first, first + len(rows)), rows
    lines, rows = [], []
    reader = _csv_reader(text, delimiter)
    _read_header(reader, bad.source)
    for line, fields in _numbered_rows(reader, text, bad, delimiter):
        if len(fields) == len(header):
            lines.append(line)
            rows.append(fields)
        else:
            bad.add(line, _width_problem(fields, header, delimiter))
    return lines, rows


def _csv_reader(text: str, delimiter: str) -> csv.reader:
    # decoded piece by piece: a StringIO of the whole text takes 4 bytes for every character
    stream = io.TextIOWrapper(io.BytesIO(text.encode(errors="surrogatepass")), "utf-8", "surrogatepass", newline="")
    return csv.reader(stream, delimiter=delimiter, strict=True)


def _read_header(reader: Iterator[list[str]], name: str) -> list[str]:
    try:
        header = next((fields for fields in reader if any(fields)), None)
    except csv.Error as error:
        raise TableError(f"{name}: the header has an unbalanced quote ({error}); correct its quotes") from error
    if header is None:
        raise TableError(f"{name}: the file is empty; a table needs a header and rows")
    return header


def _find_delimiter(text: str, name: str, wanted: Collection[str]) -> str:
    """Return the character that divides the header's columns: by their names, else the only one that divides at all."""
    headers = {}
    for delimiter in _DELIMITERS:
        try:
            headers[delimiter] = _read_header(_csv_reader(text, delimiter), name)
        except TableError:
            continue
    found = {delimiter: len(set(wanted).intersection(header)) for delimiter, header in headers.items()}
    most = max(found.values(), default=0)
    if most > 0:
        likely = [delimiter for delimiter, count in found.items() if count == most]
    else:
        likely = [delimiter for delimiter, header in headers.items() if len(header) > 1]
    if len(likely) > 1 and len({tuple(headers[delimiter]) for delimiter in likely}) > 1:
        ways = [f"{_title(mark)} (columns {show_list(headers[mark], _COLUMNS_SHOWN)})" for mark in likely]
        flags = " or ".join(f"--delimiter {_NAMES[mark]}" for mark in likely)
        raise TableError(f"{name}: the header may be divided by {', or by '.join(ways)}; pass {flags}")
    return likely[0] if likely else ","


def _numbered_rows(reader: csv.reader, text: str, bad: BadRows, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each row with the line on which it begins; empty lines are no rows, unbalanced quotes end the reading."""
    line = reader.line_num + 1
    try:
        for fields in reader:
            if any(fields):
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        opened = _malformed_field_line(text, line, delimiter)
        bad.add(
            opened,
            f"unbalanced quote: the quoted field that begins here is not closed properly ({error}, line "
            f'{reader.line_num}); a quote inside a quoted field is written twice (""); later rows were not '
            "read",
        )


def _malformed_field_line(text: str, row_line: int, delimiter: str) -> int:
    """Line on which the first malformed (or endless) field begins in the row that begins on `row_line`."""
    mark = re.escape(delimiter)
    well_formed = re.compile(rf'("[^"]*(?:""[^"]*)*"|(?!")[^{mark}\r\n]*)(?:{mark}|\r\n|\n|\r)')  # and what ends it
    position = 0
    for _ in range(row_line - 1):
        position = _LINE_END.search(text, position).end()
    row_start = position
    while (field := well_formed.match(text, position)) and len(field[1]) <= csv.field_size_limit():
        position = field.end()
    return row_line + len(_LINE_END.findall(text, row_start, position))


def _width_problem(fields: Sequence[str], header: Sequence[str], delimiter: str) -> str:
    needs_quotes = f"a {_NAMES.get(delimiter, show(delimiter))} inside a text needs quotes around the text"
    way_out = needs_quotes if len(fields) > len(header) else "fill the row up"
    return f"{len(fields)} fields where the header has {len(header)}; {way_out}"


def _title(delimiter: str) -> str:
    return {"\t": "tabs", ",": "commas", ";": "semicolons"}.get(delimiter, show(delimiter))
