"""Rows that can be trained on and that somebody should look at: missing values, duplicates, what is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.supervision import ASSISTANT, HUMAN, Fault, without_opening

MISSING_VALUES = frozenset(
    {"nan", "NaN", "None", "null", "NULL", "NA", "<NA>", "NaT", "undefined", "#N/A", "#NULL!", "#REF!", "#VALUE!"}
)
"""What programs write where a table has no value, letter for letter: `none` and `n/a` are answers."""

_TEXT_SHOWN = 60


def question_text(value: str) -> str:
    """Return a question without its image marks and the spaces around it."""
    return value.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def questions_of(record: Mapping[str, Any]) -> list[str]:
    """Return the questions of a usable record, without image marks."""
    return [question_text(turn["value"]) for turn in without_opening(record["conversations"])[::2]]


def answers_of(record: Mapping[str, Any]) -> list[str]:
    """Return the answers of a usable record, without the spaces around them."""
    return [turn["value"].strip() for turn in without_opening(record["conversations"])[1::2]]


def find_oddities(record: Mapping[str, Any], *, is_plain: bool) -> Iterator[Fault]:
    """Yield what a usable record has that was perhaps not meant.

    Args:
        record: a usable one.
        is_plain: the template is the captioning one, which reads no text in questions.
    """
    turns = record["conversations"]
    skipped = len(turns) - len(without_opening(turns))
    if skipped:
        yield Fault("opening_left_out", "turn 1, from 'gpt', stands before the first question and is left out")
    for number, turn in enumerate(turns[skipped:], start=1 + skipped):
        text = question_text(turn["value"])
        if text in MISSING_VALUES and not (is_plain and turn["from"] == HUMAN):
            yield Fault("missing_value", f"turn {number}, from {turn['from']!r}, is {text!r}, like a missing value")
        elif not text and turn["from"] != ASSISTANT and not is_plain:
            yield Fault("question_without_text", f"turn {number}, from {turn['from']!r}, has an image and no text")


def find_duplicates(
    rows: Iterable[tuple[int, Mapping[str, Any], Sequence[Path]]], name_place: Callable[[int], str]
) -> Iterator[tuple[int, Fault]]:
    """Yield the rows that ask what an earlier row asks about the same images.

    Args:
        rows: of each usable one its index, the record and the paths of its images.
        name_place: index -> how messages call the row.

    Yields:
        the later row's index, and `duplicate` where an earlier one gives the same answers, else `conflicting_answers`.
    """
    seen: dict[tuple, dict[tuple[str, ...], int]] = {}
    for index, record, images in rows:
        answers = tuple(answers_of(record))
        earlier = seen.setdefault((*images, *questions_of(record)), {})
        if answers in earlier:
            place = name_place(earlier[answers])
            yield index, Fault("duplicate", f"question, image and answer are those of {place}")
        elif earlier:
            other, first = next(iter(earlier.items()))
            shown = [" / ".join(texts)[:_TEXT_SHOWN] for texts in (other, answers)]
            message = f"question and image are those of {name_place(first)}, answered {shown[0]!r} there"
            yield index, Fault("conflicting_answers", f"{message} and {shown[1]!r} here")
        earlier.setdefault(answers, index)
