"""Prompts are the original's, text for text, and their segments say what is supervised."""

from __future__ import annotations

import itertools

import pytest

from llava.conversation import SeparatorStyle, conv_templates, default_conversation, get_template

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def ask(template, turns):
    """Fill a template with (user, assistant) turns."""
    dialogue = conv_templates[template].copy()
    for user, assistant in turns:
        dialogue.append_message(dialogue.roles[0], user)
        dialogue.append_message(dialogue.roles[1], assistant)
    return dialogue


def test_every_golden_prompt(golden_json):
    cases = [case for case in golden_json("templates") if "error" not in case]
    assert len(cases) == 49
    assert {case["template"] for case in cases} >= {"v1", "llava_llama_2", "mpt", "plain", "v0", "v1_mmtag"}
    for case in cases:
        assert ask(case["template"], case["turns"]).get_prompt() == case["prompt"], case


def test_where_the_original_raised_a_prompt_comes_out(golden_json):
    cases = [case for case in golden_json("templates") if "error" in case]
    assert [case["template"] for case in cases] == ["plain"] * 3
    assert [ask("plain", case["turns"]).get_prompt() for case in cases] == [
        "<image>\nIs there railing?\nyes\n",
        "<image>\nWhat is the man holding?\ncat\nAnd where?\n",
        "Hello\nHi!\nWhat is 2+2?\n4\nThanks\n",
    ]


def test_segments_mark_the_answer_and_its_end():
    assert ask("v1", [("<image>\nIs it?", "yes"), ("Sure?", None)]).segments() == [
        (f"{SYSTEM} USER: <image>\nIs it? ASSISTANT:", False),
        (" yes</s>", True),
        ("USER: Sure? ASSISTANT:", False),
    ]
    assert ask("llava_llama_2", [("a", "b"), ("c", "d")]).segments()[1:] == [
        (" b </s>", True),
        ("<s>[INST] c [/INST]", False),
        (" d </s>", True),
    ]
    assert ask("mpt", [("a", "b")]).segments()[1:] == [("b<|im_end|>", True)]
    assert ask("llava_v0", [("a", "b")]).segments()[1:] == [(" b###", True)]
    assert ask("plain", [("<image>", "a dog")]).segments() == [("<image>\n", False), ("a dog\n", True)]


@pytest.mark.parametrize("name", sorted(conv_templates))
def test_segments_join_to_the_prompt_and_alternate(name):
    segments = ask(name, [("one", "two"), ("three", None)]).segments()
    assert "".join(segment.text for segment in segments) == ask(name, [("one", "two"), ("three", None)]).get_prompt()
    assert all(left.supervised != right.supervised for left, right in itertools.pairwise(segments))


def test_copies_are_independent():
    first = conv_templates["v1"].copy()
    first.append_message(first.roles[0], "hello")
    second = first.copy()
    second.messages[0][1] = "changed"
    assert first.messages == [["USER", "hello"]]
    assert conv_templates["v1"].messages == []
    assert get_template("v1") == default_conversation


def test_template_facts():
    assert default_conversation.version == "v1"
    assert conv_templates["vicuna_v1"] is conv_templates["v1"]
    assert conv_templates["v1"].roles == ("USER", "ASSISTANT")
    assert conv_templates["v1"].sep_style is SeparatorStyle.TWO
    assert {name: template.stop_text for name, template in conv_templates.items() if name in ("v0", "v1", "mpt")} == {
        "v0": "###",
        "v1": "</s>",
        "mpt": "<|im_end|>",
    }
    assert conv_templates["v0"].offset == 2


def test_unknown_template_names_the_choices():
    with pytest.raises(ValueError, match=r"^unknown conversation template 'vicuna'; choose one of chatml_direct, def"):
        get_template("vicuna")


@pytest.mark.parametrize(("role", "text"), [(0, None), (1, "hello")])
def test_instruction_templates_begin_with_a_question(role, text):
    dialogue = get_template("llama_2")
    dialogue.append_message(dialogue.roles[role], text)
    with pytest.raises(ValueError, match=r"^template 'llama_v2': the first message must be a text of 'USER'$"):
        dialogue.get_prompt()
