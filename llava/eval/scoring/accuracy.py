"""VQAv2 accuracy of an answer, answer types, and the confusion of the most frequent answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava.data.vqa_normalize import ANSWER_TYPES, normalize_answer, strip_answer, type_of_normalized
from llava.eval.scoring.annotations import ANSWER_COUNTS
from llava.eval.scoring.question_keys import QuestionKey

RIGHT_FROM = 0.5
"""Least accuracy of an answer that is shown as right. For display only: means are of accuracies."""

ANSWERS_SHOWN = 10
"""Number of answers in a confusion table, and of mistakes in its list."""
OTHER_ANSWERS, NO_ANSWER = "(other)", "(none)"


@dataclass(frozen=True)
class Confusion:
    """Confusion table: how often each true answer was given which answer.

    Attributes:
        true: the most frequent true answers after normalisation, the most frequent first; last "(other)" if there are
            more.
        given: the same, then "(other)" and, after errors, "(none)".
        counts: one row for each of `true`, one column for each of `given`.
        mistakes: of all answers, the most frequent wrong ones as (true, given, questions).
    """

    true: tuple[str, ...]
    given: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    mistakes: tuple[tuple[str, str, int], ...]


def score_answer(prediction: str | None, references: Sequence[str], *, unanimous: str = "normalize") -> float:
    """Score one answer.

    Against one true answer: 1 if both are equal after normalisation, else 0. Against VQAv2's ten: min(1, matches / 3)
    averaged over the ten ways to leave one of them out.

    Args:
        prediction: the answer; None (no answer) is wrong.
        references: one or ten true answers.
        unanimous: what happens where all ten agree. "normalize" compares as everywhere else; "verbatim" compares the
            texts letter for letter, as VQAv2's own program does: there, "Yes" and "yes." miss ten times "yes".

    Returns:
        The accuracy, 0..1.

    Raises:
        ValueError: if the number of references is neither 1 nor 10, or `unanimous` is unknown.
    """
    if len(references) not in ANSWER_COUNTS:
        raise ValueError(f"{len(references)} true answers; a question has one answer or ten")
    if unanimous not in ("normalize", "verbatim"):
        raise ValueError(f"unanimous={unanimous!r} is unknown; use 'normalize' or 'verbatim'")
    if prediction is None:
        return 0.0
    stripped = [strip_answer(text) for text in (prediction, *references)]
    is_verbatim = unanimous == "verbatim" and len(references) > 1 and len(set(stripped[1:])) == 1
    given, *true = stripped if is_verbatim else map(normalize_answer, stripped)
    matches = true.count(given)
    # Each of the ten is left out in turn: (m * min(1, (m - 1) / 3) + (10 - m) * min(1, m / 3)) / 10 = min(1, 0.3 m).
    return float(matches) if len(references) == 1 else min(3 * matches, 10) / 10


def agreed_answer(references: Sequence[str]) -> str:
    """Return the most frequent of the true answers after normalisation, of equally frequent ones the first."""
    return Counter(map(normalize_answer, references)).most_common(1)[0][0]


def derive_answer_type(references: Sequence[str]) -> str:
    """Return the answer type of a question whose annotation names none.

    The rule looks at the true answer that most people gave, normalised: "yes" and "no" are "yes/no"; digits, also with
    a decimal point ("2", "1.5"; number words up to ten become digits), are "number"; the rest is "other".
    """
    return type_of_normalized(agreed_answer(references))


def order_answer_types(types: Sequence[str]) -> list[str]:
    """Return the different types: VQAv2's in their usual order, then further ones alphabetically."""
    found = set(types)
    return [name for name in ANSWER_TYPES if name in found] + sorted(found.difference(ANSWER_TYPES))


def count_confusion(
    predictions: Mapping[QuestionKey, str | None], references: Mapping[QuestionKey, Sequence[str]]
) -> Confusion:
    """Count which answers were given where the most frequent ones were true.

    Args:
        predictions: question_id -> answer, None where there is none.
        references: question_id -> true answers, of the same questions.
    """
    pairs: Counter[tuple[str, str]] = Counter()
    wrong: Counter[tuple[str, str]] = Counter()
    for question_id, answers in references.items():
        prediction = predictions[question_id]
        pair = agreed_answer(answers), NO_ANSWER if prediction is None else normalize_answer(prediction)
        pairs[pair] += 1
        wrong[pair] += score_answer(prediction, answers) < RIGHT_FROM
    totals: Counter[str] = Counter()
    for (true, _), count in pairs.items():
        totals[true] += count
    frequent = sorted(totals, key=lambda answer: (-totals[answer], answer))[:ANSWERS_SHOWN]
    rows = [*frequent, *([OTHER_ANSWERS] if len(totals) > len(frequent) else [])]
    has_errors = any(prediction is None for prediction in predictions.values())
    columns = [*frequent, OTHER_ANSWERS, *([NO_ANSWER] if has_errors else [])]
    cells: Counter[tuple[str, str]] = Counter()
    for (true, given), count in pairs.items():
        cells[true if true in frequent else OTHER_ANSWERS, given if given in columns else OTHER_ANSWERS] += count
    mistakes = sorted((pair for pair in wrong if wrong[pair]), key=lambda pair: (-wrong[pair], pair))[:ANSWERS_SHOWN]
    return Confusion(
        tuple(rows),
        tuple(columns),
        tuple(tuple(cells[row, column] for column in columns) for row in rows),
        tuple((*pair, wrong[pair]) for pair in mistakes),
    )
