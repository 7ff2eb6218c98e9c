"""File names of a table's images: as they are, or from ids and a template."""

from __future__ import annotations

import re
from collections.abc import Callable
from string import Formatter

COCO_IMAGE_NAME = "COCO_val2014_{id:012d}.jpg"
"""File name of a COCO val2014 image, the original's images."""
LONGEST_ID = 18
"""Digits of an id that is a number; keeps every one within 64 bits."""

is_id = re.compile(f"[0-9]{{1,{LONGEST_ID}}}").fullmatch
"""Match a text that is the number of an image or of a question."""


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
