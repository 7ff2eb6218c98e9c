"""Lines of two files belong together by id and text; ids written as numbers and texts are never mixed up."""

import logging

import pytest
from hypothesis import given, strategies

from llava.eval.scoring.question_keys import Keys, describe_key, rekey_lines

FORMS = [7, "7", "007", "07", 70, "q7", ""]


def lines_of(ids, texts=()):
    """Return the lines of a file, each of which is its own id and place, under their keys, and their texts."""
    keys = Keys()
    found = {keys.add(question_id): (question_id, place) for place, question_id in enumerate(ids)}
    return found, dict(zip(found, texts, strict=False))


@pytest.mark.parametrize(
    ("there", "here", "expected"),
    [
        ([7, 8], ["8", "7"], {8: "8", 7: "7"}),  # the texts of the numbers
        (["007", "8"], [7, 8], {"007": 7, "8": 8}),
        ([7, "007"], ["007", 7], {7: 7, "007": "007"}),
        ([7, "7"], ["7", 7], {7: 7, "7": "7"}),
        ([7, "007"], ["007"], {"007": "007"}),  # not 7, which has no answer
        ([7], ["7", "007"], {"7": "7", "007": "007"}),  # which of them is meant? neither
        (["07", "007"], [7], {7: 7}),
        (["07", 8], ["007", 8], {"07": "007", 8: 8}),
        (["q7"], [7], {7: 7}),
        (["³"], [3], {3: 3}),
    ],
)
def test_numbers_and_texts(there, here, expected):
    lines, _ = lines_of(here)
    paired = rekey_lines("f", lines, {}, dict.fromkeys(lines_of(there)[0], ""))
    assert {key: line for key, (line, _) in paired.items()} == expected


@given(strategies.permutations(FORMS), strategies.permutations(FORMS), strategies.integers(1, len(FORMS)))
def test_an_id_that_both_files_have_is_its_own(there, here, count):
    """Whatever the order, and whichever answers are missing."""
    lines, _ = lines_of(here[:count])
    paired = rekey_lines("f", lines, {}, dict.fromkeys(there, ""))
    assert {key: line for key, (line, _) in paired.items()} == {key: key for key in here[:count]}


@given(strategies.lists(strategies.tuples(strategies.sampled_from([7, "7", "x"]), strategies.sampled_from("abcd")),
                        unique=True, min_size=1), strategies.randoms(use_true_random=False))  # fmt: skip
def test_lines_with_one_id_are_found_by_their_texts(questions, random):
    """Each id asks each text once; the answers come in any order."""
    asked, texts = lines_of([key for key, _ in questions], [text for _, text in questions])
    shuffled = random.sample(questions, len(questions))
    lines, prompts = lines_of([key for key, _ in shuffled], [text for _, text in shuffled])
    paired = rekey_lines("f", lines, prompts, texts)
    assert len(paired) == len(questions)
    for key, (question_id, place) in paired.items():
        assert shuffled[place] == questions[asked[key][1]] == (question_id, texts[key])


def test_ids_of_another_form_may_repeat():
    texts = {"7": "a", ("7", 2): "b"}
    paired = rekey_lines("f", {7: "second", (7, 2): "first"}, {7: "b", (7, 2): "a"}, texts)
    assert paired == {("7", 2): "second", "7": "first"}


def test_lines_without_texts_are_paired_in_order_and_this_is_logged(caplog):
    lines = {"x": 1, ("x", 2): 2, "y": 3}
    with caplog.at_level(logging.WARNING):
        assert rekey_lines("f", lines, {}, {"x": "", ("x", 2): "", "y": ""}) == lines
    assert caplog.messages == [
        "f: question_ids that repeat, not always with their question: 1, x; their lines are paired in the order of the "
        "files: check that it is the same, or add the questions' text"
    ]


def test_ids_with_another_number_of_lines_are_counted_and_left_out(caplog):
    lines = {**dict.fromkeys("abcde", 0), ("e", 2): 1}
    there = {key: "" for name in "abcd" for key in (name, (name, 2))} | {"e": ""}
    with caplog.at_level(logging.WARNING):
        paired = rekey_lines("f", lines, {}, there)
    assert paired == {**{(name, 3): 0 for name in "abcd"}, ("e", 2): 0, ("e", 3): 1}
    assert caplog.messages == [
        "f: question_ids that are on another number of lines in the other file, not always with their question: 5, a "
        "(1 here, 2 there), b (1 here, 2 there), c (1 here, 2 there), ...; these lines are left out: complete the "
        "file, or add the questions' text"
    ]


def test_a_text_of_digits_is_shown_as_a_text():
    assert [describe_key(key) for key in (7, "7", "007", "a", ("a", 2), ("07", 3))] == [
        "7", "'7'", "'007'", "a", "a (line 2 with this id)", "'07' (line 3 with this id)",
    ]  # fmt: skip
