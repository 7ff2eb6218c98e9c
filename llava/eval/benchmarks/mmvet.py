"""MM-Vet: the results file that its official evaluation grades."""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.benchmarks.lines import AnswerLine, QuestionLine, index_answers, pair_lines
from llava.eval.benchmarks.submission import note_empty_answers

_PREFIX = "v1_"


def convert_mmvet(
    answers: Sequence[AnswerLine], name: str, questions: Sequence[QuestionLine] | None = None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the results, `v1_<question_id>` -> answer in the order of the answers, and notes.

    Args:
        answers: of all questions.
        name: of the answer file, for messages.
        questions: all of which must be answered; None = not known.

    Raises:
        BenchmarkError: if answers are missing or repeated.
    """
    by_id = index_answers(answers, name)
    if questions is not None:
        pair_lines(questions, answers, name)
    results = {f"{_PREFIX}{answer.question_id}": answer.text for answer in by_id.values()}
    return results, note_empty_answers(answers)
