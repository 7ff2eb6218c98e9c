"""Prompts are the original's, text for text, and their segments say what is supervised."""

from __future__ import annotations

import base64
import io
import itertools
import json

import pytest
from PIL import Image

from llava.conversation import Conversation, SeparatorStyle, conv_templates, default_conversation, get_template

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


IMAGE = object()  # what a client puts beside the text: never part of a prompt


def turns_with_images(template):
    dialogue = conv_templates[template].copy()
    dialogue.append_message(dialogue.roles[0], ("What is it?\n<image>", IMAGE, "Crop"))
    dialogue.append_message(dialogue.roles[1], "A cat.")
    dialogue.append_message(dialogue.roles[0], ("<image>\nAnd this?", IMAGE, "Pad"))
    dialogue.append_message(dialogue.roles[1], None)
    return dialogue


@pytest.mark.parametrize("name", sorted({*conv_templates} - {"default", "v0", "v0_mmtag", "v1_mmtag"}))
def test_the_first_message_with_an_image_has_it_in_front(name):
    text = ask(name, [("<image>\nWhat is it?", "A cat."), ("<image>\nAnd this?", None)])
    assert turns_with_images(name).get_prompt() == text.get_prompt()
    assert turns_with_images(name).copy().segments() == text.segments()


@pytest.mark.parametrize("name", ["v0_mmtag", "v1_mmtag"])
def test_tagged_templates_show_the_image_in_a_turn_of_its_own(name):
    text = ask(name, [("<Image><image></Image>", "Received."), ("What is it?", "A cat."), ("<image>\nAnd this?", None)])
    assert turns_with_images(name).get_prompt() == text.get_prompt()


def test_an_image_after_the_examples_of_a_template_stays_where_its_text_has_it():
    text = ask("v0", [("What is it?\n<image>", "A cat."), ("<image>\nAnd this?", None)])
    assert turns_with_images("v0").get_prompt() == text.get_prompt()


def test_an_image_without_a_question():
    dialogue = conv_templates["v1"].copy()
    dialogue.append_message("USER", ("<image>", IMAGE, "Default"))
    dialogue.append_message("ASSISTANT", None)
    assert dialogue.get_prompt() == f"{SYSTEM} USER: <image>\n ASSISTANT:"
    dialogue.messages[1][1] = "Yes."
    dialogue.append_message("USER", ("", IMAGE, "Default"))
    dialogue.append_message("ASSISTANT", None)
    assert dialogue.get_prompt() == f"{SYSTEM} USER: <image>\n ASSISTANT: Yes.</s>USER:  ASSISTANT:"


@pytest.mark.parametrize("message", [["text", IMAGE, "Crop"], {"text": "a"}, (IMAGE, "text"), 5])
def test_a_message_of_another_kind_is_refused(message):
    dialogue = conv_templates["v1"].copy()
    dialogue.append_message("USER", message)
    kind = type(message).__name__
    with pytest.raises(TypeError, match=rf"^a message is {kind}; use a text, \(text, image, mode\) or None$"):
        dialogue.get_prompt()


class TestImagesInMessages:
    """`(text, image, mode)` as the original's Gradio clients send it."""

    def dialogue(self, mode="Default", size=(40, 20)):
        dialogue = conv_templates["v1"].copy()
        dialogue.append_message(dialogue.roles[0], ("<image>\nWhat is it?", Image.new("RGBA", size, "red"), mode))
        dialogue.append_message(dialogue.roles[1], "A cat.")
        dialogue.append_message(dialogue.roles[0], "Which?")
        dialogue.append_message(dialogue.roles[1], None)
        return dialogue

    @pytest.mark.parametrize(
        ("mode", "size", "shown"),
        [
            ("Default", (40, 20), (40, 20)),
            ("Crop", (40, 20), (40, 20)),
            ("Pad", (40, 20), (40, 40)),
            ("Resize", (40, 20), (336, 336)),
            ("Default", (2000, 1000), (1344, 672)),
            ("Default", (1000, 2000), (672, 1344)),
            ("Default", (5000, 1), (1344, 1)),
        ],
    )
    def test_modes(self, mode, size, shown):
        (image,) = self.dialogue(mode, size).get_images(return_pil=True)
        assert (image.size, image.mode) == (shown, "RGB")

    def test_files_in_base64(self):
        (data,) = self.dialogue().get_images()
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert (image.format, image.size) == ("PNG", (40, 20))

    def test_an_unknown_mode(self):
        with pytest.raises(ValueError, match=r"^image mode is 'Stretch'; choose Pad, Resize, Crop, Default$"):
            self.dialogue("Stretch").get_images()

    def test_what_gradio_shows(self):
        (question, answer), second = self.dialogue().to_gradio_chatbot()
        start, end = '<img src="data:image/jpeg;base64,', '" alt="user upload image" />What is it?'
        assert (question[: len(start)], question[-len(end) :], answer) == (start, end, "A cat.")
        assert second == ["Which?", None]

    def test_the_dialogue_as_json(self):
        dialogue = self.dialogue()
        found = json.loads(json.dumps(dialogue.dict()))
        assert found["messages"][0] == ["USER", "<image>\nWhat is it?"]
        assert found["messages"][3] == ["ASSISTANT", None]
        assert (found["roles"], found["sep"], found["sep2"], found["offset"]) == (["USER", "ASSISTANT"], " ", "</s>", 0)
        assert len(dialogue.get_images()) == 1  # its own messages are as they were

    def test_the_examples_of_a_template_are_not_shown(self):
        assert conv_templates["v0"].copy().to_gradio_chatbot() == []
        assert conv_templates["v0"].copy().get_images() == []


def test_a_conversation_of_its_own():
    dialogue = Conversation(system="S", roles=("A", "B"), messages=[], offset=0)
    assert (dialogue.sep_style, dialogue.sep, dialogue.skip_next) == (SeparatorStyle.SINGLE, "###", False)
