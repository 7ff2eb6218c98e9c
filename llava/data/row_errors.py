"""Row errors: what can be wrong with a row of training data, by code, and how to fix it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SHOWN_ROWS = 20
SHOWN_PER_CODE = 3  # in the doctor's report, unless --shown says otherwise

UNUSABLE = {
    "unreadable_line": "fix or remove the line",
    "not_a_record": "write it as in docs/finetune.md",
    "bad_image_field": "name the file under 'image', or leave the key out for text alone",
    "bad_turn": "write it so, or remove the row",
    "roles": "put the turns in order, or remove the row",
    "system_turn": "write its text in front of the first question, or leave the turn out",
    "not_text": "put the value in quotes, or remove the row",
    "empty_turn": "write its text, or remove the row",
    "half_character": "export the text again as UTF-8, or remove the row",
    "caption_without_image": "write <image> into it, or choose another --version",
    "unsupervised": "add the answer, or remove the row",
    "image_count": "write one <image> for each file",
    "image_in_answer": "move it into a question",
    "no_image_folder": "",
    "path_outside_folder": "",
    "image_missing": "",
    "image_corrupt": "",
    "image_depth": "",
    "image_too_large": "",
    "too_long": "",
}
"""Codes of rows that can't be trained on, and how to fix them; empty where the message itself ends with that."""

WARNINGS = {
    "missing_value": "check how the table was exported; if it is meant, nothing needs to be done",
    "duplicate": "remove one of them, or both count twice",
    "conflicting_answers": "keep the right one, unless both are meant",
    "opening_left_out": "begin with a question if it is to be learnt",
    "question_without_text": "write a question beside the image",
    "special_token": "remove it: the prompt template adds what a turn needs",
    "prompt_in_text": "keep the question or answer alone: the prompt template adds the rest",
    "unknown_image_mark": "write <image> if an image belongs there",
}
"""Codes of rows that are trained on and that somebody should look at, and how to fix them."""


class Place(NamedTuple):
    """Where a row is: the data file, the row counted from 0 and, of a table, its line counted from 1."""

    file: str
    row: int
    line: int | None = None


class RowError(NamedTuple):
    """One reason why a row can't be trained on, or should be looked at.

    Attributes:
        code: a key of `UNUSABLE` or `WARNINGS`.
        message: what is wrong; once it has its place, also how to fix it.
        file: the data file; "" while the rows of all files are counted together.
        row: counted from 0 in that file.
        line: of a table: the line on which the row begins, counted from 1.
    """

    code: str
    message: str
    file: str = ""
    row: int = 0
    line: int | None = None

    @property
    def is_unusable(self) -> bool:
        """Whether the row can't be trained on."""
        return self.code in UNUSABLE

    def at(self, row: int) -> RowError:
        """Return the error of this row among all rows, with how to fix it."""
        return self._replace(message=with_fix(self.code, self.message), row=row)


def with_fix(code: str, message: str) -> str:
    """Return a message that ends with how to fix what its code stands for."""
    fix = UNUSABLE.get(code) or WARNINGS.get(code)
    return f"{message}; {fix}" if fix else message


def describe_row(row: int, line: int | None) -> str:
    """Return how messages call a row: by its number in the file and, of a table, by its line."""
    return f"row {row}" if line is None else f"row {row} (line {line})"


def locate_errors(errors: Sequence[RowError], places: Sequence[Place]) -> list[RowError]:
    """Return errors of rows counted over all files with their place in a file; `places` comes from `locate_rows`."""
    return [error._replace(**places[error.row]._asdict()) for error in errors]


def list_errors(errors: Sequence[RowError], *, shown: int = SHOWN_ROWS, name_file: bool = True) -> list[str]:
    """Return one line for each of the first errors, and how many more there are."""
    lines = [
        f"  {f'{error.file}, ' if name_file else ''}{describe_row(error.row, error.line)}: {error.message}"
        for error in errors[:shown]
    ]
    return lines + ([f"  ... and {len(errors) - shown} more"] if len(errors) > shown else [])


def describe_unusable(files: Sequence[str], errors: Sequence[RowError], total: int) -> str:
    """Return a message that counts the rows that can't be used and lists the first 20 errors.

    Args:
        files: the data files.
        errors: of unusable rows; a row may have several.
        total: rows in all files.
    """
    count = len({(error.file, error.row) for error in errors})
    lines = list_errors(errors, name_file=len(files) > 1)
    return "\n".join([f"{', '.join(files)}: {count} of {total} rows can't be used", *lines])
