"""Answer types and confusions. Scores of single answers are tested with the program in test_vqa_score.py."""

import pytest

from llava.eval.scoring.accuracy import (
    Confusion,
    agreed_answer,
    count_confusion,
    derive_answer_type,
    order_answer_types,
    score_answer,
)


@pytest.mark.parametrize(
    ("answers", "kind"),
    [(["Yes."], "yes/no"), (["no"], "yes/no"), (["two"], "number"), (["1,000"], "number"), (["1.5"], "number"),
     ([".5"], "number"), (["none"], "number"), (["2 dogs"], "other"), (["2:50"], "other"), (["yes it is"], "other"),
     (["red"], "other"), (["the"], "other"), (["²"], "other"),
     (["yes"] * 4 + ["2"] * 3 + ["no"] * 3, "yes/no"), (["maybe"] * 5 + ["yes"] * 5, "other")],
)  # fmt: skip
def test_answer_type_follows_from_what_most_people_said(answers, kind):
    assert derive_answer_type(answers) == kind


def test_agreed_answer_counts_after_normalisation():
    assert agreed_answer(["dog", "Cat.", "a cat", "dog", "cat"]) == "cat"
    assert agreed_answer(["b", "a"]) == "b"


def test_order_of_types():
    assert order_answer_types(["other", "time", "number", "colour", "other"]) == ["number", "other", "colour", "time"]


@pytest.mark.parametrize(
    ("prediction", "answers", "accuracy"),
    [
        # Of ten people 2 said "yes": leaving one of those out leaves 1 match (1/3, twice), else 2 (2/3, eight times).
        ("yes", ["yes"] * 2 + ["no"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        # 3 said it: 2/3 three times, 1 seven times.
        ("Yes!", ["yes"] * 3 + ["no"] * 7, (3 * 2 / 3 + 7 * 1) / 10),
        # "dont" and "don't" are one answer, so are "2" and "two", "a dog" and "dog".
        ("dont", ["don't", "dont"] + ["do"] * 8, 0.6),
        ("two", ["2", "two", "Two", "2."] + ["3"] * 6, 1.0),
        ("dog", ["a dog", "the dog", "dogs"] + ["cat"] * 7, 0.6),
    ],
)
def test_ten_answer_accuracy_by_hand(prediction, answers, accuracy):
    assert score_answer(prediction, answers) == pytest.approx(accuracy, abs=1e-12)


def test_confusion():
    truth = {1: ["Yes"], 2: ["yes"], 3: ["no"], 4: ["no"], 5: ["two"]}
    given = {1: "yes.", 2: "no", 3: None, 4: "maybe", 5: "2"}
    assert count_confusion(given, truth) == Confusion(
        true=("no", "yes", "2"),
        given=("no", "yes", "2", "(other)", "(none)"),
        counts=((0, 0, 0, 1, 1), (1, 1, 0, 0, 0), (0, 0, 1, 0, 0)),
        mistakes=(("no", "(none)", 1), ("no", "maybe", 1), ("yes", "no", 1)),
    )


def test_confusion_of_many_answers_keeps_ten():
    truth = {number: [f"word{number % 12}"] for number in range(30)}
    confusion = count_confusion(dict.fromkeys(range(30), "word11"), truth)
    assert len(confusion.true) == len(confusion.given) == 11
    assert confusion.true[:3] == ("word0", "word1", "word2")
    assert confusion.true[-1] == confusion.given[-1] == "(other)"
    assert sum(map(sum, confusion.counts)) == 30
    assert len(confusion.mistakes) == 10
    assert confusion.mistakes[0] == ("word0", "word11", 3)


def test_an_answer_that_many_people_gave_is_no_mistake():
    confusion = count_confusion({1: "couch"}, {1: ["sofa"] * 6 + ["couch"] * 4})
    assert confusion.counts == ((0, 1),)
    assert confusion.mistakes == ()
