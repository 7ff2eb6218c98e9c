"""What can be wrong with rows of training data, by code, and the way out of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SHOWN_ROWS = 20

UNUSABLE = {
    "unreadable_line": "mend or remove the line",
    "not_a_record": "write it as in docs/finetune.md",
    "bad_image_field": "name the file, or leave the key out for text alone",
    "bad_turn": "write it so, or remove the row",
    "roles": "put the turns in order, or remove the row",
    "not_text": "put the value in quotes, or remove the row",
    "empty_turn": "write its text, or remove the row",
    "half_character": "export the text again as UTF-8, or remove the row",
    "caption_without_image": "write <image> into it, or choose another --version",
    "unsupervised": "add the answer, or remove the row",
    "image_count": "write one <image> for each file",
    "no_image_folder": "",
    "path_outside_folder": "",
    "image_missing": "",
    "image_corrupt": "",
    "image_too_large": "",
    "too_long": "",
}
"""Codes of rows that can't be trained on, and the way out; it is empty where the message itself ends with it."""

WARNINGS = {
    "missing_value": "check how the table was exported; if it is meant, nothing needs to be done",
    "duplicate": "remove one of them, or both count twice",
    "conflicting_answers": "keep the right one, unless both are meant",
    "opening_left_out": "begin with a question if it is to be learnt",
    "question_without_text": "write a question beside the image",
}
"""Codes of rows that are trained on and that somebody should look at."""


class Finding(NamedTuple):
    """One thing wrong with one row.

    Attributes:
        code: a key of `UNUSABLE` or `WARNINGS`.
        file: the data file.
        row: counted from 0 in that file.
        message: what is wrong and the way out.
    """

    code: str
    file: str
    row: int
    message: str

    @property
    def is_unusable(self) -> bool:
        """Whether the row can't be trained on."""
        return self.code in UNUSABLE


def with_way_out(code: str, message: str) -> str:
    """Return a message that ends with the way out of its code."""
    way_out = UNUSABLE.get(code) or WARNINGS.get(code)
    return f"{message}; {way_out}" if way_out else message


def list_findings(findings: Sequence[Finding], *, shown: int = SHOWN_ROWS, name_file: bool = True) -> list[str]:
    """Return one line for each of the first findings, and how many more there are."""
    lines = [
        f"  {f'{finding.file}, ' if name_file else ''}row {finding.row}: {finding.message}"
        for finding in findings[:shown]
    ]
    return lines + ([f"  ... and {len(findings) - shown} more"] if len(findings) > shown else [])


def describe_unusable(files: Sequence[str], findings: Sequence[Finding], total: int) -> str:
    """Return a message that counts the rows that can't be used and lists the first 20 reasons.

    Args:
        files: the data files.
        findings: of unusable rows; a row may have several.
        total: rows in all files.
    """
    count = len({(finding.file, finding.row) for finding in findings})
    lines = list_findings(findings, name_file=len(files) > 1)
    return "\n".join([f"{', '.join(files)}: {count} of {total} rows can't be used", *lines])
