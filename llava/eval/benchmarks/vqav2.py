"""VQAv2: submission file of the test set, in which questions outside the answered split have empty answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava.data.table.question_ids import canonical_id
from llava.data.vqa_normalize import normalize_challenge_answer
from llava.eval.benchmarks.lines import (
    AnswerLine,
    BenchmarkError,
    QuestionLine,
    describe_ids,
    index_answers,
    pair_lines,
)
from llava.eval.benchmarks.submission import note_empty_answers


def convert_vqav2(
    test_questions: Sequence[QuestionLine],
    answers: Sequence[AnswerLine],
    name: str,
    split_questions: Sequence[QuestionLine] | None = None,
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return the submission, `{question_id, answer}` for each question of the whole test set in order, and notes.

    The server takes complete test sets only: what is not answered gets an empty answer, which is counted in the notes.

    Args:
        test_questions: of the whole test set (test2015).
        answers: of a split of it (test-dev2015), in any order.
        name: of the answer file, for messages.
        split_questions: of the split, all of which must be answered; None = not known.

    Raises:
        BenchmarkError: if answers are missing, repeated, or of questions outside the test set.
    """
    by_id = index_answers(answers, name)
    if split_questions is not None:
        pair_lines(split_questions, answers, name)
    asked = {canonical_id(question.question_id): question for question in test_questions}
    if len(asked) < len(test_questions):
        raise BenchmarkError(
            f"{len(test_questions) - len(asked)} question ids of the test set are repeated; get it again"
        )
    outside = [str(question_id) for question_id in by_id if question_id not in asked]
    if outside:
        raise BenchmarkError(
            f"{name}: {describe_ids(outside)} of {len(by_id)} answers are of questions that the test set of "
            f"{len(asked)} does not have; answer a question file of the test set"
        )
    common = [question for question_id, question in asked.items() if question_id in by_id]
    pair_lines(common, answers, name)  # the same questions, not the same ids alone
    entries = [
        {
            "question_id": question.question_id,
            "answer": normalize_challenge_answer(by_id[question_id].text) if question_id in by_id else "",
        }
        for question_id, question in asked.items()
    ]
    notes = [f"{len(by_id)} of the test set's {len(asked)} questions are answered"]
    if len(by_id) < len(asked):
        notes.append(f"{len(asked) - len(by_id)} outside the split are submitted empty, as the server wants them")
    return entries, (*notes, *note_empty_answers(answers))
