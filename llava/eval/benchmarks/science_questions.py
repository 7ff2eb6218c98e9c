"""ScienceQA's records as questions for the model, with the original's prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.table.bad_rows import BadRows
from llava.eval.benchmarks.lines import BenchmarkError, raise_bad_rows
from llava.eval.benchmarks.mmbench.table import INSTRUCTIONS
from llava.eval.benchmarks.submission import read_json_document
from llava.files.terminal_text import show
from llava.inference.batch.questions import Question, number_repeats


def read_science_questions(path: str | os.PathLike[str], *, single_pred_prompt: bool = False) -> list[Question]:
    """Read a question file of records `{id, image, conversations}`; those without `image` have text alone.

    Args:
        path: a JSON list, such as llava_test_CQM-A.json.
        single_pred_prompt: ask for the option's letter alone.

    Raises:
        BenchmarkError: if it is another file, or has records without question; the first 20 are listed.
    """
    records = read_json_document(path)
    if not isinstance(records, list) or not records:
        raise BenchmarkError(f"{path} is not a list of records; give ScienceQA's llava_test_CQM-A.json")
    bad, questions = BadRows(os.fspath(path), unit="record"), []
    for number, record in enumerate(records, start=1):
        problem = _find_problem(record)
        if problem:
            bad.add(number, problem)
        else:
            questions.append(_ask(record, single_pred_prompt))
    raise_bad_rows(bad)
    return number_repeats(questions)


def _ask(record: Mapping[str, Any], single_pred_prompt: bool) -> Question:
    text = record["conversations"][0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
    lines = [*([DEFAULT_IMAGE_TOKEN] if "image" in record else []), text]
    if single_pred_prompt:
        lines.append(INSTRUCTIONS["en"])
    return Question(record["id"], "\n".join(lines), (record["image"],) if "image" in record else ())


def _find_problem(record: Any) -> str | None:
    if not isinstance(record, dict):
        return "not an object {…}"
    if isinstance(record.get("id"), bool) or not isinstance(record.get("id"), int | str):
        return f"id is {show(record.get('id'))}, not a number or a text"
    if "image" in record and not isinstance(record["image"], str):
        return f"image is {show(record['image'])}, not a file's name"
    turns = record.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, dict) or not isinstance(first.get("value"), str):
        return "no question in 'conversations'"
    return None
