"""Prompts are training examples up to the answer, token for token."""

import re

import pytest

from llava.conversation import conv_templates, get_template
from llava.data.supervision import encode_example, encode_segments, place_images
from llava.inference.prompts import PromptError, ending_ids, first_turn_ids, next_turn_ids, place_question
from llava.tokenization.llama_tokenizer import load_tokenizer

QUESTIONS = [
    ("Is there railing?", 1),
    ("What are the  colors of the bikes?", 1),
    (" leading space", 1),
    ("trailing space ", 0),
    ("两个 <image> and <image> 🦙?", 2),
    ("line\nbreak", 0),
    ("compare", 3),
]
CHAT_TEMPLATES = sorted(name for name, template in conv_templates.items() if template.sep_style.name != "PLAIN")


@pytest.fixture(scope="module", params=[False, True], ids=["new", "legacy"])
def tokenizer(request, goldens):
    tokenizer = load_tokenizer(goldens / "llava-v1.5-golden")
    tokenizer.legacy = request.param
    return tokenizer


@pytest.mark.parametrize("question, n_images", QUESTIONS)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_prompt_is_the_training_example_up_to_its_answer(tokenizer, name, question, n_images):
    prompt = first_turn_ids(question, n_images, get_template(name), tokenizer)
    value = question if "<image>" in question else "<image>\n" * n_images + question
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "yes"}]
    input_ids, labels = encode_example(turns, name, tokenizer)
    assert input_ids[: len(prompt)] == prompt
    assert labels[len(prompt)] != -100
    template = get_template(name)
    supervised = [token for token, label in zip(prompt, labels, strict=False) if label != -100]
    examples = [text for role, text in template.messages if role == template.roles[1]]  # v0 brings an answered example
    words = tokenizer.decode(supervised).replace(template.stop_text, " ").split()
    assert words == " ".join(examples).split()


@pytest.mark.parametrize("question, n_images", QUESTIONS)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_turn_by_turn_gives_the_ids_of_the_whole_dialogue(tokenizer, name, question, n_images):
    template = get_template(name)
    ids = first_turn_ids("Is there railing?", 1, template, tokenizer)
    ids += tokenizer.encode_text(answer_text(name), at_start=tokenizer.legacy and ids[-1] in tokenizer.all_special_ids)
    ids += ending_ids(template, tokenizer)
    ids += next_turn_ids(question, n_images, template, tokenizer)

    dialogue = template.copy()
    dialogue.append_message(dialogue.roles[0], placed("Is there railing?", 1, template.version))
    dialogue.append_message(dialogue.roles[1], "yes")
    dialogue.append_message(dialogue.roles[0], placed(question, n_images, template.version))
    dialogue.append_message(dialogue.roles[1], None)
    assert ids == encode_segments(dialogue.segments(), tokenizer)[0]


def answer_text(name):
    """What the template writes before the end of the answer "yes"."""
    style = conv_templates[name].sep_style.name
    return "yes" if style == "MPT" else " yes"


def placed(question, n_images, version):
    return place_images(place_question(question, n_images), version)


def test_images_go_first_unless_the_question_marks_them():
    assert place_question("a", 0) == "a"
    assert place_question("a", 2) == "<image>\n<image>\na"
    assert place_question("<image> a <image>", 2) == "<image> a <image>"


def test_the_prompt_of_a_captioning_template_is_its_images(tokenizer):
    ids = first_turn_ids("anything", 1, get_template("plain"), tokenizer)
    assert ids == [1, -200]


@pytest.mark.parametrize(
    "question, n_images, code, message",
    [
        ("", 1, "question_empty", "the question is empty"),
        (" \n<image>", 1, "question_empty", "the question is empty"),
        ("a <image>", 0, "image_count_mismatch", "the question has 1 <image> but 0 images"),
        ("a <image> <image>", 3, "image_count_mismatch", "the question has 2 <image> but 3 images"),
    ],
)
def test_questions_without_a_prompt(question, n_images, code, message):
    with pytest.raises(PromptError, match=re.escape(message)) as caught:
        place_question(question, n_images)
    assert caught.value.code == code


def test_a_text_that_no_context_holds_is_refused_before_it_is_encoded(tokenizer):
    text = "word " * 300_000
    start = re.escape(repr(text[:40]))
    message = (
        rf"^the question has 1,500,000 characters, and at most 1,000,000 are read \(it begins {start}\); shorten it$"
    )
    for function in (first_turn_ids, next_turn_ids):
        with pytest.raises(PromptError, match=message) as caught:
            function(text, 0, get_template("vicuna_v1"), tokenizer)
        assert caught.value.code == "prompt_too_long"
    with pytest.raises(ValueError, match=message.replace("the question", "the text")):
        tokenizer.encode_text(text)
    assert tokenizer.encode_text(text[:1_000_000])
