"""Ids of questions: numbers against their texts, and ids that repeat in a file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set

from llava.data.table.bad_rows import BadRows
from llava.files.terminal_text import show

QuestionId = int | str

_LONGEST_NUMBER = 640  # digits that Python converts under any setting


def canonical_id(question_id: QuestionId) -> QuestionId:
    """Return the number that a text of digits means, 7 for "7" and for "007"; any other id as it is."""
    is_text = isinstance(question_id, str) and question_id.isascii() and question_id.isdigit()
    return int(question_id) if is_text and len(question_id) <= _LONGEST_NUMBER else question_id


def match_forms(ids: Set[QuestionId], others: Set[QuestionId]) -> dict[QuestionId, QuestionId]:
    """Return id -> id of another file, for ids that only one of the two has in this form: 7, "7" or "007".

    Ids that could mean several of the other file, or that several here could mean, are not matched.
    """
    mine, theirs = defaultdict(list), defaultdict(list)
    for question_id in ids - others:
        mine[canonical_id(question_id)].append(question_id)
    for question_id in others - ids:
        theirs[canonical_id(question_id)].append(question_id)
    return {
        found[0]: theirs[number][0] for number, found in mine.items() if len(found) == len(theirs.get(number, ())) == 1
    }


def find_repeats(ids: Iterable[QuestionId]) -> Iterator[tuple[int, int]]:
    """Yield the place of each id that an earlier one equals as a number or text, and the place of the first of these.

    So 7, "7" and "007" are one id: they would be to many a program that joins files by them.
    """
    first: dict[QuestionId, int] = {}
    for place, question_id in enumerate(ids):
        earlier = first.setdefault(canonical_id(question_id), place)
        if earlier != place:
            yield place, earlier


def note_repeats(bad: BadRows, numbers: Sequence[int], ids: Sequence[QuestionId]) -> None:
    """Note the lines of a file whose id is on an earlier line.

    Args:
        bad: of the file.
        numbers: of the lines.
        ids: of the lines.
    """
    for place, earlier in find_repeats(ids):
        form = "" if ids[place] == ids[earlier] else f", as {show(ids[earlier])}"
        bad.add(numbers[place], f"question_id {show(ids[place])} is already on {bad.unit} {numbers[earlier]}{form}")
