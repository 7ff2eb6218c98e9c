"""A dialogue is read once: streamed answers are those of one-shot generation, and a turn feeds only what is new."""

import contextlib
import re

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.supervision import encode_segments
from llava.image_processing import open_image
from llava.inference.chat import Chat, answer_one, choose_token
from llava.inference.prompts import PromptError, ending_ids, next_turn_ids
from llava.inference.session import Prompt, Request, Sampling

GREEDY = Sampling(max_new_tokens=8)
END = 2
PATCHES = 16


@pytest.fixture(scope="module")
def images(goldens):
    return [open_image(goldens / "images" / name) for name in ("landscape.jpg", "portrait.png")]


def say(chat, question, images=()):
    return "".join(chat.reply(question, images))


def test_each_turn_is_one_shot_generation_on_the_whole_dialogue(session, images, turn_ids):
    chat = Chat(session, GREEDY)
    ids, pixels = [], []
    turns = [("Is there railing?", images[:1]), ("and now?", []), ("Compare it with this", images[1:]), ("why?", [])]
    for question, new_images in turns:
        answer = say(chat, question, new_images)
        ids += turn_ids(session, question, len(new_images), is_first=not ids)
        pixels += session.pixel_values(new_images)
        [expected] = session.generate_ids([Prompt(list(ids), list(pixels))], GREEDY)
        assert answer == session.decode(expected)
        ids += [*expected, END]  # broken off at 8 tokens, so the template's end was put behind
        assert chat.ids == ids
    assert [question for question, _ in chat.turns] == [question for question, _ in turns]


def test_a_second_turn_feeds_only_what_is_new(session, images):
    chat = Chat(session, GREEDY)
    say(chat, "Is there railing?", images[:1])
    assert chat.fed_tokens == len(session.prompt_ids("Is there railing?", 1)) - 1 + PATCHES + 7
    say(chat, "and now?")
    new = next_turn_ids("and now?", 0, session.template, session.tokenizer)
    assert chat.fed_tokens == 1 + 1 + len(new) + 7  # last token and end of the answer before, question, 7 of the answer
    assert chat.ids.count(IMAGE_TOKEN_INDEX) == 1


def test_an_answer_that_ends_itself_leaves_one_end_mark(session, images, swap_words):
    chat = Chat(session, GREEDY)
    say(chat, "Is there railing?", images[:1])
    reply = chat.ids[-9:-1]
    ending = Chat(swap_words(session, reply[3], END), GREEDY)
    answer = say(ending, "Is there railing?", images[:1])
    assert answer == session.decode(reply[:3])
    assert ending.ids == [*session.prompt_ids("Is there railing?", 1), *reply[:3], END]
    say(ending, "and now?")
    assert "</s></s>" not in session.tokenizer.decode([token for token in ending.ids if token >= 0])
    assert all(answer == answer.replace("</s>", "") for _, answer in ending.turns)


def test_a_text_that_was_tokenised_as_in_training_gives_the_ids_of_the_whole_dialogue(session, swap_words):
    chat = Chat(session, Sampling(max_new_tokens=1))
    say(chat, "hello")
    yes = session.tokenizer.convert_tokens_to_ids("▁yes")
    agreeing = Chat(swap_words(session, chat.ids[-2], yes), Sampling(max_new_tokens=1))
    assert say(agreeing, "hello") == "yes"
    say(agreeing, "really?")
    dialogue = session.template.copy()
    for role, text in zip(dialogue.roles * 2, ("hello", "yes", "really?", None), strict=True):
        dialogue.append_message(role, text)
    assert agreeing.ids[:-2] == encode_segments(dialogue.segments(), session.tokenizer)[0]


def test_a_template_that_ends_answers_by_text(session, swap_words):
    human = session.with_template("llava_v0")
    [full] = human.generate_ids([human.prepare("hello")], GREEDY)
    ending = swap_words(human, full[3], human.tokenizer.convert_tokens_to_ids("###"))
    chat = Chat(ending, GREEDY)
    assert say(chat, "hello") == session.decode(full[:3])
    say(chat, "and now?")
    assert "###Human: and now?###Assistant:" in session.tokenizer.decode(chat.ids)
    assert "######" not in session.tokenizer.decode(chat.ids)


def test_an_answer_broken_off_stays_as_far_as_it_went(session, images):
    whole = Chat(session, Sampling(max_new_tokens=3))
    short = say(whole, "Is there railing?", images[:1])
    chat = Chat(session, GREEDY)
    with contextlib.closing(chat.reply("Is there railing?", images[:1])) as pieces:
        while len(chat_text := next(pieces)) == 0:
            pass
        for piece in pieces:
            chat_text += piece
            if chat_text == short:
                break
    assert chat.turns == whole.turns
    assert chat.ids == whole.ids
    chat.sampling = whole.sampling
    assert say(chat, "and now?") == say(whole, "and now?")
    assert chat.fed_tokens == whole.fed_tokens


@pytest.mark.parametrize("failing_step", [1, 3])
def test_an_interrupt_inside_the_model_does_no_harm(session, images, monkeypatch, failing_step):
    chat, undisturbed = Chat(session, GREEDY), Chat(session, GREEDY)
    for each in (chat, undisturbed):
        say(each, "Is there railing?", images[:1])
    steps = 0
    module = session.model.model.layers[1].mlp
    forward = module.forward

    def interrupted(*args, **kwargs):
        nonlocal steps
        steps += 1
        if steps == failing_step:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        say(chat, "and now?")
    monkeypatch.undo()
    if failing_step == 1:
        assert chat.ids == undisturbed.ids
    else:  # two tokens were chosen when the third step failed
        undisturbed.sampling = Sampling(max_new_tokens=2)
        say(undisturbed, "and now?")
        undisturbed.sampling = GREEDY
        assert chat.turns == undisturbed.turns
    assert say(chat, "why?") == say(undisturbed, "why?")
    assert chat.ids == undisturbed.ids


def test_reset_forgets_everything(session, images):
    chat, fresh = Chat(session, GREEDY), Chat(session, GREEDY)
    say(chat, "Is there railing?", images[:1])
    chat.reset()
    assert say(chat, "hello") == say(fresh, "hello")
    assert chat.ids == fresh.ids
    assert chat.turns == fresh.turns


def test_bad_questions_change_nothing(session, images):
    chat = Chat(session, GREEDY)
    say(chat, "Is there railing?", images[:1])
    before = list(chat.ids)
    for question in (" ", "see <image>"):
        with pytest.raises(PromptError):
            chat.reply(question)
    with pytest.raises(PromptError, match=r"takes \d+ tokens and the answer up to 8, more than the context of 512"):
        chat.reply("long " * 500)
    assert chat.ids == before
    assert say(chat, "and now?")


def test_beams_cannot_be_streamed(session):
    with pytest.raises(ValueError, match=re.escape("num_beams is 2, but a chat streams its answers; use 1")):
        Chat(session, Sampling(num_beams=2))


def test_a_single_answer_is_that_of_a_batch(session, images):
    for sampling in (GREEDY, Sampling(num_beams=3, max_new_tokens=8)):
        for request in (Request("hello"), Request("Compare them", images)):
            assert answer_one(session, request, sampling) == session.answer_batch([request], sampling)[0]
    with pytest.raises(PromptError, match="more than the context of 512"):
        answer_one(session, Request("long " * 500))


def test_seeded_chance_repeats(session):
    warm = Sampling(temperature=1.5, max_new_tokens=8, seed=3)
    assert say(Chat(session, warm), "hello") == say(Chat(session, warm), "hello")
    assert say(Chat(session, warm), "hello") != say(Chat(session, Sampling(max_new_tokens=8)), "hello")


def test_endings_are_the_templates(session):
    assert ending_ids(session.template, session.tokenizer) == [END]


class TestChooseToken:
    logits = torch.tensor([0.1, 0.6, 0.25, 0.05]).log()

    def test_temperature_0_is_the_likeliest(self):
        assert choose_token(self.logits, Sampling()) == 1

    def test_chance_follows_the_probabilities(self):
        generator = torch.Generator().manual_seed(0)
        draws = [choose_token(self.logits, Sampling(temperature=1.0), generator) for _ in range(4000)]
        shares = torch.bincount(torch.tensor(draws), minlength=4) / 4000
        torch.testing.assert_close(shares, self.logits.exp(), atol=0.03, rtol=0)

    @pytest.mark.parametrize(
        "top_p, kept", [(0.01, {1}), (0.6, {1}), (0.61, {1, 2}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
    )
    def test_top_p_keeps_the_likeliest(self, top_p, kept):
        generator = torch.Generator().manual_seed(0)
        sampling = Sampling(temperature=1.0, top_p=top_p)
        assert {choose_token(self.logits, sampling, generator) for _ in range(400)} == kept
