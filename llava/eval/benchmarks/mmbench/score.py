"""MMBench: circular accuracy where true answers are published, and the table that its server scores."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from llava.eval.benchmarks.lines import AnswerLine, BenchmarkError, count_errors, describe_ids, plain_text
from llava.eval.benchmarks.mmbench.table import LETTERS, MmbenchRow, is_missing, rotated_letters
from llava.eval.benchmarks.result import BenchmarkResult, QuestionScore, accuracy_figure
from llava.eval.benchmarks.submission import note_empty_answers

_NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION, _PLACE = "prediction", 6  # the column that is added, and where
_LETTER = re.compile(r"\(([A-D])\).*|([A-D])(?:[.:,)].*)?", re.DOTALL)
_KIND_COLUMNS = ("l2-category", "category")


class MmbenchAnswer(NamedTuple):
    """Answer to a row in one rotation of its options."""

    row: MmbenchRow
    round_id: int
    answer: AnswerLine

    @property
    def letter(self) -> str | None:
        """The letter that the chosen option has in the table; None if no option can be read from the answer."""
        letters = rotated_letters(self.row, self.round_id)
        place = read_option(self.answer.text, [self.row.options[LETTERS.index(letter)] for letter in letters])
        return None if place is None else letters[place]


def read_option(text: str, options: Sequence[str]) -> int | None:
    """Return the place of the option that an answer names, None if it names none.

    It is named by its letter alone or before a mark ("B", "B.", "(B) a dog"), or by its text.
    """
    text = text.strip()
    found = _LETTER.fullmatch(text)
    if found:
        place = LETTERS.index(found[1] or found[2])
        return place if place < len(options) else None
    plain = [option.strip().rstrip(".").casefold() for option in options]
    given = text.rstrip(".").casefold()
    return plain.index(given) if given and plain.count(given) == 1 else None


def pair_mmbench(rows: Sequence[MmbenchRow], answers: Sequence[AnswerLine], name: str) -> list[MmbenchAnswer]:
    """Pair rows with their answers by index, round and question; where one row has several rounds, all have.

    Args:
        rows: of the table.
        answers: in any order.
        name: of the answer file, for messages.

    Returns:
        Answers in the order of the rows and rounds.

    Raises:
        BenchmarkError: if answers are missing, repeated or of other questions: it holds the counts.
    """
    has_rounds = any(_round_of(answer) != 0 for answer in answers)
    wanted = {
        (str(row.index), round_id): row for row in rows for round_id in range(len(row.options) if has_rounds else 1)
    }
    found: dict[tuple[str, Any], AnswerLine] = {}
    others = []
    for answer in answers:
        key = (str(answer.question_id), _round_of(answer))
        row = wanted.get(key)
        is_other = (
            row is not None and answer.prompt and plain_text(row.cells["question"]) not in plain_text(answer.prompt)
        )
        if row is None or key in found or is_other:
            others.append(key[0])
        else:
            found[key] = answer
    missing = [key[0] for key in wanted if key not in found]
    if missing or others:
        raise BenchmarkError(
            f"{name} is not the answers to these {len(rows)} rows{' in all rotations' * has_rounds}: "
            f"{describe_ids(missing)} without an answer, {describe_ids(others)} of other questions or repeated; check "
            "that both files are of the same split, or answer again"
        )
    return [MmbenchAnswer(row, key[1], found[key]) for key, row in wanted.items()]


def has_true_answers(rows: Sequence[MmbenchRow]) -> bool:
    """Return whether the table has true answers, which those of test splits have not.

    Raises:
        BenchmarkError: if some rows have one and others have none.
    """
    bad = [row for row in rows if row.answer not in LETTERS]
    if bad and len(bad) < len(rows):
        raise BenchmarkError(
            f"{describe_ids([str(row.index) for row in bad])} of {len(rows)} rows have no answer of A to D; download "
            "the table again"
        )
    return not bad


def score_mmbench(rows: Sequence[MmbenchRow], answers: Sequence[AnswerLine], name: str) -> BenchmarkResult:
    """Score answers: a question counts as right if it is in all rotations of its options that were asked.

    Arguments and errors as of `pair_mmbench`, and of a table without true answers.

    Returns:
        Circular accuracy, then accuracy without rotations if there are any, then circular accuracy by category.
    """
    if not has_true_answers(rows):
        raise BenchmarkError("the table has no true answers: MMBench's server scores this split")
    pairs = pair_mmbench(rows, answers, name)
    by_question: dict[int, list[MmbenchAnswer]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda pair: (pair.row.index, pair.round_id)):  # the question itself comes first
        by_question[pair.row.group].append(pair)
    scores = tuple(
        QuestionScore(str(group), str(group), _kind_of(parts[0].row), float(all(map(_is_right, parts))))
        for group, parts in by_question.items()
    )
    has_rotations = len(pairs) > len(scores)
    figures = [accuracy_figure("circular accuracy" if has_rotations else "accuracy", scores)]
    if has_rotations:
        first = [parts[0] for parts in by_question.values()]
        plain = [score._replace(score=float(_is_right(pair))) for score, pair in zip(scores, first, strict=True)]
        figures.append(accuracy_figure("accuracy without rotations", plain))
    kinds = dict.fromkeys(score.kind for score in scores)
    for kind in kinds if len(kinds) > 1 else ():
        figures.append(accuracy_figure(kind, [score for score in scores if score.kind == kind]))
    return BenchmarkResult(tuple(figures), scores, (*_describe_unread(pairs), *count_errors(answers)))


def convert_mmbench(
    rows: Sequence[MmbenchRow], answers: Sequence[AnswerLine], name: str
) -> tuple[list[list[int | str | None]], tuple[str, ...]]:
    """Return the submission as rows of cells, the header first, and notes; arguments and errors as of `pair_mmbench`.

    Of several rotations the answer to the options as they stand in the table is submitted.
    """
    text = {pair.row.index: pair.answer.text for pair in pair_mmbench(rows, answers, name) if pair.round_id == 0}
    columns = [column for column in rows[0].cells if column not in _NOT_SUBMITTED]
    header = [*columns[:_PLACE], _PREDICTION, *columns[_PLACE:]]
    table: list[list[int | str | None]] = [list(header)]
    for row in rows:
        cells: dict[str, int | str | None] = {
            column: None if is_missing(cell) else cell for column, cell in row.cells.items()
        }
        cells |= {"index": row.index, _PREDICTION: text[row.index] or None}
        table.append([cells[column] for column in header])
    return table, note_empty_answers(answers)


def _is_asked(row: MmbenchRow, answer: AnswerLine) -> bool:
    return plain_text(row.cells["question"]) in plain_text(answer.prompt)


def _is_right(pair: MmbenchAnswer) -> bool:
    return pair.letter == pair.row.answer


def _round_of(answer: AnswerLine) -> Any:
    round_id = answer.record.get("round_id", 0)
    return round_id if isinstance(round_id, int | str) else str(round_id)


def _kind_of(row: MmbenchRow) -> str:
    return next((row.cells[column] for column in _KIND_COLUMNS if row.cells.get(column)), "all")


def _describe_unread(pairs: Sequence[MmbenchAnswer]) -> tuple[str, ...]:
    unread = sum(pair.letter is None and not pair.answer.error for pair in pairs)
    if not unread:
        return ()
    return (
        f"{unread} of {len(pairs)} answers name no option and count as wrong; MMBench's server asks GPT-4 for these",
    )
