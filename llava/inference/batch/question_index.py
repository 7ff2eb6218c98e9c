"""Find the question of a record of an answers file, also where ids repeat."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llava.files.terminal_text import show
from llava.inference.batch.questions import Question


def answer_id(question: Question, model_id: str) -> str:
    """Return the id of a model's answer to a question, unique within a question file."""
    return hashlib.sha256(json.dumps([model_id, *question.request_id]).encode()).hexdigest()[:22]


class QuestionIndex:
    """Finds the question of a record by its `question_id`, or by its `answer_id` where ids repeat."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._by_id: dict[int | str, Question | list[Question]] = {}
        for question in questions:
            other = self._by_id.setdefault(question.question_id, question)
            if isinstance(other, list):
                other.append(question)
            elif other is not question:
                self._by_id[question.question_id] = [other, question]
        self._by_answer_id: dict[tuple[int | str, str], dict[str, Question]] = {}

    def find(self, record: Mapping[str, Any]) -> Question:
        """Return the question that a record answers.

        Raises:
            ValueError: if there is none.
        """
        found = self._find(record)
        if found is None:
            raise ValueError(f"answers question_id {show(record['question_id'])}, which is not among the questions")
        return found

    def _find(self, record: Mapping[str, Any]) -> Question | None:
        question_id = record["question_id"]
        candidates = self._by_id.get(question_id)
        if not isinstance(candidates, list):
            return candidates
        model_id = str(record.get("model_id"))
        known = self._by_answer_id.get((question_id, model_id))
        if known is None:
            known = {answer_id(question, model_id): question for question in candidates}
            self._by_answer_id[question_id, model_id] = known
        found = record.get("answer_id")
        return known.get(found) if isinstance(found, str) else None
