"""ScienceQA's file of conversations: its records, and their questions with the original's prompts."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.benchmarks.lines import BenchmarkError, convert_entries
from llava.eval.benchmarks.mmbench.table import INSTRUCTIONS
from llava.eval.benchmarks.submission import read_json_document
from llava.files.terminal_text import show
from llava.inference.batch.questions import Question, number_repeats


class ScienceRecord(NamedTuple):
    """A record `{id, image, conversations}`.

    Attributes:
        question_id: as it stands there.
        image: name of the file; None for text alone.
        text: of the first turn, with the image's placeholder.
        right: text of the second turn, which names the true option; None without one.
    """

    question_id: int | str
    image: str | None
    text: str
    right: str | None


def read_science_records(path: str | os.PathLike[str]) -> list[ScienceRecord]:
    """Read a JSON list of records, such as llava_test_CQM-A.json.

    Raises:
        BenchmarkError: if it is another file, or has records without question; the first 20 are listed.
    """
    entries = read_json_document(path)
    if not isinstance(entries, list) or not entries:
        raise BenchmarkError(f"{path} is not a list of records; give ScienceQA's llava_test_CQM-A.json")
    return convert_entries(path, "record", entries, _read_record)


def read_science_questions(path: str | os.PathLike[str], *, single_pred_prompt: bool = False) -> list[Question]:
    """Read the questions of a file, those of records without image about text alone; errors as of the records.

    Args:
        path: as in `read_science_records`.
        single_pred_prompt: ask for the option's letter alone.
    """
    return number_repeats([_ask(record, single_pred_prompt) for record in read_science_records(path)])


def _ask(record: ScienceRecord, single_pred_prompt: bool) -> Question:
    images = () if record.image is None else (record.image,)
    lines = [DEFAULT_IMAGE_TOKEN] * len(images) + [record.text.replace(DEFAULT_IMAGE_TOKEN, "").strip()]
    if single_pred_prompt:
        lines.append(INSTRUCTIONS["en"])
    return Question(record.question_id, "\n".join(lines), images)


def _read_record(entry: Any) -> ScienceRecord:
    if not isinstance(entry, dict):
        raise ValueError("not an object {…}")
    question_id, image, turns = (entry.get(key) for key in ("id", "image", "conversations"))
    if isinstance(question_id, bool) or not isinstance(question_id, int | str):
        raise ValueError(f"id is {show(question_id)}, not a number or a text")
    if not isinstance(image, str | None):
        raise ValueError(f"image is {show(image)}, not a file's name")
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns] if isinstance(turns, list) else []
    if not texts or not isinstance(texts[0], str):
        raise ValueError("no question in 'conversations'")
    right = texts[1] if len(texts) > 1 and isinstance(texts[1], str) else None
    return ScienceRecord(question_id, image or None, texts[0], right)
