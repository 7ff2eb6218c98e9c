"""Scores of TextVQA: accuracy over ten true answers, joined by image and question.

Source: A. Singh et al., Towards VQA Models That Can Read, CVPR 2019; R. Hu et al., Iterative Answer Prediction with
Pointer-Augmented Multimodal Transformers for TextVQA (M4C), CVPR 2020, whose evaluator the original LLaVA uses.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava.data.vqa_normalize import normalize_challenge_answer, tokenize_challenge_answer
from llava.eval.benchmarks.lines import (
    AnswerLine,
    BenchmarkError,
    QuestionLine,
    convert_entries,
    count_errors,
    pair_lines,
)
from llava.eval.benchmarks.result import BenchmarkResult, QuestionScore, accuracy_figure
from llava.eval.benchmarks.submission import read_json_document
from llava.eval.scoring.accuracy import score_answer
from llava.files.terminal_text import show

_TRUE_ANSWERS = 10
_BETWEEN = re.compile("Question: (.*?) Short answer:", re.DOTALL)
_TOKENS_BEFORE, _TOKENS = "OCR tokens: ", "Reference OCR token:"


def read_textvqa_annotations(path: str | os.PathLike[str]) -> list[QuestionLine]:
    """Read TextVQA's annotations, `{"data": [{image_id, question, answers}]}`, as questions whose id is the image's.

    Raises:
        BenchmarkError: if the file can't be read, or has other entries; the first 20 are listed.
    """
    document = read_json_document(path)
    entries = document.get("data") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise BenchmarkError(f"{path} has no list 'data'; name TextVQA_0.5.1_val.json")
    return convert_entries(path, "annotation", entries, _read_annotation)


def prompt_processor(prompt: str) -> str:
    """Return the question of a prompt in lower case, without the words that OCR found and the instruction.

    Raises:
        ValueError: if the prompt has none of the original's forms.
    """
    lines = prompt.split("\n")
    if prompt.startswith(_TOKENS_BEFORE):
        found = _BETWEEN.search(prompt)
        if found is None:
            raise ValueError(f"prompt {show(prompt)} has no question between 'Question: ' and ' Short answer:'")
        return found[1].lower()
    if len(lines) == 3 and _TOKENS in prompt:
        return lines[1 if prompt.startswith(_TOKENS) else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(
        f"prompt {show(prompt)} is not a question, its {_TOKENS} line or none, and an instruction, on a line each"
    )


def score_textvqa(annotations: Sequence[QuestionLine], answers: Sequence[AnswerLine], name: str) -> BenchmarkResult:
    """Return the accuracy of answers, which has 1 for an answer that at least four of ten people gave, and 0.3 for one.

    Args:
        annotations: from `read_textvqa_annotations`.
        answers: in any order; the prompt holds the question.
        name: of the answer file, for messages.

    Raises:
        BenchmarkError: if the files don't belong together.
    """
    asked = convert_entries(name, "answer", answers, _ask_question_alone)
    scores = tuple(
        QuestionScore(
            str(question.record.get("question_id", f"{question.question_id}/{question.text}")),
            str(question.question_id),
            "all",
            0.0 if answer.error else score_text(answer.text, question.record["answers"]),
        )
        for question, answer in pair_lines(annotations, asked, name)
    )
    return BenchmarkResult((accuracy_figure("accuracy", scores),), scores, count_errors(answers))


def score_text(text: str, truths: Sequence[str]) -> float:
    """Return the accuracy of one answer against the ten people's, 0..1.

    Raises:
        ValueError: if there are not ten.
    """
    if len(truths) != _TRUE_ANSWERS:
        raise ValueError(f"gt_answers holds {len(truths)} answers; TextVQA has {_TRUE_ANSWERS}")
    return score_answer(tokenize_challenge_answer(text), [tokenize_challenge_answer(truth) for truth in truths])


class EvalAIAnswerProcessor:
    """Normalises answers as the challenge of TextVQA does: VQAv2's rules, commas, question marks and 's first."""

    def __call__(self, item: str) -> str:
        """Return the normalised answer."""
        return normalize_challenge_answer(item)

    def word_tokenize(self, word: str) -> str:
        """Return the answer in lower case, without commas and question marks, 's apart."""
        return tokenize_challenge_answer(word)


class TextVQAAccuracyEvaluator:
    """Accuracy of TextVQA, of entries that are joined already."""

    answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Return the mean accuracy, 0..1.

        Args:
            pred_list: entries with `pred_answer` and `gt_answers`, the ten people's.

        Raises:
            ValueError: if there is no entry, or one has not ten true answers.
        """
        if not pred_list:
            raise ValueError("there are no answers to score")
        return sum(score_text(entry["pred_answer"], entry["gt_answers"]) for entry in pred_list) / len(pred_list)


def _ask_question_alone(answer: AnswerLine) -> AnswerLine:
    return answer._replace(prompt=prompt_processor(answer.prompt)) if answer.prompt else answer


def _read_annotation(entry: Any) -> QuestionLine:
    if not isinstance(entry, dict):
        raise ValueError("not an object {…}")
    image, answers = entry.get("image_id"), entry.get("answers")
    if isinstance(image, bool) or not isinstance(image, int | str) or not isinstance(entry.get("question"), str):
        raise ValueError("no 'image_id' and 'question'")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("no list of texts 'answers'; the test split's answers are not published")
    if len(answers) != _TRUE_ANSWERS:
        raise ValueError(f"{len(answers)} answers; TextVQA has {_TRUE_ANSWERS}")
    return QuestionLine(str(image), entry["question"].lower(), str(image), entry)
