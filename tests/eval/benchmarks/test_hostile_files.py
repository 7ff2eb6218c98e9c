"""Files of benchmarks that hold any JSON: each is read, or refused by one error with its name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.eval.benchmarks.gqa import read_gqa_questions
from llava.eval.benchmarks.lines import BenchmarkError, count_errors, pair_lines, read_answer_lines, read_question_lines
from llava.eval.benchmarks.pope import judge, read_pope_labels
from llava.eval.benchmarks.scienceqa.score import read_science_problems
from llava.eval.benchmarks.textvqa import read_textvqa_annotations

KEYS = (
    "data", "image_id", "question", "answers", "answer", "imageId", "types", "structural", "test", "1", "choices",
    "image", "id", "conversations", "value", "question_id", "text", "prompt", "error", "label", "category",
)  # fmt: skip
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-1, 3)
    | st.floats()
    | st.sampled_from(["", "1", "yes", "B", "\ud800\x1b[31m"])
)
VALUES = st.recursive(
    LEAVES, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.sampled_from(KEYS), part), max_leaves=12
)


def is_read(read, *paths):
    try:
        return read(*paths) is not None
    except BenchmarkError as error:
        assert str(paths[0]) in str(error)
        return False


@settings(deadline=None, max_examples=60)
@given(VALUES, VALUES)
def test_any_document_is_read_or_refused(value, other):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problems.json"
        path.write_text(json.dumps(value))
        is_read(read_textvqa_annotations, path)
        is_read(read_gqa_questions, path)
        (path.parent / "pid_splits.json").write_text(json.dumps({"test": ["1"], "val": other}))
        for split in ("test", "val"):
            is_read(read_science_problems, path.parent, split)
        path.rename(path.with_name("llava_test_CQM-A.json"))
        is_read(read_science_problems, path.parent)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES), st.sampled_from(KEYS), VALUES)
def test_any_line_is_read_or_refused(record, key, value):
    good = {
        "question_id": 1,
        "text": "Is it?",
        "prompt": "Is it?",
        "image": "a.jpg",
        "label": "yes",
        "category": "random",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coco_pope_random.json"
        for line in (record, {**good, key: value}):
            path.write_text(json.dumps(line) + "\n")
            are_labels = is_read(read_pope_labels, path.parent)
            if is_read(read_question_lines, path) and is_read(read_answer_lines, path) and are_labels:
                questions, answers = read_question_lines(path), read_answer_lines(path)
                count_errors(answers)
                try:
                    pair_lines(questions, answers, "answers")
                    judge(questions, answers, read_pope_labels(path.parent), "answers")
                except BenchmarkError:
                    continue


@pytest.mark.parametrize("text", ["", "{", "[" * 5000, "1" * 5000, '{"data": 1e999}', "\0"])
@pytest.mark.parametrize("read", [read_textvqa_annotations, read_gqa_questions, read_answer_lines, read_question_lines])
def test_texts_that_are_not_annotations(text, read, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(text)
    assert not is_read(read, path)
