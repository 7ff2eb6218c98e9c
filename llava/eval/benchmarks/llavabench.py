"""LLaVA-Bench (in the wild): what a reviewing language model is asked, and the relative score of its reviews.

The reviewer gives marks from 1 to 10 to a reference answer and to the model's; the score is the ratio of their means.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava.eval.benchmarks.lines import (
    AnswerLine,
    BenchmarkError,
    QuestionLine,
    describe_ids,
    pair_lines,
    read_json_lines,
)
from llava.eval.benchmarks.submission import read_json_document
from llava.files.terminal_text import show

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
"""System message of the reviewer, as in the original."""
UNREADABLE = (-1.0, -1.0)
"""Marks of a review that does not begin with two numbers."""
_PREFIX = "llava_bench_"
_ALL = "all"


class ReviewRequest(NamedTuple):
    """What the reviewer is asked about one question, and the keys of its line in the reviews file."""

    content: str
    keys: dict[str, Any]


class MarkMeans(NamedTuple):
    """Mean marks of a category, to three decimals as in the original, and the number of its reviews."""

    reference: float
    model: float
    reviews: int

    @property
    def relative(self) -> float:
        """The model's mean in percent of the reference's."""
        return 100 * self.model / self.reference if self.reference else math.nan


def read_captions(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return image -> caption of context.jsonl; several captions are lines.

    Raises:
        BenchmarkError: if it is another file.
    """
    records = read_json_lines(path, _find_caption_problem)
    return {
        record["image"]: record["caption"] if isinstance(record["caption"], str) else "\n".join(record["caption"])
        for record in records
    }


def read_rules(path: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """Return category -> `{"role", "prompt"}` of the original's rule.json.

    Raises:
        BenchmarkError: if it is another file.
    """
    rules = read_json_document(path)
    parts = rules.values() if isinstance(rules, dict) else []
    is_rules = all(isinstance(rule, dict) and {"role", "prompt"} <= rule.keys() for rule in parts)
    if not parts or not is_rules:
        raise BenchmarkError(f'{path} is not {{category: {{"role", "prompt"}}}}; give the original\'s table/rule.json')
    return rules


def build_review_requests(
    questions: Sequence[QuestionLine],
    reference: tuple[str, Sequence[AnswerLine]],
    model: tuple[str, Sequence[AnswerLine]],
    captions: Mapping[str, str],
    rules: Mapping[str, Mapping[str, str]],
) -> list[ReviewRequest]:
    """Return what is asked about each question, in order.

    Args:
        questions: with `image` and `category`.
        reference: name and lines of the reference answers (answers_gpt4.jsonl).
        model: name and lines of the model's answers.
        captions: from `read_captions`.
        rules: from `read_rules`.

    Raises:
        BenchmarkError: if answers, captions or rules are missing: it holds the counts.
    """
    no_caption = [str(question.question_id) for question in questions if question.image not in captions]
    categories = [f"{_PREFIX}{question.record.get('category')}" for question in questions]
    no_rule = [category for category in dict.fromkeys(categories) if category not in rules]
    if no_caption or no_rule:
        raise BenchmarkError(
            f"{describe_ids(no_caption)} of {len(questions)} questions have an image without caption in --context, and "
            f"{describe_ids(no_rule)} of their categories no rule in --rule; give the benchmark's own files"
        )
    pairs = zip(
        pair_lines(questions, reference[1], reference[0]), pair_lines(questions, model[1], model[0]), strict=True
    )
    requests = []
    for number, ((question, first), (_, second)) in enumerate(pairs, start=1):
        category = categories[number - 1]
        keys = {
            "id": number,
            "question_id": question.question_id,
            "answer1_id": first.record.get("answer_id", first.question_id),
            "answer2_id": second.record.get("answer_id", second.question_id),
            "category": category,
        }
        content = format_review_request(
            captions[question.image or ""], question.text, first.text, second.text, rules[category]
        )
        requests.append(ReviewRequest(content, keys))
    return requests


def format_review_request(caption: str, question: str, first: str, second: str, rule: Mapping[str, str]) -> str:
    """Return the message to the reviewer: context, question, both answers, and the rule by which to mark them."""
    role = rule["role"]
    sections = [
        f"[Context]\n{caption}",
        f"[Question]\n{question}",
        *(f"[{role} {n}]\n{text}\n\n[End of {role} {n}]" for n, text in ((1, first), (2, second))),
        f"[System]\n{rule['prompt']}",
    ]
    return "".join(f"{section}\n\n" for section in sections)


def read_marks(review: str) -> tuple[float, float]:
    """Return the two marks of a review's first line, divided by a space or a comma; `UNREADABLE` if it has others."""
    parts = review.split("\n")[0].replace(",", " ").split()
    try:
        marks = tuple(map(float, parts))
    except ValueError:
        return UNREADABLE
    return marks if len(marks) == 2 and all(map(math.isfinite, marks)) else UNREADABLE


def read_reviews(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a reviews file of JSON lines `{question_id, category, tuple}`; old ones have `score` instead of `tuple`.

    Raises:
        BenchmarkError: if it is missing or empty, or has lines that are not reviews; the first 20 are listed.
    """
    return read_json_lines(path, _find_review_problem)


def summarize_reviews(
    reviews: Sequence[Mapping[str, Any]], name: str, ignored: Sequence[int | str] = ()
) -> tuple[dict[str, MarkMeans], tuple[str, ...]]:
    """Return category -> mean marks, all together first, and notes.

    Args:
        reviews: from `read_reviews`.
        name: of the reviews file, for messages.
        ignored: ids of questions that are left out.

    Raises:
        BenchmarkError: if a question is reviewed twice, or no review with marks is left.
    """
    left_out = set(map(str, ignored))
    kept = [review for review in reviews if str(review["question_id"]) not in left_out]
    ids = [str(review["question_id"]) for review in kept]
    repeated = [question_id for question_id, count in Counter(ids).items() if count > 1]
    marks: dict[str, list[Sequence[float]]] = defaultdict(list)
    unreadable = []
    for review in kept:
        pair = _marks_of(review)
        if min(pair) < 0:
            unreadable.append(str(review["question_id"]))
            continue
        marks[_ALL].append(pair)
        if "category" in review:
            marks[str(review["category"])].append(pair)
    if repeated or not marks[_ALL]:
        raise BenchmarkError(
            f"{name}: {describe_ids(repeated)} questions are reviewed twice, {len(marks[_ALL])} of {len(kept)} reviews "
            "have marks; review again into another file"
        )
    means = {
        category: MarkMeans(
            *(round(math.fsum(column) / len(pairs), 3) for column in zip(*pairs, strict=True)), len(pairs)
        )
        for category, pairs in marks.items()
    }
    notes = (f"{describe_ids(unreadable)} of {len(kept)} reviews have no marks and are left out",) if unreadable else ()
    return means, notes


def format_summary(means: Mapping[str, MarkMeans]) -> str:
    """Return a line for each category as the original prints it: relative score, mean marks of both times ten."""
    return "\n".join(
        f"{category} {part.relative:.1f} {10 * part.reference:.1f} {10 * part.model:.1f}"
        for category, part in sorted(means.items())
    )


def _average(pairs: Sequence[Sequence[float]]) -> MarkMeans:
    reference, model = (round(math.fsum(marks) / len(pairs), 3) for marks in zip(*pairs, strict=True))
    return MarkMeans(reference, model, len(pairs))


def _marks_of(review: Mapping[str, Any]) -> Sequence[float]:
    return review["tuple"] if "tuple" in review else review["score"]


def _find_review_problem(record: Mapping[str, Any]) -> str | None:
    if isinstance(record.get("question_id"), bool) or not isinstance(record.get("question_id"), int | str):
        return "no 'question_id'"
    marks = record.get("tuple", record.get("score"))
    is_pair = isinstance(marks, list) and len(marks) == 2
    if not is_pair or not all(isinstance(mark, int | float) and math.isfinite(mark) for mark in marks):
        return f"'tuple' is {show(marks)}, not two marks"
    return None


def _find_caption_problem(record: Mapping[str, Any]) -> str | None:
    caption = record.get("caption")
    is_list = isinstance(caption, list) and all(isinstance(line, str) for line in caption)
    if not isinstance(record.get("image"), str) or not (is_list or isinstance(caption, str)):
        return "no 'image' and 'caption'"
    return None
