"""SEED-Bench: accuracies by hand, the submission file, and files that don't belong together."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.eval.benchmarks.lines import AnswerLine, BenchmarkError
from llava.eval.benchmarks.seed import SeedQuestion, convert_seed, read_seed_questions, score_seed

SCRIPT = "convert_seed_for_submission.py"
TYPES = {"Scene Understanding": 1, "Action Recognition": 10}
QUESTIONS = [
    {"question_id": "101669", "data_id": "a", "data_type": "image", "question_type_id": 1, "answer": "A"},
    {"question_id": "101670", "data_id": "a", "data_type": "image", "question_type_id": 1, "answer": "B"},
    {"question_id": "v1_0", "data_id": "v.webm", "data_type": "video", "question_type_id": 10, "answer": "C"},
    {"question_id": "101671", "data_id": "b", "data_type": "image", "question_type_id": 1, "answer": "D"},
]
GIVEN = [(101671, "D"), ("v1_0", "C"), (101669, "A."), (101670, "B")]


def write(path, questions=QUESTIONS):
    path.write_text(json.dumps({"question_type": TYPES, "questions": questions}))
    return path


def reply(question_id, text, prompt="", **more):
    return {"question_id": question_id, "prompt": prompt, "text": text, **more}


def lines(*records):
    return [AnswerLine(row["question_id"], row["prompt"], row["text"], row.get("error"), row) for row in records]


def test_accuracies_by_hand_and_the_submission(converter, write_lines, tmp_path, capsys):
    flags = {
        "annotation_file": write(tmp_path / "SEED-Bench.json"),
        "result_file": write_lines("a.jsonl", [reply(*row) for row in GIVEN]),
        "result_upload_file": tmp_path / "new/up.jsonl",
    }
    assert converter(SCRIPT, **flags) == 0
    said = capsys.readouterr().out
    for figure in (r"all +75\.00", r"image +66\.67", r"video +100\.00", r"Scene U\w+ +66\.67", r"Action \w+ +100\.00"):
        assert re.search(figure, said)
    assert "1 of 4 answers are not one letter of A to D and count as wrong" in said
    assert [json.loads(line) for line in flags["result_upload_file"].read_text().splitlines()] == [
        {"question_id": "101669", "prediction": "A."},
        {"question_id": "101670", "prediction": "B"},
        {"question_id": "v1_0", "prediction": "C"},
        {"question_id": "101671", "prediction": "D"},
    ]


def test_one_data_type_alone(converter, write_lines, tmp_path, capsys):
    flags = {
        "annotation_file": write(tmp_path / "SEED-Bench.json"),
        "result_file": write_lines("a.jsonl", [reply(*row) for row in GIVEN if row[0] != "v1_0"]),
        "result_upload_file": tmp_path / "up.jsonl",
    }
    assert converter(SCRIPT, **flags) == 2
    assert "1 (v1_0) without an answer (0 image and 1 video questions), 0 of other" in capsys.readouterr().err
    assert converter(SCRIPT, **flags, only="image") == 0
    assert len((tmp_path / "up.jsonl").read_text().splitlines()) == 3


@given(st.lists(st.sampled_from("ABCD"), min_size=1, max_size=8), st.randoms())
def test_the_order_of_answers_does_not_matter(letters, shuffle):
    questions = [SeedQuestion(n, "a", "image", "kind", "A", "") for n in range(len(letters))]
    answers = lines(*(reply(n, letter) for n, letter in enumerate(letters)))
    expected = score_seed(questions, answers, "a"), convert_seed(questions, answers, "a")
    assert expected[0].figures[0].value == pytest.approx(100 * letters.count("A") / len(letters))
    shuffle.shuffle(answers)
    assert (score_seed(questions, answers, "a"), convert_seed(questions, answers, "a")) == expected


def test_errors_and_prompts_of_another_release_are_said():
    questions = [
        SeedQuestion(1, "a", "image", "kind", "A", "What  is it?"),
        SeedQuestion(2, "a", "image", "k", "B", "Who?"),
    ]
    answers = lines(reply(1, "A", prompt="What is it?\nA. dog"), reply(2, "", prompt="When?", error="image_missing"))
    assert score_seed(questions, answers, "a").notes == (
        "1 of 2 prompts are not about the annotations' question of their id; check that both files are of the same "
        "release",
        "1 of 2 answers are errors and count as wrong (image_missing 1)",
    )


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([("101669", "A"), (101669, "B")], r"more than one answer have 1 \(101669\)"),
        ([("9", "A")], r"4 \(101669, 101670, v1_0, …\) without an answer \(3 image and 1 video .*, 1 \(9\) of other"),
    ],
)
def test_answers_twice_and_of_other_questions(tmp_path, answers, message):
    with pytest.raises(BenchmarkError, match=message):
        score_seed(read_seed_questions(write(tmp_path / "s.json")), lines(*(reply(*row) for row in answers)), "a")


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([{**QUESTIONS[0], "answer": "E"}], "1 of 1 questions lack question_id, .*, the first"),
        ([{**QUESTIONS[0], "question_type_id": 7}, "no object"], "2 of 2 questions lack"),
        ([QUESTIONS[0], QUESTIONS[0]], "1 question ids are repeated"),
        ([], "no question of this data type"),
        (None, 'holds no "questions" and "question_type"; give SEED-Bench.json'),
    ],
)
def test_annotations_that_are_something_else(tmp_path, questions, message):
    with pytest.raises(BenchmarkError, match=message):
        read_seed_questions(write(tmp_path / "s.json", questions))


def test_annotations_that_are_no_json(tmp_path):
    (tmp_path / "s.json").write_text("[" * 100_000)
    with pytest.raises(BenchmarkError, match=r"s\.json is not JSON \(nested too deep.*download it again"):
        read_seed_questions(tmp_path / "s.json")
    with pytest.raises(BenchmarkError, match=r"none\.json can't be read \(No such file"):
        read_seed_questions(tmp_path / "none.json")
