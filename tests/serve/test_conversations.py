"""Conversations of a web page's visitors: those of the chat, apart from each other, bounded in number and time."""

import pytest
import torch

from llava.image_files.decode import open_image
from llava.inference.chat.chat import Chat
from llava.inference.sampler import Sampling
from llava.inference.session import Session
from llava.serve.conversations import Conversation, Conversations

GREEDY = Sampling(max_new_tokens=6)
QUESTIONS = ("Is there railing?", "and now?")


@pytest.fixture(scope="module")
def session(goldens):
    return Session.load(str(goldens / "llava-v1.5-golden"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def image(goldens):
    return open_image(goldens / "images" / "landscape.jpg")


def ask(conversation, question, image=None, sampling=GREEDY):
    for _ in conversation.ask(question, image, sampling):
        pass
    return conversation.turns[-1]


@pytest.mark.parametrize("n_models", [1, 2])
def test_every_model_answers_as_in_its_own_chat(session, image, tmp_path, n_models):
    expected = Chat(session, GREEDY)
    conversation = Conversation([session] * n_models, tmp_path)
    for number, question in enumerate(QUESTIONS):
        text = "".join(expected.reply(question, [image] if number == 0 else []))
        turn = ask(conversation, question, image if number == 0 else None)
        assert turn.texts == [text] * n_models
        assert [reply.text for reply in turn.replies] == [text] * n_models


def test_answers_are_streamed(session, image, tmp_path):
    conversation = Conversation([session], tmp_path)
    states = [conversation.turns[-1].texts[0] for _ in conversation.ask(QUESTIONS[0], image, GREEDY)]
    assert states[0] == ""
    assert len(set(states)) > 3
    assert states[-1] == conversation.turns[-1].replies[0].text


def test_a_stopped_answer_is_kept_as_far_as_it_came(session, image, tmp_path):
    conversation = Conversation([session, session], tmp_path)
    for _ in conversation.ask(QUESTIONS[0], image, Sampling(max_new_tokens=100)):
        if len(conversation.turns[-1].texts[1]) > 5:
            conversation.stop()
    turn = conversation.turns[-1]
    assert len(turn.replies[0].text) < 100
    whole = ask(Conversation([session], tmp_path), QUESTIONS[0], image, Sampling(max_new_tokens=100))
    assert all(whole.texts[0].startswith(text) for text in turn.texts)
    assert ask(conversation, QUESTIONS[1]).replies[1].text  # it goes on


def test_an_undone_question_gets_the_same_answer_again(session, image, tmp_path):
    conversation = Conversation([session], tmp_path)
    ask(conversation, QUESTIONS[0], image)
    text = ask(conversation, QUESTIONS[1]).texts[0]
    undone = conversation.undo()
    assert ask(conversation, undone.question, undone.image).texts[0] == text
    conversation.undo()
    first = conversation.undo()
    assert conversation.undo() is None
    assert ask(conversation, first.question, first.image).texts == first.texts


def test_a_new_image_starts_a_new_conversation(session, image, goldens, tmp_path):
    conversation = Conversation([session], tmp_path)
    ask(conversation, QUESTIONS[1], image)
    other = open_image(goldens / "images" / "portrait.png")
    turn = ask(conversation, QUESTIONS[0], other)
    assert conversation.turns == [turn]
    assert turn.texts == ask(Conversation([session], tmp_path), QUESTIONS[0], other).texts


def test_thumbnails_go_with_the_conversation(session, image, tmp_path):
    conversation = Conversation([session], tmp_path)
    turn = ask(conversation, QUESTIONS[0], image)
    assert max(open_image(turn.thumbnail).size) <= 640
    conversation.reset()
    assert list(tmp_path.iterdir()) == []


def test_a_full_context_is_a_message_and_the_chat_lives(session, image, tmp_path):
    conversation = Conversation([session], tmp_path)
    ask(conversation, QUESTIONS[0], image)
    turn = ask(conversation, "word " * 600)
    assert "start a new chat" in turn.errors[0] and turn.replies == [None]
    conversation.undo()
    assert ask(conversation, QUESTIONS[1]).replies[0].text


def test_without_memory_the_chat_gets_a_message_and_begins_again(session, image, tmp_path, monkeypatch):
    conversation = Conversation([session], tmp_path)
    ask(conversation, QUESTIONS[0], image)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Chat, "_generate", fail)
        assert "out of memory" in ask(conversation, QUESTIONS[1]).errors[0]
    again = ask(conversation, QUESTIONS[0])
    assert again.texts == ask(Conversation([session], tmp_path), QUESTIONS[0], image).texts
    for _ in range(3):
        conversation.undo()
    assert conversation.turns == []


# --- many visitors ----------------------------------------------------------------------------------------------------


class Visitors:
    """Conversations over a clock that the test sets."""

    def __init__(self, most):
        self.now = 0.0
        self.made = []
        self.pool = Conversations(self.create, most, idle_seconds=10, clock=lambda: self.now)

    def create(self):
        self.made.append(Conversation([], None))
        return self.made[-1]


def test_each_visitor_has_a_conversation_of_his_own():
    visitors = Visitors(most=5)
    first, second = visitors.pool.get("a"), visitors.pool.get("b")
    assert first is not second
    assert visitors.pool.get("a") is first
    visitors.pool.drop("a")
    assert visitors.pool.get("a") is not first
    visitors.pool.drop("nobody")


def test_a_dropped_conversation_ends_its_answer_and_shows_nothing(session, image, tmp_path):
    pool = Conversations(lambda: Conversation([session], tmp_path))
    conversation, steps = pool.get("a"), 0
    for _ in conversation.ask(QUESTIONS[0], image, Sampling(max_new_tokens=100)):
        steps += 1
        if steps == 3:
            pool.drop("a")
    assert steps < 10 and conversation.turns == [] and list(tmp_path.iterdir()) == []
    assert pool.get("a") is not conversation


def test_the_longest_idle_conversation_makes_room():
    visitors = Visitors(most=2)
    first, second = visitors.pool.get("a"), visitors.pool.get("b")
    visitors.pool.get("a")
    visitors.pool.get("c")
    assert visitors.pool.get("a") is first
    assert visitors.pool.get("b") is not second


def test_idle_conversations_expire():
    visitors = Visitors(most=5)
    first = visitors.pool.get("a")
    visitors.now = 11.0
    visitors.pool.get("b")
    assert visitors.pool.get("a") is not first
