"""Warnings about usable records: missing values, duplicates, special tokens and prompts inside texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.data.foreign_records import MARKS_NOT_READ
from llava.data.row_errors import RowError
from llava.data.supervision import ASSISTANT, HUMAN, without_opening
from llava.files.terminal_text import show

MISSING_VALUES = frozenset(
    {"nan", "NaN", "None", "null", "NULL", "NA", "<NA>", "NaT", "undefined", "#N/A", "#NULL!", "#REF!", "#VALUE!"}
)
"""What programs write where a table has no value, letter for letter: `none` and `n/a` are answers."""

SPECIAL_TOKENS = ("<s>", "</s>", "<unk>", DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN)
"""Of Llama's and LLaVA's tokenizers: written in a text they become the token itself."""

_TEXT_SHOWN = 60
_INSTRUCTION_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<|im_start|>", "<|im_end|>")
_ROLES = sorted({template.roles for template in conv_templates.values() if template.roles[0].isalpha()})
_may_hold_marks = re.compile(r"[<\[#:]").search  # most texts hold none of what every mark has


def question_text(value: str) -> str:
    """Return a question without its image marks and the spaces around it."""
    return value.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def questions_of(record: Mapping[str, Any]) -> list[str]:
    """Return the questions of a usable record, without image marks."""
    return [question_text(turn["value"]) for turn in without_opening(record["conversations"])[::2]]


def answers_of(record: Mapping[str, Any]) -> list[str]:
    """Return the answers of a usable record, without the spaces around them."""
    return [turn["value"].strip() for turn in without_opening(record["conversations"])[1::2]]


def find_warnings(record: Mapping[str, Any], template: Conversation) -> Iterator[RowError]:
    """Yield what a usable record holds that was perhaps not meant.

    Args:
        record: a usable one.
        template: an empty dialogue in the prompt template; the captioning one reads no text in questions.
    """
    turns, is_plain = record["conversations"], template.sep_style is SeparatorStyle.PLAIN
    skipped = len(turns) - len(without_opening(turns))
    if skipped:
        yield RowError("opening_left_out", "turn 1, from 'gpt', stands before the first question and is left out")
    for number, turn in enumerate(turns[skipped:], start=1 + skipped):
        place = f"turn {number}, from {show(turn['from'])},"
        text = question_text(turn["value"])
        if is_plain and turn["from"] == HUMAN:
            continue
        if text in MISSING_VALUES:
            yield RowError("missing_value", f"{place} is {text!r}, like a missing value")
        elif not text and turn["from"] != ASSISTANT:
            yield RowError("question_without_text", f"{place} has an image and no text")
        else:
            yield from _find_marks(text, place, template)


def _find_marks(text: str, place: str, template: Conversation) -> Iterator[RowError]:
    marks = dict(find_marks(text))
    if "mmtag" in template.version:
        marks.pop("unknown_image_mark", None)
    yield from (RowError(code, f"{place} holds {what}") for code, what in marks.items())
    is_plain = template.sep_style is SeparatorStyle.PLAIN
    if not is_plain and template.stop_text in text and marks.keys() <= {"unknown_image_mark"}:
        yield RowError("special_token", f"{place} holds {template.stop_text!r}, which ends an answer in this template")


def find_marks(text: str) -> Iterator[tuple[str, str]]:
    """Yield code and description of what belongs to prompts in a text: template words, special tokens, image marks."""
    if not _may_hold_marks(text):
        return
    words = _find_prompt_words(text)
    if words is not None:
        yield ("prompt_in_text", f"{words}, as a whole prompt does")
    token = next((token for token in SPECIAL_TOKENS if token in text), None)
    if token is not None:
        yield ("special_token", f"{token!r}, which becomes the special token of that name")
    mark = next((mark for mark in MARKS_NOT_READ if mark in text), None)
    if mark is not None:
        yield ("unknown_image_mark", f"{mark!r}, which is read as text")


def _find_prompt_words(text: str) -> str | None:
    """Return what makes a text look like a whole prompt: role names as templates write them; None if nothing does."""
    mark = next((mark for mark in _INSTRUCTION_MARKS if mark in text), None)
    if mark is not None:
        return f"{mark!r}"
    for user, assistant in _ROLES:
        marks = [f"{user}:", f"{assistant}:"]
        is_whole = 0 <= text.find(marks[0]) < text.rfind(marks[1])
        if is_whole:
            return f"{marks[0]!r} and {marks[1]!r}"
        if user.isupper() and any(text.startswith(mark) or text.endswith(mark) for mark in marks):
            return next(f"{mark!r}" for mark in marks if text.startswith(mark) or text.endswith(mark))
    return None


def find_duplicates(
    rows: Iterable[tuple[int, Mapping[str, Any], Sequence[Path]]], name_place: Callable[[int], str]
) -> Iterator[RowError]:
    """Yield the rows that ask what an earlier row asks about the same images.

    Args:
        rows: of each usable one its index, the record and the paths of its images.
        name_place: index -> how messages call the row.

    Yields:
        of the later row `duplicate` if an earlier one gives the same answers, else `conflicting_answers`.
    """
    seen: dict[tuple, dict[tuple[str, ...], int]] = {}
    for index, record, images in rows:
        answers = tuple(answers_of(record))
        earlier = seen.setdefault((*images, *questions_of(record)), {})
        if answers in earlier:
            place = name_place(earlier[answers])
            yield RowError("duplicate", f"question, image and answer are those of {place}").at(index)
        elif earlier:
            other, first = next(iter(earlier.items()))
            shown = [" / ".join(texts)[:_TEXT_SHOWN] for texts in (other, answers)]
            message = f"question and image are those of {name_place(first)}, answered {shown[0]!r} there"
            yield RowError("conflicting_answers", f"{message} and {shown[1]!r} here").at(index)
        earlier.setdefault(answers, index)
