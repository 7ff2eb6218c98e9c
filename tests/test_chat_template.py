"""Chat messages render to the prompts that training and inference build, text for text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from llava.chat_template import chat_template
from llava.conversation import SeparatorStyle, conv_templates, get_template
from llava.data.supervision import build_dialogue
from llava.inference.prompts import place_question

NAMES = sorted(name for name, template in conv_templates.items() if template.sep_style is not SeparatorStyle.PLAIN)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def render(name, messages, add_generation_prompt=False):
    template = chat_template(get_template(name))
    rendered, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=add_generation_prompt, bos_token="<s>"
    )
    return rendered[0]


def ask(text, images=0):
    return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


def answer(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def test_the_prompt_of_the_releases():
    question = ask("Is there railing?", images=1)
    assert render("v1", [question], add_generation_prompt=True) == (
        f"{SYSTEM} USER: <image>\nIs there railing? ASSISTANT:"
    )
    assert render("v1", [question, answer("yes"), ask("Sure?")], add_generation_prompt=True) == (
        f"{SYSTEM} USER: <image>\nIs there railing? ASSISTANT: yes</s>USER: Sure? ASSISTANT:"
    )
    assert render("v1", [question, answer("yes")]) == f"{SYSTEM} USER: <image>\nIs there railing? ASSISTANT: yes</s>"
    assert render("mistral_instruct", [question, answer("yes"), ask("Sure?")]) == (
        "[INST] <image>\nIs there railing? [/INST] yes </s>[INST] Sure? [/INST]"
    )


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "<image>" not in text
)
turns = st.lists(st.tuples(words, st.integers(0, 3), words), min_size=1, max_size=3)


@pytest.mark.parametrize("name", NAMES)
@given(turns, words, st.booleans())
@settings(max_examples=15, deadline=None)
def test_renders_what_training_and_inference_build(name, dialogue, open_question, is_open):
    records, messages = [], []
    for question, images, reply in dialogue:
        records += [{"from": "human", "value": place_question(question, images)}, {"from": "gpt", "value": reply}]
        messages += [ask(question, images), answer(reply)]
    expected = build_dialogue(records, name)
    if is_open:
        messages.append(ask(open_question, 1))
        expected = build_dialogue([*records, {"from": "human", "value": f"<image>\n{open_question}"}], name)
        expected.append_message(expected.roles[1], None)
    assert render(name, messages, add_generation_prompt=is_open) == expected.get_prompt()


def test_every_golden_prompt(golden_json):
    cases = [case for case in golden_json("templates") if "error" not in case and case["template"] in NAMES]
    cases = [case for case in cases if "mmtag" not in case["template"]]  # the goldens' prompts lack these tags
    assert len(cases) == 40
    for case in cases:
        messages = []
        for question, reply in case["turns"]:
            messages.append({"role": "user", "content": question})
            messages += [] if reply is None else [{"role": "assistant", "content": reply}]
        is_open = case["turns"][-1][1] is None
        assert render(case["template"], messages, add_generation_prompt=is_open) == case["prompt"], case


@pytest.mark.parametrize("name", ["v1", "llava_v0", "mpt", "llava_llama_2", "mistral_instruct"])
def test_a_system_message_replaces_the_templates(name):
    template = get_template(name)
    start = "<|im_start|>system\n" if name == "mpt" else ""
    template.system = f"{start}Say yes."
    dialogue = build_dialogue([{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}], template)
    messages = [{"role": "system", "content": "Say yes."}, ask("Is it?"), answer("yes")]
    assert render(name, messages) == dialogue.get_prompt()


def test_marks_in_the_text_say_where_images_go():
    two = "Here <image> and there <image>?"
    assert f"USER: {two} ASSISTANT:" in render("v1", [ask(two, images=2)], add_generation_prompt=True)
    assert f"USER: {two} ASSISTANT:" in render("v1", [{"role": "user", "content": two}], add_generation_prompt=True)
    expected = build_dialogue([{"from": "human", "value": " What is <image>? "}], "v1").get_prompt()
    assert render("v1", [ask(" What is <image>? ", images=1)]) == expected
    assert expected.endswith("USER: <image>\nWhat is ? ")


@pytest.mark.parametrize("messages", ["image, question", "question, image", "image, question as strings of vLLM"])
def test_an_image_and_its_question_as_two_messages(messages):
    image, question = {"role": "user", "content": [{"type": "image"}]}, {"role": "user", "content": "Is it red?"}
    two = {
        "image, question": [image, question],
        "question, image": [question, image],
        "image, question as strings of vLLM": [{"role": "user", "content": "<image>"}, question],
    }[messages]
    found = render("v1", [*two, answer("yes"), *two], add_generation_prompt=True)
    assert found == (f"{SYSTEM} USER: <image>\nIs it red? ASSISTANT: yes</s>USER: <image>\nIs it red? ASSISTANT:")


part = st.one_of(st.just({"type": "image"}), words.map(lambda text: {"type": "text", "text": text}))
message_contents = st.lists(st.lists(part, max_size=3), min_size=1, max_size=3)  # of one turn


def as_string(parts):
    """The content as a string where it is a single text, as clients send it."""
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


@pytest.mark.parametrize("name", NAMES)
@given(
    st.one_of(st.none(), st.lists(words, min_size=1, max_size=2)),
    words,
    st.lists(st.tuples(message_contents, message_contents), max_size=3),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_consecutive_messages_of_one_role_are_folded(name, system, first, turns, is_open):
    apart, folded = [], []
    if system is not None:
        apart += [{"role": "system", "content": text} for text in system]
        folded += [{"role": "system", "content": "\n".join(system)}]
    contents = [contents for pair in turns for contents in pair]
    contents = [
        [[{"type": "text", "text": first}], *next(iter(contents), [])],
        *contents[1:],
    ]  # llama_2 begins with a text
    for index, messages in enumerate(contents):
        role = ("user", "assistant")[index % 2]
        apart += [{"role": role, "content": as_string(parts)} for parts in messages]
        folded += [{"role": role, "content": [part for parts in messages for part in parts]}]
    assert render(name, apart, is_open) == render(name, folded, is_open)


def test_vllm_sees_that_the_template_takes_lists():
    """vLLM looks for a loop over `message['content']` in one over `messages`; else it makes strings of the lists."""
    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(chat_template(get_template("v1")))
    loops = [loop for loop in tree.find_all(nodes.For) if loop.iter == nodes.Name("messages", "load")]
    assert [loop.target.name for loop in loops] == ["message"]
    content = nodes.Getitem(nodes.Name("message", "load"), nodes.Const("content"), "load")
    assert [loop.iter for loop in loops[0].find_all(nodes.For)] == [content]


def test_several_texts_are_lines_of_one():
    parts = [{"type": "text", "text": "Look."}, {"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert "USER: <image>\nLook.\nWhat is it? " in render("v1", [{"role": "user", "content": parts}])


def test_an_empty_answer_is_a_label_as_in_the_prompt():
    template = get_template("v1")
    for role, text in zip(template.roles * 2, ("a", "", "b", None), strict=True):
        template.append_message(role, text)
    messages = [ask("a"), answer(""), ask("b")]
    assert render("v1", messages, add_generation_prompt=True) == template.get_prompt()


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("v1", [answer("a")], "^user and assistant take turns, but turn 1 is of assistant$"),
        (
            "v1",
            [ask("a"), {"role": "system", "content": "b"}],
            "^user and assistant take turns, but turn 2 is of system$",
        ),
        ("v1", [ask("<image>", images=2)], "^the text marks 1 images, but there are 2; mark each, or none$"),
        (
            "v1",
            [{"role": "user", "content": [{"type": "video"}]}],
            "^a message holds text and images, but here is video$",
        ),
        ("llama_2", [], "^template 'llama_v2': the first message must be a text of 'user'$"),
        ("llama_2", [ask("")], "^template 'llama_v2': the first message must be a text of 'user'$"),
    ],
)
def test_messages_that_have_no_prompt(name, messages, message):
    with pytest.raises(TemplateError, match=message):
        render(name, messages)


def test_a_template_without_questions_is_refused():
    with pytest.raises(
        ValueError, match=r"^template 'plain' captions images .*; name the template of the weights, such"
    ):
        chat_template(get_template("plain"))
