"""One home for prompt and generation: batch = single, an answer stops where its template ends it."""

import copy
import dataclasses
import logging
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.conversation import get_template
from llava.data.supervision import encode_example
from llava.image_files.decode import open_image
from llava.image_files.errors import ImageError
from llava.inference.chat.chat import answer_one
from llava.inference.prompts import PromptError
from llava.inference.session import Sampling, Session

IMAGES = ["landscape.jpg", "portrait.png", "square.png", "tiny.png"]
GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def images(goldens):
    return [open_image(goldens / "images" / name) for name in IMAGES]


def test_prompt_ids_are_those_of_training(session):
    turns = [{"from": "human", "value": "<image>\nIs there railing?"}, {"from": "gpt", "value": "yes"}]
    ids = session.prompt_ids("Is there railing?", 1)
    assert ids == encode_example(turns, "vicuna_v1", session.tokenizer)[0][: len(ids)]


@pytest.mark.parametrize("index, question", [(0, "Is there railing?"), (1, "What are the  colors of the bikes?")])
def test_greedy_answers_are_the_originals(session, images, goldens, index, question):
    expected = np.load(goldens / "base_outputs.npz")[f"greedy_{index}"].flatten().tolist()
    [ids] = session.generate_ids([session.prepare(question, [images[index]])], GREEDY)
    assert [1, *ids] == expected


def test_a_batch_answers_as_each_question_alone(session, images):
    prompts = [
        session.prepare("Is there railing?", [images[0]]),
        session.prepare("hello"),
        session.prepare("Compare <image> with <image>, " + "please " * 20, [images[1], images[2]]),
        session.prepare("What are the  colors of the bikes?", [images[3]]),
        session.prepare("Three", images[:3]),
    ]
    answers = session.answer_prompts(prompts, GREEDY)
    assert answers == [session.answer_prompts([prompt], GREEDY)[0] for prompt in prompts]
    assert len(set(answers)) == len(answers)


def test_images_of_any_mode_and_depth_have_the_pixels_of_their_rgb(session, images):
    gray = np.asarray(images[0].convert("L"))
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    [expected] = session.pixel_values([Image.fromarray(gray).convert("RGB")])
    for image in (
        Image.fromarray(gray),
        deep,
        Image.fromarray(gray.astype(np.int32)),
        Image.fromarray(gray).convert("LA"),
    ):
        assert torch.equal(session.pixel_values([image])[0], expected)
    with pytest.raises(ImageError, match="holds 32-bit floating-point numbers"):
        session.pixel_values([Image.fromarray(gray.astype(np.float32))])


@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=30).map(
                lambda text: text.replace("<", "") + "?"
            ),
            st.lists(st.integers(0, 3), max_size=2),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=15, deadline=None)
def test_batch_equals_single_for_any_rows(session, images, rows):
    prompts = [session.prepare(text, [images[index] for index in chosen]) for text, chosen in rows]
    batch = session.generate_ids(prompts, Sampling(max_new_tokens=5))
    assert batch == [session.generate_ids([prompt], Sampling(max_new_tokens=5))[0] for prompt in prompts]


def test_an_answer_ends_with_the_end_mark(session, images, swap_words):
    request = session.prepare("Is there railing?", [images[0]])
    other = session.prepare("hello")
    [full], [alone] = session.generate_ids([request], GREEDY), session.generate_ids([other], GREEDY)
    ending = swap_words(session, full[4], 2)
    ids, beside = ending.generate_ids([request, other], GREEDY)
    assert ids == [*full[:4], 2]
    assert beside == alone
    assert ending.decode(ids) == session.decode(full[:4])


def test_templates_without_an_end_token_stop_on_their_text(session, swap_words):
    human = session.with_template("llava_v0")
    [full] = human.generate_ids([human.prepare("hello")], GREEDY)
    hashes = human.tokenizer.convert_tokens_to_ids("###")
    ending = swap_words(human, full[4], hashes)
    prompts = [ending.prepare("hello"), ending.prepare("and you?")]
    assert ending.stops_on_text
    assert not session.stops_on_text
    assert ending.answer_prompts(prompts, GREEDY)[0] == session.decode(full[:4])
    assert ending.generate_ids(prompts[:1], GREEDY) == [[*full[:4], hashes]]


def test_beams_and_seeded_chance(session, images):
    prompt = session.prepare("Is there railing?", [images[0]])
    [beams] = session.generate_ids([prompt], Sampling(num_beams=3, max_new_tokens=6))
    assert len(beams) == 6
    warm = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=6, seed=7)
    torch.manual_seed(0)
    outside = torch.rand(1)
    torch.manual_seed(0)
    first = session.generate_ids([prompt], warm)
    assert torch.equal(torch.rand(1), outside)
    assert session.generate_ids([prompt], warm) == first
    assert session.generate_ids([prompt], dataclasses.replace(warm, seed=8)) != first


def test_hot_sampling_is_not_cut_to_the_fifty_likeliest(session):
    assert Sampling(temperature=1.0, num_beams=2).generation_arguments()["top_k"] == 0
    assert Sampling().generation_arguments() == {"max_new_tokens": 128, "num_beams": 1, "do_sample": False}


def test_only_a_prompt_that_leaves_nothing_of_the_context_is_refused(session, images):
    length = session.spliced_length(session.prepare("why?", [images[0]]))
    narrow = [dataclasses.replace(session, context_length=length + room) for room in (0, 1, 2)]
    message = f"the prompt takes {length} tokens, which leaves nothing for an answer in the context of {length}"
    narrow[0].prepare("why?", [images[0]])
    with pytest.raises(PromptError, match=message) as caught:
        narrow[0].prepare("why?", [images[0]], max_new_tokens=1)
    assert caught.value.code == "prompt_too_long"
    assert [wide.answer_limit(length, 2000) for wide in narrow[1:]] == [1, 2]


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_of_different_limits_in_one_batch_are_single_ones(session, images, caplog, beams):
    """Each is the beginning of what a wider context would say, but for beams, and is what it would be alone."""
    questions = [("hello", []), ("why?", images[:1]), ("Compare them", images[:2])]
    sampling = Sampling(max_new_tokens=2000, num_beams=beams)
    lengths = [session.spliced_length(session.prepare(*question)) for question in questions]
    narrow = dataclasses.replace(session, context_length=max(lengths) + 1, warned_limits=set())
    prompts = [narrow.prepare(*question) for question in questions]
    found = narrow.generate_ids(prompts, sampling)
    limits = [narrow.context_length - length for length in lengths]
    assert len(set(limits)) == 3
    assert [len(ids) for ids in found] == limits  # none of these ends by itself
    assert found == [narrow.generate_ids([prompt], sampling)[0] for prompt in prompts]
    if beams == 1:
        whole = session.generate_ids(prompts, Sampling(max_new_tokens=max(limits)))
        assert found == [ids[:limit] for ids, limit in zip(whole, limits, strict=True)]
    caplog.clear()
    texts = [narrow.decode(ids) for ids in found]
    assert [answer_one(narrow, *question, sampling) for question in questions] == texts
    [note] = [record.getMessage() for record in caplog.records if "max_new_tokens" in record.getMessage()]
    assert note.startswith(f"max_new_tokens is 2000, but a prompt of {lengths[0]} tokens leaves {limits[0]} in the")


def test_spliced_length_is_what_the_model_reads(session, images):
    for question, chosen in (("a", []), ("b", images[:1]), ("c <image> d <image>", images[1:3])):
        prompt = session.prepare(question, chosen)
        spliced = session.model.splice(torch.tensor([prompt.input_ids]), prompt.pixel_values)
        assert session.spliced_length(prompt) == spliced.inputs_embeds.shape[1]


def test_tiles_count_as_patches(session, images):
    prompt = session.prepare("b", images[:1])
    tiled = prompt._replace(pixel_values=[torch.stack(prompt.pixel_values * 3)])
    patches = session.model.get_vision_tower().num_patches
    assert session.spliced_length(tiled) == session.spliced_length(prompt) + 2 * patches


def test_images_for_a_model_without_a_vision_tower(session, images):
    blind = dataclasses.replace(session, image_processor=None)
    with pytest.raises(ValueError, match="the model has no vision tower; ask without images"):
        blind.prepare("what?", images[:1])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -1}, "temperature is -1; choose 0"),
        ({"temperature": float("nan")}, "temperature is nan; choose 0"),
        ({"top_p": 0}, "top_p is 0; choose a probability above 0, at most 1"),
        ({"num_beams": 0}, "num_beams is 0; choose 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; choose 1 or more"),
    ],
)
def test_sampling_out_of_range(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(**values)


class TestTemplate:
    def test_weights_without_one_get_vicuna_v1_and_the_log_says_so(self, goldens, caplog):
        caplog.set_level(logging.INFO, "llava")
        session = Session.load(str(goldens / "llava-v1.5-golden"), device="cpu")
        assert session.template == get_template("vicuna_v1")
        assert "the weights carry no prompt template; using vicuna_v1" in caplog.messages

    def test_asked_for_wins_over_saved_and_the_log_says_so(self, goldens, caplog):
        caplog.set_level(logging.INFO, "llava")
        session = Session.load(str(goldens / "llava-v1.5-golden"), device="cpu", conv_mode="llava_v0")
        assert session.template == get_template("llava_v0")
        assert "prompt template: llava_v0, as requested; the one saved with the weights is vicuna_v1" in caplog.messages

    def test_saved_is_used_whatever_the_directory_is_called(self, session):
        model = copy.copy(session.model)
        model.config = copy.deepcopy(session.model.config)
        model.config.conversation_template = "llava_llama_2"
        saved = dataclasses.replace(session, model=model).with_template(None)
        assert saved.template == get_template("llava_llama_2")

    def test_unknown_is_refused_before_loading(self):
        with pytest.raises(ValueError, match="unknown conversation template 'v7'"):
            Session.load("nowhere", conv_mode="v7")

    def test_odd_bits_are_refused(self):
        with pytest.raises(ValueError, match="bits is 3; choose 4, 8, 16 or 'fp8'"):
            Session.load("nowhere", bits=3)
