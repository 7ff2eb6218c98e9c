"""Keys of questions whose `question_id` may repeat, and matching of the lines of two files.

The first line with an id has the id itself as its key, the second `(id, 2)`, and so on. Lines of two files with the
same id belong together if their texts do (the prompt that was asked holds the question of the annotations); without
texts the first belongs to the first, if both files have equally many, which is logged.

7, "7" and "007" are three ids. An id that the other file has only in another of these forms is found there, if no other
id could be meant.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

from llava.data.table.question_ids import QuestionId, canonical_id, match_forms
from llava.files.terminal_text import shorten, show

logger = logging.getLogger(__name__)

QuestionKey = int | str | tuple[int | str, int]
_IDS_SHOWN = 3
_Value = TypeVar("_Value")


class Keys:
    """Assign keys to the lines of a file, in order."""

    def __init__(self) -> None:
        self._counts: Counter[QuestionId] = Counter()

    def add(self, question_id: QuestionId) -> QuestionKey:
        """Return the key of the next line."""
        self._counts[question_id] += 1
        count = self._counts[question_id]
        return question_id if count == 1 else (question_id, count)


def id_of(key: QuestionKey) -> QuestionId:
    """Return the question_id of a key."""
    return key[0] if isinstance(key, tuple) else key


def describe_key(key: QuestionKey) -> str:
    """Return a key for messages: the id, a text of digits in quotes, and which line with it if it is not the first."""
    question_id = id_of(key)
    shown = shorten(str(question_id)) if canonical_id(question_id) == question_id else show(question_id)
    return f"{shown} (line {key[1]} with this id)" if isinstance(key, tuple) else shown


def rekey_lines(
    name: str, lines: Mapping[QuestionKey, _Value], texts: Mapping[QuestionKey, str], wanted: Mapping[QuestionKey, str]
) -> dict[QuestionKey, _Value]:
    """Return the lines of a file under the keys that their questions have in another.

    Args:
        name: of the file, for messages.
        lines: key -> line.
        texts: key -> question of a line; lines of which it is not known are absent.
        wanted: key -> question, "" where it is not known, of the other file.

    Returns:
        The lines in their order. One without a question in the other file, or with several that it could belong to,
        keeps an id of its own.
    """
    forms = match_forms(set(map(id_of, lines)), set(map(id_of, wanted)))
    lines = {_rename(key, forms): line for key, line in lines.items()}
    texts = {_rename(key, forms): text for key, text in texts.items()}
    if not any(isinstance(key, tuple) for key in (*lines, *wanted)):
        _warn_of_other_questions(name, texts, wanted)
        return lines
    asked: dict[QuestionId, list[QuestionKey]] = defaultdict(list)
    for key in wanted:
        asked[id_of(key)].append(key)
    found = Counter(map(id_of, lines))
    extra = Counter({question_id: len(keys) for question_id, keys in asked.items()})
    paired: dict[QuestionKey, _Value] = {}
    unnamed: dict[QuestionId, tuple[int, int]] = {}
    for key, line in lines.items():
        question_id = id_of(key)
        free = [other for other in asked[question_id] if other not in paired]
        match = _find_match(texts.get(key, ""), {other: wanted[other] for other in free})
        has_questions = bool(texts.get(key)) and all(wanted[other] for other in asked[question_id])
        if match is None and free and not has_questions:
            unnamed[question_id] = (found[question_id], len(asked[question_id]))
            match = free[0] if found[question_id] == len(asked[question_id]) else None
        if match is None:
            extra[question_id] += 1
            match = question_id if extra[question_id] == 1 else (question_id, extra[question_id])
        paired[match] = line
    _warn_of_unnamed_lines(name, unnamed)
    return paired


def _rename(key: QuestionKey, forms: Mapping[QuestionId, QuestionId]) -> QuestionKey:
    question_id = forms.get(id_of(key), id_of(key))
    return (question_id, key[1]) if isinstance(key, tuple) else question_id


def _warn_of_unnamed_lines(name: str, counts: Mapping[QuestionId, tuple[int, int]]) -> None:
    """Log which ids were paired line by line for want of texts, and which could not be.

    Args:
        name: of the file.
        counts: question_id -> its lines in this file and in the other one.
    """
    repeated = [describe_key(question_id) for question_id, (here, there) in counts.items() if here == there > 1]
    uneven = [
        f"{describe_key(question_id)} ({here} here, {there} there)"
        for question_id, (here, there) in counts.items()
        if here != there
    ]
    if repeated:
        logger.warning(
            "%s: question_ids that repeat, not always with their question: %d, %s; their lines are paired in the order "
            "of the files: check that it is the same, or add the questions' text",
            *(name, len(repeated), _list_first(repeated)),
        )
    if uneven:
        logger.warning(
            "%s: question_ids that are on another number of lines in the other file, not always with their question: "
            "%d, %s; these lines are left out: complete the file, or add the questions' text",
            *(name, len(uneven), _list_first(uneven)),
        )


def _list_first(shown: Sequence[str]) -> str:
    return ", ".join([*shown[:_IDS_SHOWN], *["..."] * (len(shown) > _IDS_SHOWN)])


def _warn_of_other_questions(name: str, texts: Mapping[QuestionKey, str], wanted: Mapping[QuestionKey, str]) -> None:
    """Log how many lines ask something else than the other file under their id: row numbers change with the order."""
    both = [key for key, text in texts.items() if text and wanted.get(key)]
    others = [key for key in both if _find_match(texts[key], {key: wanted[key]}) is None]
    if others:
        first = others[0]
        logger.warning(
            "%s: %d of %d questions are not those that the other file has under the same question_id, the first %s: "
            "%s here, %s there; check that the files belong together",
            *(name, len(others), len(both), describe_key(first), show(texts[first]), show(wanted[first])),
        )


def _find_match(text: str, candidates: Mapping[QuestionKey, str]) -> QuestionKey | None:
    """Return the candidate with the same text, else the one with the longest text that holds it or is held by it."""
    text = _plain(text)
    plain = {key: _plain(other) for key, other in candidates.items()}
    same = next((key for key, other in plain.items() if text and other == text), None)
    if same is not None:
        return same
    holding = [key for key, other in plain.items() if text and other and (other in text or text in other)]
    return max(holding, key=lambda key: len(plain[key]), default=None)


def _plain(text: str) -> str:
    return " ".join(text.replace("<image>", " ").casefold().split())
