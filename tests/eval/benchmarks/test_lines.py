"""Lines of question and answer files: what is read, what is refused, and which answer belongs to which question."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.eval.benchmarks.lines import (
    AnswerLine,
    BenchmarkError,
    QuestionLine,
    count_errors,
    drop_instructions,
    pair_lines,
    read_answer_lines,
    read_question_lines,
)


def ask(question_id, text="What?", image="a.jpg"):
    return QuestionLine(question_id, text, image, {})


def reply(question_id, prompt="What?", text="red", error=None):
    return AnswerLine(question_id, prompt, text, error, {})


def test_lines_are_read(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(
        '\ufeff{"question_id": 1, "text": "red", "prompt": "What?"}\r\n\n{"question_id": "x", "error": "no_image"}\n',
        encoding="utf-8",
    )
    first, second = read_answer_lines(path)
    assert first[:4] == (1, "What?", "red", None)
    assert second[:4] == ("x", "", "", "no_image")
    path.write_text('{"question_id": 1, "text": "What?", "category": "default"}\n')
    (question,) = read_question_lines(path)
    assert question == (1, "What?", None, {"question_id": 1, "text": "What?", "category": "default"})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("not json", "not JSON"),
        ("[" * 200 + "]" * 200, "not JSON"),
        ("1" * 5000, "not JSON"),
        ("[1]", r"not an object \{…\}"),
        ('{"question_id": true, "text": "a"}', "question_id is True, not a number or a text"),
        ('{"question_id": 1.5, "text": "a"}', "question_id is 1.5, not a number or a text"),
        ('{"question_id": [], "text": "a"}', r"question_id is \[\], not a number or a text"),
        ('{"text": "a"}', "question_id is None, not a number or a text"),
        ('{"question_id": 1}', "no 'text'"),
        ('{"question_id": 1, "text": {"a": 1}}', "no 'text'"),
    ],
)
@pytest.mark.parametrize("read", [read_question_lines, read_answer_lines])
def test_bad_lines_are_listed(line, problem, read, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"question_id": 1, "text": "a"}}\n{line}\n')
    with pytest.raises(BenchmarkError, match=rf"lines\.jsonl: 1 bad row\n  line 2: {problem}\nCorrect these, or make"):
        read(path)


def test_values_that_only_one_kind_of_line_has(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"question_id": 1, "text": "a", "image": ["b"], "prompt": {}}\n')
    with pytest.raises(BenchmarkError, match=r"line 1: image is \['b'\], not a file's name"):
        read_question_lines(path)
    with pytest.raises(BenchmarkError, match=r"line 1: prompt is \{\}, not a text"):
        read_answer_lines(path)


def test_files_that_can_not_be_read(tmp_path):
    path = tmp_path / "lines.jsonl"
    with pytest.raises(BenchmarkError, match=r"lines\.jsonl can't be read \(No such file or directory\)$"):
        read_answer_lines(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BenchmarkError, match=r"lines\.jsonl can't be read \('utf-8' codec"):
        read_answer_lines(path)
    path.write_text("\n\n")
    with pytest.raises(BenchmarkError, match=r"lines\.jsonl is empty; make the file again$"):
        read_answer_lines(path)


QUESTIONS = [ask(7, "What?"), ask(7, "Where?"), ask(7, "What?"), ask("8", "What?")]
ANSWERS = [
    reply("7", "<image>\nWhat?", "first"),
    reply("7", "Where?", "second"),
    reply("7", "What?", "third"),
    reply(8, "What?", "fourth"),
]


def texts(pairs):
    return [answer.text for _, answer in pairs]


def test_an_id_is_found_in_another_form_and_may_repeat():
    pairs = pair_lines(QUESTIONS, ANSWERS, "answers")
    assert [question for question, _ in pairs] == QUESTIONS
    assert texts(pairs) == ["first", "second", "third", "fourth"]
    assert texts(pair_lines([ask("007", "What?")], [reply(7, "What?", "first")], "answers")) == ["first"]


@given(st.permutations([7, "7", "007"]))
def test_three_forms_of_a_number_are_three_ids(ids):
    questions = [ask(question_id, "What?") for question_id in (7, "7", "007")]
    answers = [reply(question_id, "What?\nOne word.", repr(question_id)) for question_id in ids]
    pairs = pair_lines(questions, drop_instructions(questions, answers), "answers")
    assert texts(pairs) == ["7", "'7'", "'007'"]
    with pytest.raises(BenchmarkError, match=r"2 \(7, 007\) of other questions or repeated"):
        pair_lines([ask("07", "What?")], [reply("7", "What?"), reply("007", "What?")], "answers")


@settings(deadline=None)
@given(st.permutations(range(4)))
def test_the_order_of_answers_matters_only_among_the_same_question(order):
    answers = [ANSWERS[index] for index in order]
    first, third = [answer.text for answer in answers if answer.text in ("first", "third")]
    assert texts(pair_lines(QUESTIONS, answers, "answers")) == [first, "second", third, "fourth"]


@pytest.mark.parametrize(
    ("answers", "counts"),
    [
        (ANSWERS[:2], r"2 \(7, 8\) without an answer, 0 of other questions or repeated"),
        ([*ANSWERS, ANSWERS[3]], r"0 without an answer, 1 \(8\) of other questions or repeated"),
        (
            [*ANSWERS[:3], reply(8, "Who?")],
            r"1 \(8\) without an answer, 1 \(8\) of other questions or repeated",
        ),
        ([reply(index) for index in range(9, 14)], r"4 \(7, 7, 7, …\) without an answer, 5 \(9, 10, 11, …\) of other"),
    ],
    ids=["missing", "twice", "another question", "another split"],
)
def test_answers_of_other_questions_are_refused(answers, counts):
    with pytest.raises(BenchmarkError, match=rf"^a\.jsonl is not the answers to these 4 questions: {counts}"):
        pair_lines(QUESTIONS, answers, "a.jsonl")


def test_an_answer_without_a_prompt_belongs_to_the_only_question_of_its_id():
    answers = [*ANSWERS[:3], reply(8, "", "fourth")]
    assert texts(pair_lines(QUESTIONS, answers, "answers"))[3] == "fourth"
    with pytest.raises(BenchmarkError, match=r"1 \(7\) without an answer, 1 \(7\) of other questions"):
        pair_lines(QUESTIONS, [reply("7", ""), *ANSWERS[1:]], "answers")


def test_instructions_are_dropped_where_the_prompt_holds_the_question():
    answers = drop_instructions(
        [ask(1, "Is it?")], [reply("1", "Is it?\nOne word."), reply("1", "No?"), reply(2, "Is it?")]
    )
    assert [answer.prompt for answer in answers] == ["Is it?", "No?", "Is it?"]


def test_errors_are_counted():
    answers = [
        reply(1),
        reply(2, error="image_missing"),
        reply(3, error="image_corrupt"),
        reply(4, error="image_missing"),
    ]
    note = "3 of 4 answers are errors and count as wrong (image_corrupt 1, image_missing 2)"
    assert count_errors(answers) == (note,)
    assert count_errors(answers[:1]) == ()
