"""VQAv2's answer normalisation, its quirks included."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.vqa_normalize import (
    CONTRACTIONS,
    NUMBER,
    NUMBER_WORDS,
    normalize_answer,
    normalize_challenge_answer,
    strip_answer,
    type_of_normalized,
)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        (" Yes!\n", "yes"),
        ("two", "2"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("A dog", "dog"),
        ("the man on an elephant", "man on elephant"),
        ("the", ""),
        ("dont", "don't"),
        ("Couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("she's", "she's"),
        ("girl's", "girl's"),
        ("2:50 PM", "2:50 pm"),
        ("1.5", "1.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("U.S.A.", "usa"),
        ("n/a", "n"),
        ("t-shirt", "t shirt"),
        ("red-and-blue - striped", "redandblue striped"),  # a mark beside a space goes without a space everywhere
        ("100,978", "100978"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma in a number makes every mark go without a space
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("what?no", "what no"),
        ("tab\there", "tab here"),
        ("." * 40, "." * 8),  # 32 periods are removed
        ("'quoted'", "'quoted'"),
        ("", ""),
    ],
)
def test_normalize(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("text", "normalized"),
    [("The dog's ball, 1,000?", "dog 's ball 1000"), ("Yes.", "yes"), ("What's, this", "what 's this"), ("", "")],
)
def test_normalize_for_a_challenge(text, normalized):
    assert normalize_challenge_answer(text) == normalized


def test_fact_tables():
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["y'alld've"] == CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert not {"its", "were", "well", "ill", "lets", "shes", "wed", "id"} & CONTRACTIONS.keys()
    assert NUMBER_WORDS["nine"] == "9"


WORDS = st.lists(
    st.sampled_from(["yes", "The", "a", "two", "dont", "dog", "1", "1,000", "red", "U.S."]), max_size=5
).map(" ".join)


@given(WORDS)
def test_normalize_ignores_case_and_is_stable_on_plain_words(text):
    once = normalize_answer(text)
    assert normalize_answer(text.upper()) == once
    assert normalize_answer(once) == once


def test_strip_makes_one_line():
    assert strip_answer("\n a\tb\nc ") == "a b c"


@given(st.text("09.x٣", max_size=8))
def test_numbers_are_digits_with_at_most_one_point(text):
    assert (type_of_normalized(text) == NUMBER) == bool(re.fullmatch(r"\d*\.?\d+", text))


def test_a_long_string_of_digits_is_read_once():
    digits = "1" * 1_000_000  # backtracking over all ways to split it would take hours
    assert type_of_normalized(digits) == NUMBER
    assert {type_of_normalized(digits + rest) for rest in ("x", ".", f".{digits}x")} == {"other"}
