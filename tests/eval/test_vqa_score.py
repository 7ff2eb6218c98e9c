"""Scoring: VQAv2's normalisation, one or ten true answers, kinds, files, messages."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.table.bad_rows import TableError
from llava.data.table.options import TableOptions
from llava.eval.scoring.accuracy import score_answer
from llava.eval.scoring.annotations import (
    GivenAnswer,
    References,
    derive_kinds,
    pair_answers,
    read_answers,
    read_references,
)
from llava.eval.scoring.evaluate import Score, ScoreTable, evaluate
from llava.eval.scoring.intervals import Difference, compare_paired, wilson_interval
from llava.eval.scoring.text import describe_difference, format_p_value, format_table
from llava.eval.vqa_score import main

ROOT = Path(__file__).resolve().parents[2]


WORDS = st.lists(
    st.sampled_from(["yes", "The", "a", "two", "dont", "dog", "1", "1,000", "red", "U.S."]), max_size=5
).map(" ".join)


def leave_one_out(prediction: str, references: list[str]) -> float:
    """The definition: against each nine of the ten, min(1, matches / 3), averaged."""
    scores = []
    for left_out in range(len(references)):
        others = references[:left_out] + references[left_out + 1 :]
        scores.append(min(1, sum(prediction == other for other in others) / 3))
    return sum(scores) / len(scores)


@given(st.lists(st.sampled_from("xyz"), min_size=10, max_size=10), st.sampled_from("xyzw"))
def test_ten_answers_equal_the_definition(references, prediction):
    assert score_answer(prediction, references) == pytest.approx(leave_one_out(prediction, references), abs=1e-12)


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_answers(matches, accuracy):
    assert score_answer("Dog.", ["dog"] * matches + ["cat"] * (10 - matches)) == accuracy


@pytest.mark.parametrize(
    ("prediction", "reference", "accuracy"),
    [("2", "Two", 1.0), ("the dog", "a dog.", 1.0), ("n/a", "n/a", 1.0), ("dog", "dogs", 0.0), ("", "yes", 0.0),
     (None, "the", 0.0)],
)  # fmt: skip
def test_one_answer_is_normalised_on_both_sides(prediction, reference, accuracy):
    assert score_answer(prediction, [reference]) == accuracy


def test_unanimous_answers():
    assert score_answer("Yes.", ["yes"] * 10) == 1.0
    assert score_answer("Yes.", ["yes"] * 10, unanimous="verbatim") == 0.0
    assert score_answer("yes\n", ["yes"] * 10, unanimous="verbatim") == 1.0
    assert score_answer("Yes", ["yes"] * 10, unanimous="verbatim") == 0.0
    assert score_answer("yes", ["Yes"] * 10, unanimous="verbatim") == 0.0
    assert score_answer("Yes", ["yes"] * 9 + ["Yes"], unanimous="verbatim") == 1.0
    assert score_answer("Yes.", ["yes"] * 9 + ["no"], unanimous="verbatim") == 1.0
    assert score_answer("Yes.", ["yes"], unanimous="verbatim") == 1.0


@given(st.lists(WORDS, min_size=1, max_size=1) | WORDS.map(lambda text: [text] * 10), WORDS)
def test_verbatim_never_scores_higher(references, prediction):
    verbatim = score_answer(prediction, references, unanimous="verbatim")
    assert verbatim <= score_answer(prediction, references)


def test_score_answer_refusals():
    with pytest.raises(ValueError, match=r"^3 true answers; a question has one answer or ten$"):
        score_answer("x", ["x"] * 3)
    with pytest.raises(ValueError, match=r"^unanimous='both' is unknown; use 'normalize' or 'verbatim'$"):
        score_answer("x", ["x"], unanimous="both")


def score_answers(predictions, truth, kinds, types=None, images=None):
    """Scores of one answer file."""
    answers = {
        key: GivenAnswer(text, "image_missing" if text is None else None, {}) for key, text in predictions.items()
    }
    return evaluate({"file": answers}, References(truth, kinds, types or {}, images or {})).files["file"].table


def test_scores():
    table = score_answers(
        {1: "yes", 2: "3", 3: None, 4: "red"},
        {1: ["Yes"], 2: ["two"], 3: ["no"], 4: ["red"] * 2 + ["blue"] * 8},
        {1: "is", 2: "count", 3: "is", 4: "colour"},
    )
    assert table == ScoreTable(
        overall=score(4, 0.4),
        by_kind={"colour": score(1, 0.6), "count": score(1, 0.0), "is": score(2, 0.5)},
        by_answer_type={"yes/no": score(2, 0.5), "number": score(1, 0.0), "other": score(1, 0.6)},
        errors=1,
    )


def score(questions: int, accuracy: float) -> Score:
    """The score of questions about as many images."""
    return Score(questions, accuracy, *wilson_interval(accuracy, questions))


def test_questions_about_one_image_make_the_interval_wider():
    predictions, truth = {n: "yes" if n < 20 else "no" for n in range(40)}, {n: ["yes"] for n in range(40)}
    kinds = dict.fromkeys(range(40), "k")
    alone = score_answers(predictions, truth, kinds).overall
    in_pairs = score_answers(predictions, truth, kinds, images={n: str(n // 2) for n in range(40)}).overall
    assert alone == score(40, 0.5)
    assert (in_pairs.low, in_pairs.high) == pytest.approx(wilson_interval(0.5, 20 * (40 / 39) * (19 / 20)), abs=1e-12)


def test_answer_types_that_annotations_name_win():
    table = score_answers({1: "2", 2: "red"}, {1: ["2"], 2: ["red"]}, {1: "k", 2: "k"}, types={1: "time"})
    assert list(table.by_answer_type) == ["other", "time"]


def test_kinds_from_first_words():
    questions = dict.fromkeys(range(99), "Is there a dog?") | {99: "IS  THERE", 100: "Why?", 101: "How many?"}
    kinds = derive_kinds(questions)
    assert (kinds[0], kinds[99], kinds[100], kinds[101]) == ("is there", "is there", "other", "other")
    assert derive_kinds({1: "Why?", 2: "How many dogs?"}) == {1: "why?", 2: "how many"}


@pytest.fixture
def write(tmp_path):
    """Return the function (name, lines or text) -> path of a new file."""

    def write_file(name: str, content: list | str) -> str:
        text = content if isinstance(content, str) else "".join(json.dumps(line) + "\n" for line in content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


TABLE = (
    "image_id,question,question_id,answer,kind\n1,Is it?,1,yes,exist\n1,How many?,2,two,count\n1,Is it?,3,n/a,exist\n"
)


def answer(question_id: int | str, text: str, **extra: object) -> dict[str, object]:
    """An answer record as batch inference writes it."""
    return {"question_id": question_id, "prompt": "q", "text": text, "answer_id": "a", "model_id": "m",
            "metadata": {}, **extra}  # fmt: skip


def test_references_from_a_table(write):
    path = write("t.csv", TABLE)
    assert read_references(path) == (
        {1: ("yes",), 2: ("two",), 3: ("n/a",)},
        {1: "exist", 2: "count", 3: "exist"},
        {},
        {1: "1", 2: "1", 3: "1"},
        {1: "Is it?", 2: "How many?", 3: "Is it?"},
    )
    typed = write("y.csv", TABLE.replace("kind", "kind,answer_type").replace("exist", "exist,yes/no").replace(
        "count", "count,"))  # fmt: skip
    assert read_references(typed).types == {1: "yes/no", 3: "yes/no"}
    assert read_references(typed).kinds == {1: "exist", 2: "count", 3: "exist"}
    assert read_references(path, kind_key="answer").kinds == {1: "yes", 2: "two", 3: "n/a"}
    assert read_references(path, TableOptions(answer="kind")).answers[1] == ("exist",)
    plain = write("p.csv", TABLE.replace("kind", "x"))
    assert read_references(plain).kinds == {1: "is it?", 2: "how many?", 3: "is it?"}


def test_a_table_in_which_ids_repeat(write):
    path = write("t.csv", TABLE.replace(",3,n/a", ",1,n/a"))
    references = read_references(path)
    assert references.answers == {1: ("yes",), 2: ("two",), (1, 2): ("n/a",)}
    assert references.kinds == {1: "exist", 2: "count", (1, 2): "exist"}


def test_references_from_lines(write):
    lines = [{"question_id": 1, "answer": "yes"}, {"question_id": "2", "answers": ["a"] * 10},
             {"question_id": "q3", "answers": ["b"]}]  # fmt: skip
    answers, kinds, types, images, questions = read_references(write("a.jsonl", lines))
    assert types == images == questions == {}
    assert answers == {1: ("yes",), "2": ("a",) * 10, "q3": ("b",)}
    assert kinds == dict.fromkeys(answers, "all questions")
    lines = [{"question_id": 1, "answer": "yes", "image": "a.jpg"}, {"question_id": 2, "answer": "no", "image_id": 0}]
    assert read_references(write("c.jsonl", lines)).images == {1: "a.jpg", 2: "0"}
    lines = [{"question_id": 1, "answer": "yes", "text": "Is it?"}]
    assert read_references(write("b.jsonl", lines)).kinds == {1: "is it?"}


def test_references_from_vqa_annotations(write):
    annotation = {
        "question_id": 262148000,
        "image_id": 262148,
        "question_type": "none of the above",
        "answer_type": "other",
        "answers": [{"answer": f"a{n}", "answer_id": n} for n in range(10)],
    }
    path = write("v2.json", json.dumps({"info": {}, "annotations": [annotation]}))
    references = read_references(path)
    assert references.answers == {262148000: tuple(f"a{n}" for n in range(10))}
    assert references.kinds == {262148000: "none of the above"}
    assert references.types == {262148000: "other"}
    assert references.images == {262148000: "262148"}
    assert read_references(path, kind_key="answer_type").kinds == {262148000: "other"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question_id": 1, "answer": "x"}\n{"question_id": 1, "answer": "x"}\n[]\n{\n',
         "a.jsonl: 2 bad rows\n  line 3: not a JSON object {…}\n"
         "  line 4: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))\n"
         "Correct the annotations, then run again."),
        ("a.jsonl", [{"answer": "x"}], "line 1: no 'question_id' that is a number or a text"),
        ("a.jsonl", [{"question_id": True, "answer": "x"}], "line 1: no 'question_id' that is a number or a text"),
        ("a.jsonl", [{"question_id": 1, "answer": 3}],
         "line 1: no text in 'answer', and no list of texts in 'answers'"),
        ("a.jsonl", [{"question_id": 1, "answers": "x"}], "line 1: no text in 'answer', and no list"),
        ("a.jsonl", [{"question_id": 1, "answers": ["x"] * 3}], "line 1: 3 answers; a question has one answer or ten"),
        ("a.jsonl", [{"question_id": 1, "answer": " "}], "line 1: answer is empty"),
        ("a.jsonl", [{"question_id": 1, "answer": "x", "kind": "k"}, {"question_id": 2, "answer": "x"}],
         "line 2: no 'kind' with the question's kind; name another key with --kind-key"),
        ("a.jsonl", "\n", "a.jsonl: the file holds no annotations; choose another one"),
        ("a.json", "[1]", 'no list of objects under "annotations"; give VQAv2\'s annotations file'),
        ("a.json", '{"annotations": [{"question_id": 1, "answers": []}]}', "annotation 1: 0 answers; a question has"),
        ("a.json", "{", "lines of JSON objects belong in a .jsonl file"),
        ("a.md", "", "the name ends in '.md'; annotations are tables, .jsonl or .json files"),
        ("a.csv", "image_id,question,question_id,answer\n1,q,1,\n", "a.csv: 1 bad row\n  line 2: answer is empty"),
    ],
)  # fmt: skip
def test_bad_annotations(write, name, content, message):
    with pytest.raises(TableError) as caught:
        read_references(write(name, content))
    assert message in str(caught.value)


TEN = ["two"] * 4 + ["2"] * 3 + ["3", "four", "none"]


def test_ten_answers_of_a_table_score_as_those_of_lines(write, tmp_path, caplog):
    rows = [("How many?", TEN, "a.jpg"), ("Is it?", ["yes"] * 9 + ["no"], "a.jpg"), ("Is it a?", ["no"] * 10, "b.jpg")]
    lines = [
        {"question_id": number, "question": question, "answers": answers, "image": image}
        for number, (question, answers, image) in enumerate(rows)
    ]
    given = write("given.jsonl", [answer(0, "2"), answer(1, "no"), answer(2, "no")])
    one_column, ten_columns = tmp_path / "one.csv", tmp_path / "ten.csv"
    with one_column.open("w", newline="") as stream:
        table = [(question, json.dumps(answers), image) for question, answers, image in rows]
        csv.writer(stream, delimiter=";").writerows([("question", "answers", "image"), *table])
    names = [f"answer {number}" for number in range(10)]
    with ten_columns.open("w", newline="", encoding="utf-16") as stream:
        table = [(image, question, *answers) for question, answers, image in rows]
        csv.writer(stream, delimiter="\t").writerows([("image", "question", *names), *table])
    scores = []
    for path, flags in (
        (write("t.jsonl", lines), []),
        (str(one_column), []),
        (str(ten_columns), ["--answer_column", *names]),
    ):
        out = tmp_path / "scores.json"
        assert main(["--answers-file", given, "--annotations", path, "--json", str(out), *flags]) == 0
        scores.append(json.loads(out.read_text()) | {"annotations": None})
    assert scores[0] == scores[1] == scores[2]
    assert scores[0]["files"][0]["overall"]["accuracy"] == pytest.approx((1 + 0.3 + 1) / 3)  # "2" and "two" are one
    assert [f"{name}.csv" in caplog.text and "row numbers" in caplog.text for name in ("one", "ten")] == [True] * 2


def test_a_table_in_another_order_than_the_answered_one_is_noticed(write, caplog):
    """Without ids the rows are numbered, so that order is all that ties answers to questions."""
    given = write(
        "given.jsonl", [answer(0, "2") | {"prompt": "Сколько? Одним словом."}, answer(1, "no") | {"prompt": "Где?"}]
    )
    rows = ["a.jpg,Сколько?,2", "a.jpg,Где?,дома"]
    for order, warnings in ((rows, 0), (rows[::-1], 1)):
        caplog.clear()
        table = write("t.csv", "\n".join(["image,question,answer", *order]))
        assert main(["--answers-file", given, "--annotations", table]) == 0
        found = [message for message in caplog.messages if "check that the files belong together" in message]
        assert len(found) == warnings
    assert (
        "2 of 2 questions are not those that the other file has under the same question_id, the first 0: " in found[0]
    )
    assert "'Сколько? Одним словом.' here, 'Где?' there" in found[0]


def test_a_table_with_three_answers_is_refused(write):
    path = write("t.csv", 'image,question,answers\na.jpg,How many?,"[""2"", ""3"", ""2""]"\n')
    with pytest.raises(TableError, match=r"1 bad row\n  line 2: 3 answers; a question has one answer or ten\nName one"):
        read_references(path)


def test_missing_kind_column(write):
    message = "no column 'x'; the header has 'image_id', .*'kind'; name another with --kind-key$"
    with pytest.raises(TableError, match=message):
        read_references(write("t.csv", TABLE), kind_key="x")


def texts(answers):
    return {key: answer.text for key, answer in answers.items()}


def test_answers_by_question(write, tmp_path):
    lines = [answer(1, "yes"), answer("2", ""), answer(3, "", error="image not found")]
    assert texts(read_answers(write("a.jsonl", lines))) == {1: "yes", "2": "", 3: None}
    assert texts(read_answers(write("b.jsonl", [answer(1, "yes"), answer(1, "no")]))) == {1: "yes", (1, 2): "no"}
    with pytest.raises(TableError, match=r"line 1: no 'text' with the answer\n"):
        read_answers(write("c.jsonl", [{"question_id": 1}]))
    with pytest.raises(TableError, match=r"the file is empty; write the answers first$"):
        read_answers(write("d.jsonl", ""))
    with pytest.raises(TableError, match=r"none.jsonl: cannot be read \(.*\); give the path of a readable file$"):
        read_answers(tmp_path / "none.jsonl")
    (tmp_path / "e.jsonl").write_bytes(b"{}\n\xe9")
    with pytest.raises(TableError, match=r"not UTF-8 at byte 3; save the file as UTF-8$"):
        read_answers(tmp_path / "e.jsonl")


def test_answers_with_what_is_noted_about_them(write):
    noted = {"logprob": -0.5, "runner_up": "no", "runner_up_logprob": -1.0}
    lines = [answer("7", "yes", metadata=noted), answer(8, "", error="image_corrupt", metadata=None)]
    assert read_answers(write("a.jsonl", lines)) == {
        "7": GivenAnswer("yes", None, noted, "q"),
        8: GivenAnswer(None, "image_corrupt", {}, "q"),
    }
    message = (
        r"line 1: the log-probability 'logprob' is 'x', not a number up to 0\n  line 2: 'metadata' is \[1\], not an"
    )
    with pytest.raises(TableError, match=message):
        read_answers(write("b.jsonl", [answer(1, "yes", metadata={"logprob": "x"}), answer(2, "no", metadata=[1])]))


REPEATED = [  # id, question, true answer, given answer
    ("a.jpg", "Is it red?", "yes", "yes"),
    ("a.jpg", "Is it blue?", "no", "yes"),
    ("b.jpg", "Is it red?", "no", "no"),
    ("a.jpg", "Is it big?", "no", "no"),
]


def given_line(row):
    return answer(row[0], row[3], prompt=f"{row[1]}\nAnswer the question using a single word or phrase.")


def true_line(row, *, has_text=True):
    return {"question_id": row[0], "answer": row[2], **({"text": row[1].lower()} if has_text else {})}


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_lines_with_one_id_are_joined_by_their_questions(write, tmp_path, order):
    true = write("true.jsonl", [true_line(REPEATED[place]) for place in order])
    given = write("given.jsonl", [given_line(row) for row in REPEATED])
    out = tmp_path / "scores.json"
    assert main(["--answers-file", given, "--annotations", true, "--json", str(out)]) == 0
    [scores] = json.loads(out.read_text())["files"]
    assert (scores["overall"]["questions"], scores["overall"]["accuracy"]) == (4, 0.75)


def test_without_their_questions_lines_with_one_id_are_joined_in_order(write, capsys, caplog):
    true = [true_line(row, has_text=False) for row in REPEATED]
    given = write("given.jsonl", [given_line(row) for row in REPEATED])
    assert main(["--answers-file", given, "--annotations", write("true.jsonl", true)]) == 0
    assert " 75.00" in capsys.readouterr().out
    less = write("less.jsonl", true[1:])
    assert main(["--answers-file", given, "--annotations", less]) == 1
    assert caplog.messages[-1] == (
        f"{given}: question_ids that are on another number of lines in the other file, not always with their question: "
        "1, a.jpg (3 here, 2 there); these lines are left out: complete the file, or add the questions' text"
    )
    assert capsys.readouterr().err.splitlines() == [
        "error: given: questions without an answer: 2 of 3 (a.jpg, a.jpg (line 2 with this id))",
        "given: answers without a question left under their id: 3 (a.jpg (line 3 with this id), a.jpg (line 4 with "
        "this id), a.jpg (line 5 with this id))",
        "Complete the answers, or score the rest with --allow-missing.",
    ]
    assert main(["--answers-file", given, "--annotations", less, "--allow-missing"]) == 0
    assert "100.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ids", "flags", "code", "shown"),
    [
        (["007", 7, "x"], [], 0, "100.00"),
        (["007", "x"], [], 1, "error: a: questions without an answer: 1 of 3 (7)\n"),
        ([7, "x"], [], 1, "error: a: questions without an answer: 1 of 3 ('007')\n"),
        (["007", "x"], ["--allow-missing"], 0, "100.00"),
        (["007", 7, "x", "y"], [], 1, "error: a: answers without a question in the annotations: 1 (y)\n"),
        (
            ["007", 7, "x"],
            ["--unique-ids"],
            1,
            "t.jsonl: 1 bad row\n  line 2: question_id '007' is already on line 1, as",
        ),
    ],
)
def test_ids_with_leading_zeros_are_ids_of_their_own(write, capsys, ids, flags, code, shown):
    true = {7: "yes", "007": "no", "x": "2", "y": "3"}
    annotations = write("t.jsonl", [{"question_id": key, "answer": true[key]} for key in (7, "007", "x")])
    given = write("a.jsonl", [{"question_id": key, "text": true[key]} for key in ids])
    assert main(["--answers-file", given, "--annotations", annotations, *flags]) == code
    captured = capsys.readouterr()
    assert shown in captured.out + captured.err


def test_some_answers_of_lines_with_one_id(write, capsys):
    true = write("true.jsonl", [true_line(row) for row in REPEATED])
    given = write("given.jsonl", [given_line(row) for row in REPEATED[2:]])
    assert main(["--answers-file", given, "--annotations", true]) == 1
    message = "questions without an answer: 2 of 4 (a.jpg, a.jpg (line 2 with this id))"
    assert message in capsys.readouterr().err
    assert main(["--answers-file", given, "--annotations", true, "--allow-missing"]) == 0
    assert "100.00" in capsys.readouterr().out
    twice = write("twice.jsonl", [given_line(row) for row in [*REPEATED, REPEATED[0]]])
    assert main(["--answers-file", twice, "--annotations", true]) == 1
    message = "answers without a question left under their id: 1 (a.jpg (line 4 with this id))"
    assert message in capsys.readouterr().err


def test_answers_are_paired_with_equal_questions_first():
    given = {"a": GivenAnswer("1", None, {}, "Is it?"), ("a", 2): GivenAnswer("2", None, {}, "Is it red or blue?")}
    questions = {"a": "Is it red or blue?", ("a", 2): "Is it?"}
    paired = pair_answers("f", given, questions)
    assert {key: answer.text for key, answer in paired.items()} == {"a": "2", ("a", 2): "1"}


def test_answer_files_may_each_have_their_own_flag(write, capsys):
    base, tuned = write("base.jsonl", [answer(1, "yes")]), write("finetuned.jsonl", [answer(1, "no")])
    table = write("t.jsonl", [{"question_id": 1, "answer": "yes", "kind": "exist"}])
    assert main(["--answers-file", base, "--answers-file", tuned, "--annotations", table]) == 0
    assert "base  finetuned" in capsys.readouterr().out


def test_program_compares_files_side_by_side(write, tmp_path, capsys):
    base = write("base.jsonl", [answer(1, "Yes."), answer(2, "3"), answer(3, "", error="boom")])
    tuned = write("finetuned.jsonl", [answer(1, "yes"), answer(2, "Two"), answer(3, "no")])
    out = str(tmp_path / "scores.json")
    assert main(["--answers-file", base, tuned, "--annotations", write("t.csv", TABLE), "--json", out]) == 0
    assert capsys.readouterr().out == OUTPUT
    assert json.loads(Path(out).read_text()) == {
        "annotations": str(tmp_path / "t.csv"),
        "unanimous": "normalize",
        "left_out": [],
        "intervals": "95 %: Wilson's interval of accuracies (at the effective number of questions, images being "
        "groups), Bonett and Price's of paired differences, McNemar's exact test",
        "files": [
            {
                "name": "base", "path": base, "overall": in_json(3, 1 / 3), "errors": 1,
                "by_kind": {"count": in_json(1, 0.0), "exist": in_json(2, 0.5)},
                "by_answer_type": {"yes/no": in_json(1, 1.0), "number": in_json(1, 0.0), "other": in_json(1, 0.0)},
                "confusion": {"true": ["2", "n", "yes"], "given": ["2", "n", "yes", "(other)", "(none)"],
                              "counts": [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 1, 0, 0]],
                              "mistakes": [["2", "3", 1], ["n", "(none)", 1]]},
                "calibration": None,
            },
            {
                "name": "finetuned", "path": tuned, "overall": in_json(3, 2 / 3), "errors": 0,
                "by_kind": {"count": in_json(1, 1.0), "exist": in_json(2, 0.5)},
                "by_answer_type": {"yes/no": in_json(1, 1.0), "number": in_json(1, 1.0), "other": in_json(1, 0.0)},
                "confusion": {"true": ["2", "n", "yes"], "given": ["2", "n", "yes", "(other)"],
                              "counts": [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]],
                              "mistakes": [["n", "no", 1]]},
                "calibration": None,
            },
        ],
        "comparisons": [{
            "name": "finetuned", "base": "base", "overall": changed([0, 1, 0]),
            "by_kind": {"count": changed([1]), "exist": changed([0, 0])},
            "by_answer_type": {"yes/no": changed([0]), "number": changed([1]), "other": changed([0])},
        }],
    }  # fmt: skip


OUTPUT = """\
kind               questions         base     finetuned
count                      1         0.00        100.00
exist                      2        50.00         50.00
all                        3        33.33         66.67
95 % interval                 6.1 to 79.2  20.8 to 93.9
no answer (error)                       1             0

answer type  questions    base  finetuned
yes/no               1  100.00     100.00
number               1    0.00     100.00
other                1    0.00       0.00

finetuned against base, in points (p: McNemar's exact test)
kind   difference    95 % interval  better  worse       p
count     +100.00  -73.4 to +100.0       1      0  1.0000  not settled
exist       +0.00   -69.3 to +69.3       0      0  1.0000  not settled
all        +33.33   -45.6 to +85.6       1      0  1.0000  not settled

base: most frequent mistakes, answers normalised
true  given   questions
2     3               1
n     (none)          1

finetuned: most frequent mistakes, answers normalised
true  given  questions
n     no             1
"""


def in_json(questions: int, accuracy: float) -> dict[str, float]:
    return asdict(score(questions, accuracy))


def changed(changes: list[int]) -> dict[str, float]:
    """The difference of questions about one image, each of which became better (1) or stayed (0)."""
    difference = compare_paired([0.0] * len(changes), changes, range(len(changes)))
    return asdict(difference)


def test_missing_and_unknown_answers(write, capsys):
    base, table = write("base.jsonl", [answer(1, "yes"), answer(9, "x")]), write("t.csv", TABLE)
    assert main(["--answers-file", base, "--annotations", table]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: base: questions without an answer: 2 of 3 (2, 3)\n"
        "base: answers without a question in the annotations: 1 (9)\n"
        "Complete the answers, or score the rest with --allow-missing.\n"
    )
    assert main(["--answers-file", base, "--annotations", table, "--allow-missing"]) == 0
    assert capsys.readouterr().out == (
        "left out: base: questions without an answer: 2 of 3 (2, 3)\n"
        "left out: base: answers without a question in the annotations: 1 (9)\n"
        "kind               questions           base\n"
        "exist                      1         100.00\n"
        "all                        1         100.00\n"
        "95 % interval                 20.7 to 100.0\n"
        "no answer (error)                         0\n"
        "\n"
        "answer type  questions    base\n"
        "yes/no               1  100.00\n"
    )


def test_nothing_in_common(write, capsys):
    arguments = ["--answers-file", write("b.jsonl", [answer(9, "x")]), "--annotations", write("t.csv", TABLE)]
    assert main([*arguments, "--allow-missing"]) == 1
    assert (
        "no annotated question is answered by every file; check that the files belong together"
        in capsys.readouterr().err
    )


def test_same_names_are_told_apart_and_a_file_named_twice_is_refused(write, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    lines = [answer(1, "yes"), answer(2, "2"), answer(3, "n/a")]
    one, two, table = write("x.jsonl", lines), write("b/x.jsonl", lines), write("t.csv", TABLE)
    assert main(["--answers-file", one, two, "--annotations", table]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["kind", "questions", one, two]
    assert main(["--answers-file", one, one, "--annotations", table]) == 1
    assert "names a file twice" in capsys.readouterr().err


def test_column_flag_without_a_table_is_refused(write, capsys):
    arguments = ["--answers-file", "a.jsonl", "--annotations", "a.jsonl", "--answer_column", "x"]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "--answer_column has no effect for --annotations a.jsonl, which is not a table" in capsys.readouterr().err


def test_long_lists_of_ids_are_cut(write, capsys):
    table = "image_id,question,question_id,answer\n" + "".join(f"1,q,{n},x\n" for n in range(30))
    assert main(["--answers-file", write("b.jsonl", [answer(0, "x")]), "--annotations", write("t.csv", table)]) == 1
    assert "questions without an answer: 29 of 30 (1, 2, 3, " in (err := capsys.readouterr().err)
    assert ", 20, …)\n" in err


def test_format_table_rounds_to_two_decimals():
    table = ScoreTable(score(3, 2 / 3), {"k": score(3, 2 / 3)}, {}, 0)
    assert format_table({"m": table}).splitlines()[1].split() == ["k", "3", "66.67"]


@pytest.mark.parametrize(
    ("low", "high", "p_value", "word"),
    [(0.1, 0.3, 0.001, "better"), (-0.3, -0.1, 0.001, "worse"), (-0.1, 0.3, 0.001, "not settled"),
     (0.1, 0.3, 0.06, "not settled")],
)  # fmt: skip
def test_a_difference_is_real_where_interval_and_test_agree(low, high, p_value, word):
    assert describe_difference(Difference(100, (low + high) / 2, low, high, 9, 1, p_value)) == word


def test_p_values():
    assert (format_p_value(0.00009), format_p_value(0.0001), format_p_value(1)) == ("<0.0001", "0.0001", "1.0000")


def test_calibration_is_printed_where_answers_carry_probabilities(write, capsys):
    sure = {"logprob": math.log(0.95)}
    lines = [answer(1, "yes", metadata=sure), answer(2, "3", metadata=sure),
             answer(3, "n/a", metadata={"choices": {"n/a": -1.0, "no": -1.0}, "logprob": -1.0})]  # fmt: skip
    assert main(["--answers-file", write("m.jsonl", lines), "--annotations", write("t.csv", TABLE)]) == 0
    assert capsys.readouterr().out.endswith(
        "m: confidence in percent (expected calibration error 46.67 points)\n"
        "probability  answers  mean  right\n"
        "50 to 60           1  50.0  100.0\n"
        "90 to 100          2  95.0   50.0\n"
    )


def test_runs_as_a_module():
    command = [sys.executable, "-m", "llava.eval.vqa_score", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--allow-missing" in result.stdout


def test_perfect_answers_of_the_real_table_score_one(shared_path):
    references = read_references(shared_path("data/Train_Qs.csv"))
    predictions = {question_id: answers[0].upper() + "." for question_id, answers in references.answers.items()}
    table = score_answers(predictions, references.answers, references.kinds)
    assert table.overall.questions == 66_668
    assert table.by_kind["how many"].questions > 7_000
    assert table.overall.accuracy > 0.999


def test_texts_that_no_terminal_should_get(tmp_path, capsys):
    """Half of a surrogate pair, control characters, and a text of a million characters."""
    odd = ["half \ud83d", "red \x1b[31m \x9b2J", "long " * 200_000]
    answers = [{"question_id": key, "text": text} for key, text in enumerate(odd)]
    truth = [{"question_id": key, "answer": "no \udc00", "kind": f"kind \x1b {'x' * 999}"} for key in range(len(odd))]
    for name, records in (("a.jsonl", answers), ("truth.jsonl", truth)):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["--answers-file", tmp_path / "a.jsonl", "--annotations", tmp_path / "truth.jsonl"]
    assert main([*map(str, arguments), "--json", str(tmp_path / "scores.json")]) == 0
    out = capsys.readouterr().out
    assert "half \\ud83d" in out
    assert "red \\x1b 31m \\x9b2j" in out
    assert "characters left out" in out
    assert all(character.isprintable() or character == "\n" for character in out)
    assert max(map(len, out.splitlines())) < 500
    found = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert ["no \udc00", "half \ud83d", 1] in found["files"][0]["confusion"]["mistakes"]
