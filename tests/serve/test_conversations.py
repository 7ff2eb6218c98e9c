"""Conversations of a web page's visitors: those of the chat, apart from each other, bounded in number and time."""

import gc
import weakref

import pytest
import torch
from PIL import Image

from llava.image_files.decode import open_image
from llava.inference.chat.chat import Chat
from llava.inference.sampling import Sampling
from llava.inference.session import Session
from llava.serve.conversations import Conversation, Conversations, Upload
from llava.serve.local_chat import LocalChat

GREEDY = Sampling(max_new_tokens=6)
QUESTIONS = ("Is there railing?", "and now?")


@pytest.fixture(scope="module")
def session(goldens):
    return Session.load(str(goldens / "llava-v1.5-golden"), device="cpu", dtype="float32")


def upload_of(path):
    return Upload(path, open_image(path))


@pytest.fixture(scope="module")
def photo(goldens):
    return upload_of(goldens / "images" / "landscape.jpg")


def converse(folder, *sessions):
    return Conversation([LocalChat(session) for session in sessions], folder)


def ask(conversation, question, upload=None, sampling=GREEDY):
    for _ in conversation.ask(question, upload, sampling):
        pass
    return conversation.turns[-1]


def ask_again(conversation):
    for _ in conversation.ask_again(GREEDY):
        pass
    return conversation.turns[-1]


def texts(turn):
    return [answer.text for answer in turn.answers]


@pytest.mark.parametrize("n_models", [1, 2])
def test_every_model_answers_as_in_its_own_chat(session, photo, tmp_path, n_models):
    expected = Chat(session, GREEDY)
    conversation = converse(tmp_path, *[session] * n_models)
    for number, question in enumerate(QUESTIONS):
        text = "".join(expected.reply(question, [photo.image] if number == 0 else []))
        turn = ask(conversation, question, photo if number == 0 else None)
        assert texts(turn) == [text] * n_models
        assert all(answer.is_complete and 0 < answer.certainty.probability < 1 for answer in turn.answers)


def test_answers_are_streamed(session, photo, tmp_path):
    conversation = converse(tmp_path, session)
    states = [texts(conversation.turns[-1])[0] for _ in conversation.ask(QUESTIONS[0], photo, GREEDY)]
    assert states[0] == ""
    assert len(set(states)) > 3
    assert conversation.turns[-1].answers[0].is_complete


def test_a_stopped_answer_is_kept_as_far_as_it_came(session, photo, tmp_path):
    conversation = converse(tmp_path, session, session)
    for _ in conversation.ask(QUESTIONS[0], photo, Sampling(max_new_tokens=100)):
        if len(texts(conversation.turns[-1])[1]) > 5:
            conversation.stop()
    turn = conversation.turns[-1]
    assert turn.answers[0].is_complete and len(turn.answers[0].text) < 100
    whole = ask(converse(tmp_path, session), QUESTIONS[0], photo, Sampling(max_new_tokens=100))
    assert all(texts(whole)[0].startswith(text) for text in texts(turn))
    assert texts(ask(conversation, QUESTIONS[1]))[1]  # it goes on


def test_an_undone_question_gets_the_same_answer_again(session, photo, tmp_path):
    conversation = converse(tmp_path, session)
    ask(conversation, QUESTIONS[0], photo)
    expected = texts(ask(conversation, QUESTIONS[1]))
    assert texts(ask_again(conversation)) == expected
    conversation.undo()
    expected = texts(conversation.turns[-1])
    again = ask_again(conversation)  # the image is read again
    assert texts(again) == expected and again.thumbnail.is_file()
    conversation.undo()
    assert conversation.undo() is None
    with pytest.raises(ValueError, match="there is no question to ask again"):
        ask_again(conversation)


def test_a_new_image_starts_a_new_conversation(session, photo, goldens, tmp_path):
    conversation = converse(tmp_path, session)
    ask(conversation, QUESTIONS[1], photo)
    other = upload_of(goldens / "images" / "portrait.png")
    turn = ask(conversation, QUESTIONS[0], other)
    assert conversation.turns == [turn]
    assert texts(turn) == texts(ask(converse(tmp_path, session), QUESTIONS[0], other))


def test_thumbnails_go_with_the_conversation(session, photo, tmp_path):
    conversation = converse(tmp_path, session)
    turn = ask(conversation, QUESTIONS[0], photo)
    assert max(open_image(turn.thumbnail).size) <= 640
    conversation.reset()
    assert list(tmp_path.iterdir()) == []


def test_a_full_context_is_a_message_and_the_chat_lives(session, photo, tmp_path):
    conversation = converse(tmp_path, session)
    ask(conversation, QUESTIONS[0], photo)
    turn = ask(conversation, "word " * 600)
    assert "start a new chat" in turn.answers[0].error and not turn.answers[0].is_complete
    conversation.undo()
    assert texts(ask(conversation, QUESTIONS[1]))[0]


def test_without_memory_the_chat_gets_a_message_and_begins_again(session, photo, tmp_path, monkeypatch):
    conversation = converse(tmp_path, session)
    ask(conversation, QUESTIONS[0], photo)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    cache = weakref.ref(conversation._chats[0]._chat._cache)
    with monkeypatch.context() as patch:
        patch.setattr(Chat, "_generate", fail)
        assert "out of memory" in ask(conversation, QUESTIONS[1]).answers[0].error
    gc.collect()
    assert cache() is None  # its memory is free
    again = ask(conversation, QUESTIONS[0])
    assert texts(again) == texts(ask(converse(tmp_path, session), QUESTIONS[0], photo))
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


def test_a_dropped_conversation_ends_its_answer_and_shows_nothing(session, photo, tmp_path):
    pool = Conversations(lambda: converse(tmp_path, session))
    conversation, steps = pool.get("a"), 0
    for _ in conversation.ask(QUESTIONS[0], photo, Sampling(max_new_tokens=100)):
        steps += 1
        if steps == 3:
            pool.drop("a")
    assert steps < 10 and conversation.turns == [] and list(tmp_path.iterdir()) == []
    assert pool.get("a") is not conversation


def test_a_conversation_that_was_dropped_before_its_question_is_not_answered(session, photo, tmp_path):
    conversation = converse(tmp_path, session)
    conversation.close()
    assert texts(ask_all(conversation, photo)) == [""]
    assert conversation.turns == [] and list(tmp_path.iterdir()) == []


def ask_all(conversation, photo):
    """Ask, and return the turn, though the conversation forgets it."""
    states = conversation.ask(QUESTIONS[0], photo, GREEDY)
    next(states)
    turn = conversation.turns[-1]
    list(states)
    return turn


def test_between_questions_an_image_is_a_file(session, photo, tmp_path):
    conversation = converse(tmp_path, session)
    ask(conversation, QUESTIONS[0], photo)
    held = [value for value in gc.get_objects() if isinstance(value, Image.Image) and value is not photo.image]
    assert not any(value.size == photo.image.size for value in held)
    assert photo.path.read_bytes() in [path.read_bytes() for path in tmp_path.iterdir()]


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
    visitors.pool.drop_expired()
    assert visitors.pool.find("a") is None and visitors.pool.find("b") is visitors.made[1]
    assert visitors.pool.get("a") is not first
