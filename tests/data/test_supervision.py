"""Ids and labels are the original's, on every golden and on every row of the real table."""

from __future__ import annotations

import csv
import hashlib

import numpy as np
import pytest

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data.supervision import build_dialogue, encode_example, find_turn_errors, place_images, plain_question
from llava.mm_utils import tokenizer_image_token


def turns(*texts):
    """Alternating turns, the human's first."""
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def test_every_golden(golden_json, tokenizers):
    cases = golden_json("supervision")
    assert len(cases) == 52
    assert not any(case["all_masked"] for case in cases)
    for case in cases:
        ids, labels = encode_example(case["conversations"], case["version"], tokenizers[case["legacy"]])
        assert ids == case["input_ids"], case
        assert labels == case["labels"], case


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
def test_every_row_of_the_real_table(golden_json, shared_path, tokenizers, legacy):
    golden = golden_json("csv_digest")
    expected = golden["legacy_true" if legacy else "legacy_false"]
    tokenizer = tokenizers[legacy]
    digest, running, rows, tokens, supervised = hashlib.sha256(), [], 0, 0, 0
    with shared_path("data/Train_Qs.csv").open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            ids, labels = encode_example(turns("<image>\n" + row["question"], row["answer"]), "v1", tokenizer)
            digest.update(np.array(ids, "<i4").tobytes())
            digest.update(np.array(labels, "<i4").tobytes())
            if rows % 1000 == 0:
                running.append(digest.hexdigest()[:16])
                assert running[-1] == expected["running_every_1000"][len(running) - 1], f"differs by row {rows}"
            rows += 1
            tokens += len(ids)
            supervised += sum(label != IGNORE_INDEX for label in labels)
    assert rows == golden["rows"] == 66668
    assert (tokens, supervised) == (expected["tokens_with_one_placeholder"], expected["supervised_tokens"])
    assert digest.hexdigest() == expected["sha256"]


def test_a_row_in_full(tokenizer):
    ids, labels = encode_example(turns("<image>\nIs there railing?", "yes"), "v1", tokenizer)
    assert ids[33:] == [28705, -200, 28705, 13, 2301, 736, 8314, 288, 28804, 8602, 8048, 12738, 28747, 5081, 2]
    assert labels == [IGNORE_INDEX] * 46 + [5081, 2]


DIALOGUES = [
    turns("<image>\nWhat is this?", "a cat", "What  colour?", "black and white"),
    turns("Two: <image> and <image>?", "the same"),
    turns(" leading", "trailing ", "\n\nlines\n", "é漢🦙"),
]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["v1", "llava_v1", "v1_mmtag"])
@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_ids_are_those_of_the_prompt(tokenizers, name, legacy, dialogue):
    prompt = build_dialogue(dialogue, name).get_prompt()
    ids, labels = encode_example(dialogue, name, tokenizers[legacy])
    assert ids == tokenizer_image_token(prompt, tokenizers[legacy])
    assert len(labels) == len(ids)


@pytest.mark.parametrize("name", ["v1", "llava_llama_2", "llava_v0", "mpt"])
@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_supervised_ids_are_the_answers_and_what_ends_them(tokenizer, name, dialogue):
    ids, labels = encode_example(dialogue, name, tokenizer)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    runs, run = [], []
    for label in [*labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    template = conv_templates[name]
    before, after = (" ", " ") if name == "llava_llama_2" else ("" if name == "mpt" else " ", "")
    answers = [turn["value"] for turn in dialogue if turn["from"] == "gpt"]
    # Decoding takes off the space that stands before an answer.
    assert runs == [(before + answer + after + template.stop_text).removeprefix(" ") for answer in answers]


def test_an_answer_with_an_image_never_supervises_its_placeholder(tokenizer):
    ids, labels = encode_example(turns("Show it", "here <image> it is"), "v1", tokenizer)
    assert ids.count(IMAGE_TOKEN_INDEX) == 1
    assert labels[ids.index(IMAGE_TOKEN_INDEX)] == IGNORE_INDEX


def test_an_opening_of_the_assistant_is_left_out(tokenizer):
    opened = [{"from": "gpt", "value": "ready"}, *turns("Where?", "there")]
    assert encode_example(opened, "v1", tokenizer) == encode_example(turns("Where?", "there"), "v1", tokenizer)


def test_a_template_may_be_given_as_a_dialogue(tokenizer):
    row = turns("a", "b")
    assert encode_example(row, conv_templates["v1"], tokenizer) == encode_example(row, "v1", tokenizer)
    assert conv_templates["v1"].messages == []


@pytest.mark.parametrize(
    ("text", "version", "placed"),
    [
        ("How many?\n<image>", "v1", "<image>\nHow many?"),
        ("<image> How many?", "v1", "<image>\nHow many?"),
        ("<image>", "v1", "<image>"),
        ("a <image> b <image>", "v1", "a <image> b <image>"),
        ("How many?", "v1", "How many?"),
        ("<image>\nHow many?", "v1_mmtag", "<Image><image></Image>\nHow many?"),
    ],
)
def test_images_stand_where_the_original_put_them(text, version, placed):
    assert place_images(text, version) == placed


def test_image_marks_around_an_image():
    assert place_images("<image>\na", "v1", use_im_start_end=True) == "<im_start><image><im_end>\na"
    for text in ("<im_start><image><im_end>\na", "a <im_start><image><im_end> b <im_start><image><im_end>"):
        assert place_images(text, "v1", use_im_start_end=True) == text


def test_captioning_keeps_the_images_alone():
    assert plain_question("Describe <image> and <image>.") == "<image><image>"
    assert build_dialogue(turns("<image>\nDescribe.", "a dog"), "plain").get_prompt() == "<image>a dog\n"


@pytest.mark.parametrize(
    ("conversations", "template", "message"),
    [
        ([], "v1", "^the dialogue has no answer, so there is nothing to learn from it$"),
        (turns("only a question"), "v1", "^the dialogue has no answer, so there is nothing to learn from it$"),
        (turns("a", ""), "v1", "^turn 2, from 'gpt', is empty$"),
        (turns(" \n", "b"), "v1", "^turn 1, from 'human', is empty$"),
        ([{"from": "human"}], "v1", "^turn 1, from 'human', is empty$"),
        (
            [*turns("a"), *turns("b")],
            "v1",
            "^turn 2 is from 'human'; turns alternate, so 'gpt' is due$",
        ),
        ([{"from": "user", "value": "a"}], "v1", "^turn 1 is from 'user'; roles are 'human' and 'gpt' in turn$"),
        ([{"from": "system", "value": "a"}], "v1", "^turn 1 is from 'system', and the template has a system prompt of"),
        (
            [{"from": "human", "text": "a"}],
            "v1",
            "^turn 1 is not an object with 'from' and 'value', but has 'from', 'text'",
        ),
        (
            [{"speaker": "a", "text": "b"}],
            "v1",
            "^turn 1 is not an object with 'from' and 'value', but has 'speaker', ",
        ),
        (["text"], "v1", "^turn 1 is not an object with 'from' and 'value'$"),
        (turns("Describe.", "a dog"), "plain", "^template 'plain' describes images, but the question 'Describe.' has"),
        (turns("a", "b"), "v9", "^unknown conversation template 'v9'; choose one of"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(tokenizer, conversations, template, message):
    with pytest.raises(ValueError, match=message):
        encode_example(conversations, template, tokenizer)


def test_turns_that_no_context_holds_are_refused_before_they_are_encoded():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "word " * 200_000}]
    [error] = find_turn_errors(turns, is_plain=False)
    assert error.code == "too_long"
    assert error.message == (
        "the turns have 1,000,001 characters, and at most 1,000,000 are read; shorten the one that begins "
        f"{('word ' * 8)!r}"
    )
    turns[0]["value"], turns[1]["value"] = "a" * 10, "b" * 999_990
    assert list(find_turn_errors(turns, is_plain=False)) == []
