"""One seed and one request id give one answer: in chat, through `eval_model`, in batch inference and its fallback."""

import dataclasses
from types import SimpleNamespace

import pytest

from llava.eval import run_llava
from llava.eval.run_llava import eval_model
from llava.image_files.decode import open_image
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.fingerprint import ModelSources
from llava.inference.batch.generate_fallback import generate_answers
from llava.inference.batch.questions import Question
from llava.inference.chat.chat import Chat, answer_one
from llava.inference.session import Sampling, Session

QUESTIONS = [
    Question("a", "Is there railing?", ("landscape.jpg",)),
    Question("b", "Is there railing?", ("landscape.jpg",)),  # another id, so other draws
    Question("c", "hello"),
]
SAMPLING = Sampling(temperature=1.5, top_p=0.95, max_new_tokens=8, seed=3)


@pytest.fixture
def images(folder):
    return [[open_image(folder / name) for name in question.images] for question in QUESTIONS]


def answer_each(session, images, sampling):
    pairs = zip(QUESTIONS, images, strict=True)
    return [answer_one(session, each.text, own, sampling, request_id=each.request_id) for each, own in pairs]


def test_chat_and_batch_inference_draw_the_same(session, folder, images):
    alone = answer_each(session, images, SAMPLING)
    assert alone[0] != alone[1]
    first, ids = QUESTIONS[0], [question.request_id for question in QUESTIONS]
    assert "".join(Chat(session, SAMPLING).reply(first.text, images[0], request_id=first.request_id)) == alone[0]
    prompts = [session.prepare(question.text, own) for question, own in zip(QUESTIONS, images, strict=True)]
    assert session.answer_prompts(prompts, SAMPLING, ids) == alone
    engine = {answer.question: answer.text for answer in answer_batch(session, QUESTIONS, folder, SAMPLING)}
    assert [engine[question] for question in QUESTIONS] == alone
    fallback = generate_answers(session, QUESTIONS, folder, SAMPLING, batch_size=2)
    assert [answer.text for answer in fallback] == alone
    assert answer_each(session, images, dataclasses.replace(SAMPLING, seed=4)) != alone


def test_eval_model_and_chat_draw_the_same(session, folder, images, monkeypatch, capsys):
    """Neither has an id of its own, so the prompt's ids are it."""
    monkeypatch.setattr(Session, "load", lambda *paths, **options: session)
    run_llava._load_session.cache_clear()
    options = {"model_path": "unused", "model_base": None, "conv_mode": None, "sep": ",", "num_beams": 1}
    options |= {"image_file": str(folder / "landscape.jpg"), "query": QUESTIONS[0].text}
    options |= {name: getattr(SAMPLING, name) for name in ("temperature", "top_p", "max_new_tokens", "seed")}
    monkeypatch.setattr(ModelSources, "find", lambda *paths: ModelSources(None, None, None))
    found = eval_model(SimpleNamespace(**options))
    run_llava._load_session.cache_clear()
    text, own = QUESTIONS[0].text, images[0]
    assert found == "".join(Chat(session, SAMPLING).reply(text, own))
    prompt = session.prepare(text, own)
    assert [found] == session.answer_prompts([prompt], SAMPLING)
    assert found == answer_one(session, text, own, SAMPLING, request_id=prompt.input_ids)
