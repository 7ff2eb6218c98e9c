"""Wrong answers for trackers: few, the same every time, bounded in size, with the texts a person knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import get_template
from llava.data.records import EncodedRecord
from llava.data.supervision import encode_example
from llava.inference.session import Session
from llava.train.validation.mistakes import (
    TEXT_SHOWN,
    THUMBNAIL_SIZE,
    Mistake,
    choose_mistakes,
    question_text,
    show_mistakes,
)

PROMPT = EncodedRecord([1], [IGNORE_INDEX], [])


def mistakes(numbers):
    return [Mistake(number, PROMPT, "yes", "no") for number in numbers]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine
@given(st.lists(st.integers(0, 60), unique=True, max_size=30), st.sets(st.integers(0, 60)), st.integers(0, 14))
def test_some_are_chosen_whatever_their_order_and_stay_while_they_are_wrong(numbers, others, most):
    chosen = choose_mistakes(mistakes(numbers), most)
    assert chosen == choose_mistakes(mistakes(sorted(numbers)), most)
    assert len(chosen) == min(most, len(numbers))
    still = [number for number in numbers if number not in others or number in {each.question for each in chosen}]
    assert choose_mistakes(mistakes(still), most) == chosen


@pytest.fixture
def session(golden_model):
    tokenizer, model, processor, _ = golden_model
    return Session(tokenizer, model, processor, get_template("vicuna_v1"), 512)


def prompt_of(conversations, session, template="vicuna_v1", images=()):
    """The record up to its last answer, encoded as training does."""
    ids, labels = encode_example(conversations, template, session.tokenizer)
    stop = len(labels) - next(place for place, label in enumerate(reversed(labels)) if label == IGNORE_INDEX)
    return EncodedRecord(ids[:stop], [IGNORE_INDEX] * stop, list(images))


def turns(*texts):
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("<image>\nWhat is it?", "a dog"), "What is it?"),
        (("<image>\nWhat is it?", "a dog", "USER: or not?", "no"), "or not?"),
        (("Say: ASSISTANT:", "no"), "Say: ASSISTANT:"),
        (("Какого цвета?", "синий"), "Какого цвета?"),
    ],
)
def test_the_question_is_the_last_turn(session, texts, expected):
    assert question_text(prompt_of(turns(*texts), session).input_ids, session) == expected


def test_of_a_template_without_roles_the_whole_prompt_is_the_question(session):
    plain, ids = dataclasses.replace(session, template=get_template("plain")), session.tokenizer.encode("At 10:30?")
    assert question_text([*ids, IMAGE_TOKEN_INDEX], plain) == "At 10:30?"


def test_images_are_squares_of_one_size_and_texts_are_bounded(session, goldens, tmp_path, caplog):
    wide, text = tmp_path / "wide.png", "x" * 5000
    Image.new("RGB", (400, 100), (255, 0, 0)).save(wide)
    small = goldens / "images/tiny.png"
    images = [[wide], [small], [tmp_path / "absent.png"], [], [small, wide]]
    chosen = [
        Mistake(number, prompt_of(turns("<image>\nWhat?", "a"), session, images=paths), text, "\x1b[31m")
        for number, paths in enumerate(images)
    ]
    shown = show_mistakes(chosen, session)
    assert {each.image.size for each in shown} == {(THUMBNAIL_SIZE, THUMBNAIL_SIZE)}
    centre, corner = (THUMBNAIL_SIZE // 2, THUMBNAIL_SIZE // 2), (0, 0)
    assert [shown[0].image.getpixel(place) for place in (centre, corner)] == [(255, 0, 0), (128, 128, 128)]
    assert {each.image.getpixel(centre) for each in shown[2:4]} == {(128, 128, 128)}
    assert shown[4].image.tobytes() == shown[0].image.tobytes()  # the last image of several
    assert {each.given for each in shown} == {"\\x1b[31m"}
    assert all(each.true.startswith("xxx") and len(each.true) < TEXT_SHOWN + 60 for each in shown)
    assert shown[0].caption == f"What? | true: {shown[0].true} | given: \\x1b[31m"
    (message,) = caplog.messages
    assert message.startswith("an image of a wrong answer is not shown: ")
    assert "absent.png" in message


def test_a_file_that_went_away_is_no_error(session):
    assert show_mistakes([Mistake(0, PROMPT._replace(images=[Path("gone.png")]), "a", "b")], session)
