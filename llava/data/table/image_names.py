"""File names of a table's images: as they are, or from ids and a template."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import NamedTuple

from llava.data.table.bad_rows import TableError
from llava.data.table.grid import Problems
from llava.files.terminal_text import show

COCO_IMAGE_NAME = "COCO_val2014_{id:012d}.jpg"
"""File name of a COCO val2014 image, the original's images."""
LONGEST_ID = 18
"""Digits of an id that is a number; keeps every one within 64 bits."""

is_id = re.compile(f"[0-9]{{1,{LONGEST_ID}}}").fullmatch
"""Match a text that is the number of an image or of a question."""
is_plain_id = re.compile(f"0|[1-9][0-9]{{0,{LONGEST_ID - 1}}}").fullmatch
"""Match such a text without leading zeros."""

has_ending = re.compile(r".*\.[A-Za-z][A-Za-z0-9]{0,4}\s*", re.DOTALL).fullmatch
"""Match a file name with an ending."""
_ADDRESS = re.compile(r"(?:https?|ftp|s3|gs|hf|data):").match
_ABSOLUTE = re.compile(r"/|~|[A-Za-z]:").match


class NamedImages(NamedTuple):
    """Image of each row: what tells images apart, and its file name; what must be said of the names."""

    ids: Sequence[int | str]
    names: Sequence[str]
    notes: list[str]


def build_image_namer(template: str) -> Callable[[str], str]:
    """Return the function id -> file name of a template such as `COCO_val2014_{id:012d}.jpg`.

    `{id}` alone stands for the text itself, whatever it is; `{id:012d}` for a whole number.

    Raises:
        ValueError: if the template cannot be filled in, or gives two ids the same name.
    """

    def name_image(text: str) -> str:
        return template.format(id=text if takes_text else int(text))

    try:
        takes_text = not needs_number(template)
        names = {name_image("1"), name_image("2")}
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{template!r} cannot be filled in ({error}); write it like {COCO_IMAGE_NAME!r}") from error
    if len(names) < 2:
        raise ValueError(f"{template!r} gives every image one name; write it like {COCO_IMAGE_NAME!r}")
    return name_image


def needs_number(template: str) -> bool:
    """Return whether a template formats the id as a number; `{id}` alone does not.

    Raises:
        ValueError: if the template is malformed.
    """
    fields = [tuple(part[1:]) for part in Formatter().parse(template) if part[1] is not None]
    return any(field != ("id", "", None) for field in fields)


def name_images(
    texts: Sequence[str], column: str, template: str | None, problems: Problems, source: str
) -> NamedImages:
    """Name the image of each row, and note in `problems` the rows without a usable name.

    Without a template, a column of numbers holds ids of COCO val2014 images, and any other file names as they are; one
    with both is read as what most of its different texts are, and the others are bad rows.

    Args:
        texts: cells of the image column.
        column: its name.
        template: of file names; None = found out.
        problems: collects what is wrong with rows.
        source: names the table in messages.

    Raises:
        TableError: if no text is a number or has a file ending.
    """
    unique = dict.fromkeys(texts)
    has_numbers = _are_mostly_numbers(unique)
    notes = [] if has_numbers or template is not None else _check_endings(unique, column, source)
    chosen = template or (COCO_IMAGE_NAME if has_numbers else "{id}")
    if template is not None and not needs_number(template) and (padded := _find_leading_zero(unique)):
        notes.append(f"{column} has leading zeros ({show(padded)}), which stay in the file names")
    name_image, wants_number = build_image_namer(chosen), needs_number(chosen)
    ids: dict[str, int | str] = {}
    names: dict[str, str] = {}
    bad: dict[str, str] = {}
    for text in unique:
        if is_id(text) and (wants_number or template is not None):
            ids[text], names[text] = int(text), name_image(text)
            continue
        name = "" if wants_number else name_image(text).replace("\\", "/")
        problem = find_name_problem(text, name, is_as_it_is=template is None)
        if wants_number:
            problem = f"{show(text)} is not a whole number of at most {LONGEST_ID} digits"
        if problem is not None:
            bad[text] = f"{column} {problem}"
        ids[text] = names[text] = name
    if not wants_number and any("\\" in text for text in unique):
        notes.append(f"folders in {column} are divided by \\, which is written as / into the file names")
    for row, text in enumerate(texts if bad else ()):
        if text in bad:
            problems[row].append(bad[text])
    return NamedImages(list(map(ids.__getitem__, texts)), list(map(names.__getitem__, texts)), notes)


def _are_mostly_numbers(texts: Mapping[str, None]) -> bool:
    if all(map(is_id, texts)):
        return True
    filled = [text for text in texts if text.strip()]
    return 2 * sum(1 for text in filled if is_id(text)) >= len(filled)


def _check_endings(texts: Mapping[str, None], column: str, source: str) -> list[str]:
    """Return the note about names that are taken as they are, unless none of them has an ending."""
    example = next((text for text in texts if has_ending(text)), None)
    if example is not None:
        return [f"{column} holds file names ({show(example)}), which are taken as they are"]
    first = next(text for text in texts if text.strip())
    raise TableError(
        f"{source}: {column} holds neither whole numbers nor file names with an ending (such as {show(first)}); pass "
        f"--image_name '{{id}}.jpg' if that file is called {show(f'{first}.jpg')}, --image_name '{{id}}' if it has no "
        "ending, or name another column with --image_column"
    )


def _find_leading_zero(texts: Mapping[str, None]) -> str | None:
    return next((text for text in texts if len(text) > 1 and text[0] == "0" and is_id(text)), None)


def find_name_problem(text: str, name: str, *, is_as_it_is: bool) -> str | None:
    """Return what is wrong with a file name, None if nothing is; whether there is such a file is not asked."""
    if not text.strip():
        return "is empty"
    if _ADDRESS(name):
        return f"{show(text)} is an address; download the image, and name its file"
    if _ABSOLUTE(name) or os.pardir in name.split("/"):
        last = name.rpartition("/")[2]
        return f"{show(text)} leads out of the image folder; name the file inside the folder, such as {show(last)}"
    if name.endswith("/"):
        return f"{show(text)} is a folder; name a file"
    if is_as_it_is and not has_ending(name):
        return f"{show(text)} has no file ending, as other rows have; pass --image_name '{{id}}' if that is right"
    return None
