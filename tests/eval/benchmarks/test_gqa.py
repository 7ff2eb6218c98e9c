"""GQA: the prediction file equals the original's, and the accuracy its definition."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.eval.benchmarks.gqa import convert_gqa, read_gqa_questions, read_prediction, score_gqa
from llava.eval.benchmarks.lines import AnswerLine, BenchmarkError, QuestionLine, read_answer_lines, read_question_lines
from llava.eval.eval_gqa import main

CONVERTER = "convert_gqa_for_eval.py"
INSTRUCTION = "\nAnswer the question using a single word or phrase."
DOCUMENT = {
    "201": {"question": "Is it overcast?", "answer": "no", "imageId": "n1", "types": {"structural": "verify"}},
    "202": {"question": "Who is it?", "answer": "woman", "imageId": "n1", "types": {"structural": "query"}},
    "203": {"question": "What is it?", "answer": "tennis racket", "imageId": "n2", "types": {"structural": "query"}},
}


def reply(question_id, text, error=None):
    prompt = DOCUMENT[str(question_id)]["question"] + INSTRUCTION
    return AnswerLine(question_id, prompt, text, error, {"question_id": question_id, "prompt": prompt, "text": text})


ANSWERS = [reply(203, "Tennis racket."), reply("201", "No"), reply("202", "man")]


def test_accuracy_of_kinds(write_document):
    questions = read_gqa_questions(write_document(DOCUMENT))
    result = score_gqa(questions, ANSWERS, "answers")
    assert {figure.name: round(figure.value, 2) for figure in result.figures} == {
        "accuracy": 66.67, "accuracy, binary": 100, "accuracy, open": 50,
    }  # fmt: skip
    assert [tuple(one) for one in result.questions] == [
        ("201", "n1", "binary", 1), ("202", "n1", "open", 0), ("203", "n2", "open", 1),
    ]  # fmt: skip
    without_types = [question._replace(record={"answer": question.record["answer"]}) for question in questions]
    assert [figure.name for figure in score_gqa(without_types, ANSWERS, "answers").figures] == ["accuracy"]


@settings(deadline=None)
@given(st.permutations(ANSWERS), st.lists(st.sampled_from(["no", "Woman.", "x"]), min_size=3, max_size=3))
def test_the_order_of_answers_does_not_matter(answers, texts):
    questions = [QuestionLine(key, entry["question"], entry["imageId"], entry) for key, entry in DOCUMENT.items()]
    by_id = {str(answer.question_id): text for answer, text in zip(ANSWERS, texts, strict=True)}
    first, second = (
        score_gqa(questions, [one._replace(text=by_id[str(one.question_id)]) for one in order], "answers")
        for order in (ANSWERS, answers)
    )
    assert first == second
    assert all(0 <= figure.value <= 100 for figure in first.figures)


def test_the_originals_answers_join_their_questions(shared_path):
    """The answers are the true ones here, and the annotations the question without its instruction."""
    folder = shared_path("eval/gqa")
    answers = read_answer_lines(folder / "answers/llava-v1.5-13b.jsonl")
    questions = [
        line._replace(text=line.text.partition("\n")[0], record={"answer": read_prediction(answer.text)})
        for line, answer in zip(read_question_lines(folder / "llava_gqa_testdev_balanced.jsonl"), answers, strict=True)
    ]
    result = score_gqa(questions, random.Random(0).sample(answers, len(answers)), "answers")
    assert (len(result.questions), result.figures[0].value) == (800, 100)


def test_predictions_are_the_originals(shared_path, converter, tmp_path):
    src, dst = shared_path("eval/gqa/answers/llava-v1.5-13b.jsonl"), tmp_path / "new/predictions.json"
    assert converter(CONVERTER, src=src, dst=dst) == 0
    records = [json.loads(line) for line in src.read_text().splitlines()]
    assert json.loads(dst.read_text()) == [
        {"questionId": record["question_id"], "prediction": record["text"].rstrip(".").lower()} for record in records
    ]
    assert len(records) == 800


@pytest.mark.parametrize(("text", "prediction"), [("Yes.", "yes"), ("U.S.", "u.s"), ("No...", "no"), ("A. b", "a. b")])
def test_a_prediction_is_in_lower_case_without_full_stop(text, prediction):
    assert read_prediction(text) == prediction


def test_predictions_of_errors_and_numbers():
    predictions, notes = convert_gqa([reply(201, "", "image_missing"), reply(202, "Man")], "answers")
    assert predictions == [{"questionId": "201", "prediction": ""}, {"questionId": "202", "prediction": "man"}]
    assert notes == ("1 of 2 answers are errors and are submitted empty (image_missing 1)",)


def test_files_that_do_not_belong_together(write_document, write_lines, capsys, converter, tmp_path):
    path = write_document(DOCUMENT)
    questions = read_gqa_questions(path)
    with pytest.raises(BenchmarkError, match=r"these 3 questions: 1 \(202\) without an answer, 0 of other"):
        score_gqa(questions, ANSWERS[:2], "answers")
    with pytest.raises(BenchmarkError, match=r"0 without an answer, 1 \(203\) of other questions or repeated"):
        score_gqa(questions, [*ANSWERS, ANSWERS[0]], "answers")
    with pytest.raises(BenchmarkError, match=r"1 \(203\) without an answer, 1 \(203\) of other questions or repeated"):
        score_gqa(questions, [ANSWERS[0]._replace(prompt="Is it?"), *ANSWERS[1:]], "answers")
    answers = str(write_lines("answers.jsonl", [answer.record for answer in (*ANSWERS, ANSWERS[0])]))
    assert main(["--annotation-file", str(path), "--result-file", answers]) == 2
    assert converter(CONVERTER, src=answers, dst=tmp_path / "out.json") == 2
    err = capsys.readouterr().err
    assert "1 (203) of other questions or repeated" in err
    assert "answers.jsonl has 4 lines and 3 different question ids; more than one answer have 1 (203)" in err
    assert not (tmp_path / "out.json").exists()


def test_an_error_counts_as_wrong(write_document):
    document = {**DOCUMENT, "201": {**DOCUMENT["201"], "answer": ""}}
    answers = [reply(203, "x"), reply("201", "", "image_missing"), reply("202", "woman")]
    result = score_gqa(read_gqa_questions(write_document(document)), answers, "answers")
    assert [one.score for one in result.questions] == [0, 1, 0]
    assert result.notes == ("1 of 3 answers are errors and count as wrong (image_missing 1)",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not an object of questions; name testdev_balanced_questions.json"),
        ("{}", "is not an object of questions"),
        ("nothing", "is not JSON"),
        (
            {"1": {"question": "a", "imageId": "b"}},
            "question 1: no 'question', 'answer' and 'imageId'; the test",
        ),
        ({"1": 2}, "question 1: no 'question', 'answer' and 'imageId'"),
    ],
)
def test_questions_that_can_not_be_used(content, message, write_document):
    with pytest.raises(BenchmarkError, match=message):
        read_gqa_questions(write_document(content))


def test_the_program_prints_accuracy_interval_and_published_figure(write_document, write_lines, capsys):
    answers = str(write_lines("answers.jsonl", [answer.record for answer in ANSWERS]))
    assert main(["--annotation-file", str(write_document(DOCUMENT)), "--result-file", answers]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["Samples: 3", "Accuracy: 66.67%"]
    assert out[4].split()[:3] == ["accuracy", "66.67", "%"]
    assert out[4].endswith(" 62.0")
