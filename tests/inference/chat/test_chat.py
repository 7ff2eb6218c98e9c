"""Streamed answers are those of one-shot generation, and a turn computes only its new tokens."""

import contextlib
import dataclasses
import re

import pytest

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.supervision import encode_segments
from llava.image_files.decode import open_image
from llava.inference.chat.chat import Chat, answer_one
from llava.inference.prompts import PromptError, ending_ids, next_turn_ids
from llava.inference.session import Prompt, Sampling

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
        ids += [*expected, END]  # stopped at 8 tokens, so the template's end was appended
        assert chat.ids == ids
    assert [question for question, _ in chat.turns] == [question for question, _ in turns]


def test_a_second_turn_computes_only_its_new_tokens(session, images):
    chat = Chat(session, GREEDY)
    say(chat, "Is there railing?", images[:1])
    assert chat.computed_positions == len(session.prompt_ids("Is there railing?", 1)) - 1 + PATCHES + 7
    say(chat, "and now?")
    new = next_turn_ids("and now?", 0, session.template, session.tokenizer)
    assert chat.computed_positions == 1 + 1 + len(new) + 7  # end of the last answer, question, all but one new token
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


def test_a_closed_answer_keeps_its_tokens_so_far(session, images):
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
    assert chat.computed_positions == whole.computed_positions


@pytest.mark.parametrize("failing_step", [1, 3])
def test_an_interrupt_inside_the_model_leaves_the_chat_usable(session, images, monkeypatch, failing_step):
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
    with pytest.raises(PromptError, match=r"takes \d+ tokens, which leaves nothing for an answer in the context of"):
        chat.reply("long " * 500)
    assert chat.ids == before
    assert say(chat, "and now?")


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_a_limit_near_the_context_is_cut_turn_by_turn(session, caplog, is_pipelined):
    wide = Chat(session, Sampling(max_new_tokens=12))
    whole = say(wide, "hello")
    narrow = dataclasses.replace(session, context_length=len(wide.ids) - 1, warned_limits=set())  # </s> is in the ids
    chat = Chat(narrow, Sampling(max_new_tokens=2000))
    chat.is_pipelined = is_pipelined
    assert say(chat, "hello") == whole
    with pytest.raises(PromptError, match=r"leaves nothing for an answer in the context of"):
        chat.reply("and now?")
    chat.sampling = Sampling(max_new_tokens=5)
    chat.reset()
    say(chat, "hello")
    assert len(chat.ids) == len(wide.ids) - 7
    assert len([record for record in caplog.records if "max_new_tokens is 2000" in record.getMessage()]) == 1


def test_beams_cannot_be_streamed(session):
    with pytest.raises(ValueError, match=re.escape("num_beams is 2, but a chat streams its answers; use 1")):
        Chat(session, Sampling(num_beams=2))


def test_a_single_answer_is_that_of_a_batch(session, images):
    for sampling in (GREEDY, Sampling(num_beams=3, max_new_tokens=8)):
        for question, chosen in (("hello", []), ("Compare them", images)):
            prompt = session.prepare(question, chosen)
            assert [answer_one(session, question, chosen, sampling)] == session.answer_prompts([prompt], sampling)
    with pytest.raises(PromptError, match="leaves nothing for an answer in the context of 512"):
        answer_one(session, "long " * 500)


@pytest.mark.parametrize("beams", [1, 2])
def test_one_sampler_for_a_single_answer_and_a_batch(session, images, beams):
    """A seed and the request decide the draws, in any batch and through any call."""
    warm = Sampling(temperature=1.2, top_p=0.95, max_new_tokens=8, seed=3, num_beams=beams)
    questions = [("hello", []), ("Compare them", images), ("why?", images[:1])]
    prompts = [session.prepare(*question) for question in questions]
    together = session.answer_prompts(prompts, warm)
    assert [session.answer_prompts([prompt], warm)[0] for prompt in prompts] == together
    assert session.answer_prompts(prompts[::-1], warm) == together[::-1]
    assert [answer_one(session, *question, warm) for question in questions] == together
    assert session.answer_prompts(prompts, dataclasses.replace(warm, seed=4)) != together
    pipelined = Chat(session, dataclasses.replace(warm, num_beams=1))
    pipelined.is_pipelined = True
    if beams == 1:
        assert "".join(pipelined.reply("hello")) == together[0]


def test_a_closed_answer_does_not_shift_the_draws_of_the_next(session):
    warm = Sampling(temperature=1.5, max_new_tokens=8, seed=3)
    whole = Chat(session, warm)
    first = say(whole, "hello")
    for is_pipelined in (False, True):
        chat = Chat(session, warm)
        chat.is_pipelined = is_pipelined
        with contextlib.closing(chat.reply("hello")) as pieces:
            next(pieces)
        chat.reset()
        assert say(chat, "hello") == first


def test_without_a_seed_answers_differ(session):
    chat = Chat(session, Sampling(temperature=1.5, max_new_tokens=8))
    found = set()
    for _ in range(4):
        chat.reset()
        found.add(say(chat, "hello"))
    assert len(found) > 1


def test_a_seed_repeats_the_answer(session):
    warm = Sampling(temperature=1.5, max_new_tokens=8, seed=3)
    assert say(Chat(session, warm), "hello") == say(Chat(session, warm), "hello")
    assert say(Chat(session, warm), "hello") != say(Chat(session, Sampling(max_new_tokens=8)), "hello")


def test_endings_are_the_templates(session):
    assert ending_ids(session.template, session.tokenizer) == [END]


def test_an_undone_turn_leaves_nothing_behind(session, images):
    chat, expected = Chat(session, GREEDY), Chat(session, GREEDY)
    say(chat, "Is there railing?", images[:1])
    say(expected, "Is there railing?", images[:1])
    say(chat, "and now?")
    chat.undo()
    assert (chat.turns, chat.ids) == (expected.turns, expected.ids)
    assert say(chat, "why?") == say(expected, "why?")
    assert (chat.turns, chat.ids, chat.computed_positions) == (
        expected.turns,
        expected.ids,
        expected.computed_positions,
    )
    chat.undo()
    chat.undo()
    assert (chat.turns, chat.ids) == ([], [])
    with pytest.raises(ValueError, match="no turn to undo"):
        chat.undo()
    assert say(chat, "Is there railing?", images[:1]) == expected.turns[0][1]
