"""Options of a table: which columns hold what, how its images are named, how its text is stored; and their flags."""

from __future__ import annotations

import argparse
import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.data.table.image_names import COCO_IMAGE_NAME, build_image_namer

IMAGE_COLUMNS = ("image_id", "image", "file_name")
"""Names under which the column of the images is looked for, in this order."""
QUESTION_COLUMN, QUESTION_ID_COLUMN = "question", "question_id"
ANSWER_COLUMNS = ("answer", "answers")
"""Names under which the column of the answers is looked for, in this order."""
_DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "pipe": "|"}


@dataclass(frozen=True)
class TableOptions:
    """How a table is read; None stands for what is found out and, where it is a choice, said in `Table.notes`.

    Attributes:
        image: column with file names, ids of images, or images; None = the first of `IMAGE_COLUMNS` that is there.
        question: column with the questions.
        question_id: column with their ids; None = `question_id` if it is there, else ids are row numbers.
        answer: column or columns with the answers; None = the first of `ANSWER_COLUMNS`, see `has_answers`.
        has_answers: whether answers are read; without, no column of answers is looked for.
        image_name: template of file names, in which `{id}` stands for the text of the image column; None = file names
            are taken as they are, and numbers are ids of COCO val2014 images.
        keep: further columns, whose texts go into `TableRow.extras`.
        delimiter: character between the columns of a text file; None = found by the header.
        encoding: of a text file; None = UTF-8, and UTF-16 with a byte order mark.
        sheet: name of the sheet of a spreadsheet; None = the first.
    """

    image: str | None = None
    question: str = QUESTION_COLUMN
    question_id: str | None = None
    answer: str | tuple[str, ...] | None = None
    has_answers: bool = True
    image_name: str | None = None
    keep: tuple[str, ...] = ()
    delimiter: str | None = None
    encoding: str | None = None
    sheet: str | None = None


def add_table_flags(parser: argparse.ArgumentParser, *, with_answers: bool = True) -> None:
    """Add the flags of a table to a program's parser; `table_options` reads them.

    Args:
        parser: of the program.
        with_answers: whether the program reads answers from a table.
    """
    group = parser.add_argument_group("tables", "how a table is read (.csv, .tsv, .xlsx, .parquet and others)")
    add = group.add_argument
    add(
        *("--image_column", "--image_id_column"),
        metavar="NAME",
        help=f"column with file names or ids of images, or images (default: the first of {', '.join(IMAGE_COLUMNS)})",
    )
    add("--question_column", metavar="NAME", help=f"column with the questions (default: {QUESTION_COLUMN})")
    add(
        "--question_id_column",
        metavar="NAME",
        help=f"column with the ids of the questions (default: {QUESTION_ID_COLUMN}; without it, row numbers)",
    )
    if with_answers:
        add(
            "--answer_column",
            metavar="NAME",
            nargs="+",
            help="column with the answers, or several; of several answers the most frequent counts "
            f"(default: the first of {', '.join(ANSWER_COLUMNS)})",
        )
    add(
        "--image_name",
        metavar="TEMPLATE",
        type=_parse_image_name,
        help="file name of an image; {id} stands for the text of the image column "
        f"(default: file names as they are; of numbers {COCO_IMAGE_NAME})",
    )
    add(
        "--delimiter",
        metavar="CHARACTER",
        type=_parse_delimiter,
        help="character between columns: ',' ';' '|' or tab (default: found by the header)",
    )
    add("--encoding", type=_parse_encoding, help="of a text file, such as cp1251 (default: utf-8)")
    add("--sheet", metavar="NAME", help="sheet of a spreadsheet (default: the first)")


def table_options(
    args: argparse.Namespace, *, keep: Sequence[str] = (), has_answers: bool | None = None
) -> TableOptions:
    """Return the options that the flags of `add_table_flags` give.

    Args:
        args: parsed command line.
        keep: further columns to read.
        has_answers: whether answers are read; None = if the program has a flag for them.
    """
    answer = getattr(args, "answer_column", None)
    return TableOptions(
        image=args.image_column,
        question=args.question_column or QUESTION_COLUMN,
        question_id=args.question_id_column,
        answer=tuple(answer) if answer else None,
        has_answers="answer_column" in args if has_answers is None else has_answers,
        image_name=args.image_name,
        keep=tuple(keep),
        delimiter=args.delimiter,
        encoding=args.encoding,
        sheet=args.sheet,
    )


def parse_table_values(values: Mapping[str, Any]) -> TableOptions:
    """Return the options that values from Python give, checked as on a command line.

    Args:
        values: name of a flag without dashes -> value, None where it is not given; other names are left alone.

    Raises:
        ValueError: if a flag has a value that no table can have.
    """
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_table_flags(parser)
    words = []
    for flag in given_table_flags(argparse.Namespace(**values)):
        value = values[flag.removeprefix("--")]
        words += [flag, *value] if isinstance(value, list) else [f"{flag}={value}"]
    try:
        return table_options(parser.parse_args(words))
    except argparse.ArgumentError as error:
        raise ValueError(str(error).removeprefix("argument ")) from error


def given_table_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of a table that were given, for a file that is no table: "--sheet has no effect"."""
    names = ("image_column", "question_column", "question_id_column", "answer_column", "image_name", "delimiter")
    return [f"--{name}" for name in (*names, "encoding", "sheet") if getattr(args, name, None) is not None]


def _parse_image_name(text: str) -> str:
    try:
        build_image_namer(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _parse_delimiter(text: str) -> str:
    delimiter = _DELIMITERS.get(text.lower(), text)
    if len(delimiter) != 1 or delimiter in '"\r\n\0' or delimiter.isalnum():
        raise argparse.ArgumentTypeError(f"{text!r} is not a character between columns; use ',' ';' '|' or tab")
    return delimiter


def _parse_encoding(text: str) -> str:
    try:
        "é".encode(codecs.lookup(text).name, errors="replace")
    except (LookupError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an encoding; use one such as utf-8, cp1251 or utf-16"
        ) from None
    return text
