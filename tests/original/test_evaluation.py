"""The original's scores of TextVQA and ST-VQA, and question files in parts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from llava.eval.m4c_evaluator import (
    EvalAIAnswerProcessor,
    STVQAAccuracyEvaluator,
    STVQAANLSEvaluator,
    TextVQAAccuracyEvaluator,
)
from llava.eval.model_vqa import eval_model, get_chunk, split_list

from llava.eval import model_vqa_loader
from llava.eval.eval_science_qa import convert_caps
from llava.original.evaluation import edit_distance


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The two dogs, dont they?", "2 dogs don't they"),
        ("1,000", "1000"),
        ("Bob's", "bob 's"),
        ("U.S.A.", "usa"),
        ("a/b", "b"),
        ("3.5\n", "3.5"),
        ("None", "0"),
    ],
)
def test_answers_are_normalised(answer, expected):
    assert EvalAIAnswerProcessor()(answer) == expected


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_of_textvqa(agreeing, accuracy):
    truths = ["Red!"] * agreeing + [f"other {index}" for index in range(10 - agreeing)]
    found = TextVQAAccuracyEvaluator().eval_pred_list([{"pred_answer": "red", "gt_answers": truths}])
    assert found == pytest.approx(accuracy)


def test_scores_that_can_not_be_computed():
    with pytest.raises(ValueError, match=r"^gt_answers holds 2 answers; TextVQA has 10$"):
        TextVQAAccuracyEvaluator().eval_pred_list([{"pred_answer": "a", "gt_answers": ["a", "b"]}])
    with pytest.raises(ValueError, match=r"^there are no answers to score$"):
        STVQAAccuracyEvaluator().eval_pred_list([])


def test_scores_of_stvqa():
    entries = [
        {"pred_answer": "The Cafe", "gt_answers": ["bar", "cafe"]},
        {"pred_answer": "cafes", "gt_answers": ["cafe", "x"]},
        {"pred_answer": "xyz", "gt_answers": ["cafe"]},
    ]
    assert STVQAAccuracyEvaluator().eval_pred_list(entries) == pytest.approx(1 / 3)
    assert STVQAANLSEvaluator().eval_pred_list(entries) == pytest.approx((0.5 + 0.8 + 0) / 3)
    assert STVQAANLSEvaluator().get_anls("", "") == 1


@pytest.mark.parametrize(("first", "second", "distance"), [("kitten", "sitting", 3), ("", "ab", 2), ("ab", "ab", 0)])
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_answers_as_captions():
    assert convert_caps([{"question_id": "7", "text": "red"}]) == [{"image_id": 7, "caption": "red"}]


def test_parts_of_a_list():
    parts = split_list(list(range(10)), 4)
    assert [len(part) for part in parts] == [2, 3, 2, 3]
    assert [item for part in parts for item in part] == list(range(10))
    assert get_chunk(list(range(10)), 4, 3) == parts[3]
    assert model_vqa_loader.get_chunk is get_chunk


def test_a_question_file_is_answered(goldens, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"question_id": 7, "image": "square.png", "text": "What is it?"}\n')
    arguments = SimpleNamespace(
        model_path=str(goldens / "llava-v1.5-golden"), model_base=None, image_folder=str(goldens / "images"),
        question_file=str(tmp_path / "questions.jsonl"), answers_file=str(tmp_path / "answers.jsonl"),
        conv_mode="llava_v1", num_chunks=1, chunk_idx=0, temperature=0, top_p=None, num_beams=1, max_new_tokens=3,
    )  # fmt: skip
    eval_model(arguments)
    assert '"question_id": 7' in (tmp_path / "answers.jsonl").read_text()


def test_a_run_that_stops_is_an_error(monkeypatch):
    monkeypatch.setattr(model_vqa_loader, "main", lambda argv: 2)
    with pytest.raises(RuntimeError, match=r"^model_vqa_loader stopped with exit code 2; its messages are above$"):
        eval_model(SimpleNamespace(model_path="x"))
