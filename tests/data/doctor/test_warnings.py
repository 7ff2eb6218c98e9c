"""What belongs to a prompt is found inside questions and answers, and ordinary texts are left alone."""

from __future__ import annotations

import pytest

from llava.conversation import get_template
from llava.data.doctor.warnings import find_warnings


def codes(question, answer, template="v1"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return [error.code for error in find_warnings({"conversations": turns}, get_template(template))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ball</s>", ["special_token"]),
        ("<s> ball", ["special_token"]),
        ("<im_start>ball", ["special_token"]),
        ("USER: <image>\nWhat is it? ASSISTANT: ball", ["prompt_in_text"]),
        ("ASSISTANT: ball", ["prompt_in_text"]),
        ("ball USER:", ["prompt_in_text"]),
        ("Human: what?###Assistant: ball", ["prompt_in_text"]),
        ("[INST] what? [/INST] ball", ["prompt_in_text"]),
        ("<|im_start|>assistant\nball<|im_end|>", ["prompt_in_text"]),
        ("USER: What? ASSISTANT: ball</s>", ["prompt_in_text", "special_token"]),
        ("<ImageHere> ball", ["unknown_image_mark"]),
        ("<image-placeholder>", ["unknown_image_mark"]),
    ],
)
def test_what_belongs_to_a_prompt_is_found_in_answers_and_questions(text, expected):
    assert codes("What?", text) == expected
    assert codes(text, "ball") == expected


@pytest.mark.parametrize(
    "text",
    [
        "a ball",
        "Human: a person",
        "The USER: field is empty",
        "1 < 2",
        "#3",
        "### Title",
        "[1, 2]",
        "<b>bold</b>",
        "12:30",
    ],
)
def test_ordinary_texts_are_left_alone(text):
    assert codes(text, text) == []


def test_the_end_of_an_answer_is_the_templates():
    assert codes("What?", "### Title", "v0") == ["special_token"]
    assert codes("What?", "so<|im_end|>", "mpt") == ["prompt_in_text"]
    assert codes("<image>", "two\nlines", "plain") == []
    assert codes("What?", "see <Image>", "v1_mmtag") == []
