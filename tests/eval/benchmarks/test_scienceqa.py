"""ScienceQA: letters and accuracies of the original's answers, the forms of answers, and what is refused."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.eval.benchmarks.lines import AnswerLine, BenchmarkError, read_answer_lines
from llava.eval.benchmarks.scienceqa.score import (
    FAILED,
    Problem,
    find_letter,
    get_pred_idx,
    judge,
    read_science_problems,
    score_scienceqa,
)
from llava.eval.eval_science_qa import main

INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."
OWN = {
    "1": {"question": "Which is it?", "choices": ["red", "blue"], "answer": 1, "image": "image.png", "hint": ""},
    "2": {"question": "Who?", "choices": ["you", "me", "they"], "answer": 0, "image": None, "hint": "Now."},
    "3": {"question": "Where?", "choices": ["here", "there"], "answer": 0, "image": "image.png", "hint": ""},
}
PROBLEMS = [
    Problem("1", "Which is it?", "image.png", 2, "B"),
    Problem("2", "Who?", None, 3, "A"),
    Problem("3", "Where?", "image.png", 2, "A"),
]


def reply(question_id, text, error=None):
    prompt = f"Context: Now.\n{OWN[str(question_id)]['question']}\nA. x\nB. y{INSTRUCTION}"
    return AnswerLine(question_id, prompt, text, error, {"question_id": question_id, "prompt": prompt, "text": text})


ANSWERS = [reply(3, "A. here"), reply("1", "The answer is B."), reply("2", "me")]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "problems.json").write_text(json.dumps(OWN))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["1", "2", "3"], "minival": [2]}))
    return tmp_path


def test_answers_of_the_original_give_its_letters_and_figures(shared_path):
    place = shared_path("eval/scienceqa")
    expected = json.loads((place / "expected.json").read_text())
    problems, answers = read_science_problems(place), read_answer_lines(place / "answers/llava-v1.5-13b.jsonl")
    shuffled = random.Random(0).sample(answers, len(answers))
    judged = judge(problems, shuffled, "answers")
    assert {one.problem.question_id: one.letter for one in judged} == expected["parsed"]
    result = score_scienceqa(problems, shuffled, "answers")
    values = {figure.name: figure.value for figure in result.figures}
    assert values["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-9)
    assert values["accuracy, with image"] == pytest.approx(expected["accuracy_with_image"], abs=1e-9)
    assert sum(one.kind == "with image" for one in result.questions) == expected["with_image"]
    assert result.notes == ("2 of 1200 answers name no option and count as wrong",)


def test_the_program_writes_the_originals_files(shared_path, tmp_path, capsys):
    place = shared_path("eval/scienceqa")
    words = ["--base-dir", str(place), "--result-file", str(place / "answers/llava-v1.5-13b.jsonl")]
    words += ["--output-file", str(tmp_path / "new/output.json"), "--output-result", str(tmp_path / "result.json")]
    assert main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "Total: 1200, Correct: 877, Accuracy: 73.08%, IMG-Accuracy: 71.16%"
    assert "accuracy, with image  71.16 %   67.4 to 74.7          66.8" in out
    output = json.loads((tmp_path / "new/output.json").read_text())
    assert [len(output[key]) for key in ("correct", "incorrect")] == [877, 323]
    assert output["correct"][0].keys() == {
        "question_id", "parsed_ans", "ground_truth", "question", "pred", "is_multimodal",
    }  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["acc"], result["correct"], result["count"]) == (pytest.approx(877 / 12), 877, 1200)
    assert (result["results"]["4"], result["outputs"]["4"]) == (1, "B")
    assert list(result["results"].values()).count(-1) == 16  # two name no option, fourteen C of two choices


def test_sciences_own_files_are_read(folder):
    assert read_science_problems(folder) == PROBLEMS
    assert read_science_problems(folder, "minival") == PROBLEMS[1:2]


def test_conversations_are_read_where_these_are_not(tmp_path):
    record = {"id": 7, "image": "7/image.png", "conversations": [
        {"from": "human", "value": "<image>\nWhich?\nA. red\nB. blue\nC. none"}, {"from": "gpt", "value": "C"},
    ]}  # fmt: skip
    (tmp_path / "llava_val_CQM-A.json").write_text(json.dumps([record]))
    text = record["conversations"][0]["value"]
    assert read_science_problems(tmp_path, "val") == [Problem("7", text, "7/image.png", 3, "C")]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B. red", "B"), ("B. ", "B"), ("E", "E"), ("The answer is C.", "C"), ("The answer is C, no", "C"),
        ("The answer is F.", "F"), ("A. The answer is B.", "A"), ("The answer is A, no. The answer is B.", None),
        ("The answer is C", None), ("B.", None), (" B", None), ("B\n", None), ("B\nred", None), ("b", None), ("", None),
        ("F", None), ("B) red", None), ("it is B", None), ("the answer is B.", None), (" B. red", None),
    ],
)  # fmt: skip
def test_letter_of_an_answer(text, letter):
    assert find_letter(text) == letter


def test_index_among_the_choices():
    assert [get_pred_idx(text, ["x", "y"], list("ABCDE")) for text in ("B", "C", FAILED, "A. x")] == [1, -1, -1, -1]
    assert find_letter("2", list("12")) == "2"


def test_accuracies_by_hand(folder):
    result = score_scienceqa(read_science_problems(folder), ANSWERS, "answers")
    assert {figure.name: round(figure.value, 2) for figure in result.figures} == {
        "accuracy, with image": 100, "accuracy": 66.67, "accuracy, text alone": 0,
    }  # fmt: skip
    assert result.notes == ("1 of 3 answers name no option and count as wrong",)
    assert [figure.name for figure in score_scienceqa(PROBLEMS[1:2], ANSWERS[2:], "answers").figures] == [
        "accuracy", "accuracy, text alone",
    ]  # fmt: skip


@settings(deadline=None)
@given(st.permutations(ANSWERS), st.lists(st.sampled_from(["A", "B. y", "?", ""]), min_size=3, max_size=3))
def test_the_order_of_answers_does_not_matter(answers, texts):
    by_id = {str(answer.question_id): text for answer, text in zip(ANSWERS, texts, strict=True)}
    first, second = (
        score_scienceqa(PROBLEMS, [one._replace(text=by_id[str(one.question_id)]) for one in order], "answers")
        for order in (ANSWERS, answers)
    )
    assert first == second
    assert all(0 <= figure.value <= 100 for figure in first.figures)


def test_an_error_counts_as_wrong():
    result = score_scienceqa(PROBLEMS, [*ANSWERS[:2], reply("2", "", "image_missing")], "answers")
    assert [one.score for one in result.questions] == [1, 0, 1]
    assert result.notes == ("1 of 3 answers are errors and count as wrong (image_missing 1)",)


def test_answers_of_other_questions():
    with pytest.raises(BenchmarkError, match=r"^a is not the answers to these 3 questions: 1 \(2\) without an answer"):
        score_scienceqa(PROBLEMS, ANSWERS[:2], "a")
    with pytest.raises(BenchmarkError, match=r"0 without an answer, 1 \(3\) of other questions or repeated"):
        score_scienceqa(PROBLEMS, [*ANSWERS, ANSWERS[0]], "a")
    with pytest.raises(BenchmarkError, match=r"1 \(2\) without an answer, 1 \(2\) of other questions or repeated"):
        score_scienceqa(PROBLEMS, [*ANSWERS[:2], ANSWERS[2]._replace(prompt="Where?")], "a")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds neither problems\.json and pid_splits\.json nor llava_test_CQM-A\.json"),
        ({"problems": OWN}, "holds neither"),
        ({"problems": OWN, "pid_splits": {"val": ["1"], "dev": []}}, "has no split 'test'; it has 'val', 'dev'"),
        ({"problems": OWN, "pid_splits": []}, "has no split 'test'; it has none"),
        ({"problems": [], "pid_splits": {"test": ["1"]}}, "is not an object of problems"),
        ({"problems": OWN, "pid_splits": {"test": ["1", "1"]}}, "ids of the split test are repeated"),
        (
            {"problems": OWN, "pid_splits": {"test": ["9"]}},
            "problem of the split 1: '9' has no 'question' and 'choices'",
        ),
        (
            {"problems": {"1": {**OWN["1"], "answer": 2}}, "pid_splits": {"test": ["1"]}},
            "problem of the split 1: '1' has the answer 2, not the index of one of 2 options",
        ),
        ({"llava_test_CQM-A": {}}, "is not a list of records"),
        (
            {"llava_test_CQM-A": [{"id": 1, "conversations": [{"value": "x"}, {"value": "y"}]}]},
            "record 1: the second turn is 'y', not the letter of one of 5 options",
        ),
        ({"llava_test_CQM-A": [{"conversations": 1}, 3]}, r"2 bad rows\n  record 1: id is None"),
        ({"llava_test_CQM-A": [{"id": 1, "conversations": [1]}]}, "record 1: no question in 'conversations'"),
    ],
)
def test_files_that_can_not_be_used(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(BenchmarkError, match=message):
        read_science_problems(tmp_path)


def test_options_and_outputs_are_checked(folder, write_lines, capsys):
    words = ["--base-dir", str(folder), "--result-file", str(write_lines("a.jsonl", [one.record for one in ANSWERS]))]
    for more, message in (
        (["--options", "AA"], "'AA' is not one letter for each choice, such as ABCDE"),
        (["--output-file", str(folder / "problems.json")], "problems.json would write over --base-dir"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*words, *more])
        assert message in capsys.readouterr().err
    assert main([*words, "--split", "val"]) == 2
    assert "pid_splits.json has no split 'val'; it has 'test', 'minival'" in capsys.readouterr().err
    assert main([*words, "--options", "AB"]) == 0
    assert capsys.readouterr().out.startswith("Total: 3, Correct: 2, Accuracy: 66.67%, IMG-Accuracy: 100.00%\n")
