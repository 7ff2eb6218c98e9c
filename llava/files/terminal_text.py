"""Text for a terminal: control characters escaped, long values shortened, sizes in a fitting unit.

File names, records, servers and models may hold anything. What a terminal would obey is written as an escape, and a
value of a hundred megabytes does not fill the screen.
"""

from __future__ import annotations

import logging
import re
import reprlib
import sys
from collections.abc import Collection

SHOWN = 400
"""Characters of a value that a message shows; a file name has at most 255."""
LINE_SHOWN = 4000
"""Characters of a line that a message or log line may have."""
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ENTRIES_SHOWN = 6
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def escape_controls(text: str) -> str:
    r"""Return a text in which only line ends and tabs act: other control characters, signs that turn the direction of
    writing, and halves of surrogate pairs are written as escapes.

    Example:
        >>> escape_controls("red \x1b[31m")
        'red \\x1b[31m'
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def shorten(text: str, most: int = SHOWN) -> str:
    """Return a text of at most `most` characters as it is, of a longer one its start and its end."""
    if len(text) <= most:
        return text
    head = most * 2 // 3
    tail = most - head
    return f"{text[:head]}... ({len(text) - most:,} characters left out) ...{text[len(text) - tail :]}"


def show(value: object) -> str:
    """Return `repr(value)` for a message, of long or deep values a part."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = SHOWN
    shown.maxlevel = 3
    shown.maxlist = shown.maxtuple = shown.maxdict = _ENTRIES_SHOWN
    return shorten(shown.repr(value), 2 * SHOWN)


def show_list(values: Collection[object], most: int = _ENTRIES_SHOWN) -> str:
    """Return the first values as `show` does, with commas between, and ", ..." if there are more."""
    return ", ".join(map(show, list(values)[:most])) + (", ..." if len(values) > most else "")


def format_message(text: str) -> str:
    """Return an error message or log line, of one or several lines, that is safe to print and of bounded width."""
    return "\n".join(shorten(line, LINE_SHOWN) for line in escape_controls(text).split("\n"))


def format_line(text: str) -> str:
    """Return a message on one line; line ends within it are escaped."""
    return shorten(escape_controls(text).replace("\n", "\\n").replace("\t", "\\t"), LINE_SHOWN)


def format_size(size: float) -> str:
    """Return a number of bytes in the unit that fits: never `0.0 GB`.

    Example:
        >>> format_size(13_500_000_000), format_size(1_234_567), format_size(17)
        ('13.5 GB', '1.2 MB', '17 bytes')
    """
    unit, name = next(((unit, name) for unit, name in _UNITS if size >= unit), (1, "bytes"))
    if unit == 1:
        return f"{size:.0f} byte{'' if size == 1 else 's'}"
    return f"{size / unit:.{0 if size % unit == 0 else 1}f} {name}"


def describe_error(error: Exception) -> str:
    """Return the message of an expected error; what the system says about a file names the file first."""
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}; check the path, and that it may be read and written"


def report_error(error: str | Exception) -> None:
    """Print an error to stderr as all programs do."""
    message = describe_error(error) if isinstance(error, Exception) else error
    print(f"error: {format_message(message)}", file=sys.stderr)


def print_text(text: str, *, end: str = "\n", flush: bool = False) -> None:
    """Print a text that may hold what files, users or models wrote."""
    print(escape_controls(text), end=end, flush=flush)


class TerminalFormatter(logging.Formatter):
    """Format log records like `logging.Formatter`, safe to print."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted record, see `format_message`."""
        return format_message(super().format(record))


def log_to_terminal(level: int = logging.WARNING) -> None:
    """Send log records of this level and above to stderr, the message alone, unless logging is set up already."""
    handler = logging.StreamHandler()
    handler.setFormatter(TerminalFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
