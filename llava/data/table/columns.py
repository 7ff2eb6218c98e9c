"""Choose the columns of a table by its header and the options."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from llava.data.table.bad_rows import TableError
from llava.data.table.options import ANSWER_COLUMNS, IMAGE_COLUMNS, QUESTION_ID_COLUMN, TableOptions
from llava.files.terminal_text import show_list

_COLUMNS_SHOWN = 40


class Columns(NamedTuple):
    """Numbers of the chosen columns in the header; `question_id` is None where ids are row numbers."""

    image: int
    question: int
    question_id: int | None
    answers: tuple[int, ...]
    keep: tuple[int, ...]


def wanted_names(options: TableOptions) -> list[str]:
    """Return the names by which a header of this table is recognised."""
    images = [options.image] if options.image else IMAGE_COLUMNS
    answers = options.answer or ANSWER_COLUMNS
    answers = (answers,) if isinstance(answers, str) else answers
    return [*images, options.question, options.question_id or QUESTION_ID_COLUMN, *answers, *options.keep]


def choose_columns(
    header: Sequence[str], options: TableOptions, source: str, images: Collection[int] = ()
) -> tuple[Columns, list[str]]:
    """Return the chosen columns and what must be said about the choice.

    Args:
        header: names of the columns.
        options: of the table.
        source: names the table in messages.
        images: numbers of the columns that hold images rather than names of files.

    Raises:
        TableError: if columns are missing, or their names are not unique.
    """
    notes = []
    image = options.image or _first_there(IMAGE_COLUMNS, header, [header[number] for number in images])
    question_id = options.question_id
    if question_id is None and QUESTION_ID_COLUMN in header:
        question_id = QUESTION_ID_COLUMN
    if question_id is None:
        notes.append(f"no column {QUESTION_ID_COLUMN!r}: the ids of the questions are row numbers, from 0")
    answers: tuple[str, ...] = ()
    if options.has_answers:
        given = options.answer or _first_there(ANSWER_COLUMNS, header)
        answers = (given,) if isinstance(given, str) else tuple(given)
    flags = [("--image_column", image), ("--question_column", options.question)]
    flags += [("--question_id_column", question_id)] if question_id is not None else []
    flags += [("--answer_column", name) for name in answers] + [("--keep", name) for name in options.keep]
    _refuse_missing(flags, header, source)
    places = {name: header.index(name) for _, name in flags}
    chosen = Columns(
        places[image],
        places[options.question],
        None if question_id is None else places[question_id],
        tuple(places[name] for name in answers),
        tuple(places[name] for name in options.keep),
    )
    return chosen, notes


def _first_there(names: Sequence[str], header: Sequence[str], preferred: Sequence[str] = ()) -> str:
    """Return the first of the default names that the header has, one of the preferred columns if there is."""
    there = [name for name in names if name in header]
    return next((name for name in there if name in preferred), there[0] if there else names[0])


def _refuse_missing(flags: Sequence[tuple[str, str]], header: Sequence[str], source: str) -> None:
    missing = [(flag, name) for flag, name in flags if name not in header]
    if missing:
        names = show_list([name for _, name in missing], _COLUMNS_SHOWN)
        *most, last = dict.fromkeys(flag for flag, _ in missing)
        which = f"{', '.join(most)} and {last}" if most else last
        s = "" if len(missing) == 1 else "s"
        found = show_list(header, _COLUMNS_SHOWN)
        raise TableError(f"{source}: no column{s} {names}; the header has {found}; name the right one{s} with {which}")
    for flag, name in flags:
        if header.count(name) > 1:
            raise TableError(
                f"{source}: {header.count(name)} columns are called {name!r}; rename one, or choose with {flag}"
            )
