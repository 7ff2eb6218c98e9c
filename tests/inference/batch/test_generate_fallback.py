"""Batches answer as single questions do, and bad rows disturb no other."""

import os
import sys

import pytest
import torch

from llava.inference.batch.generate_fallback import default_batch_size, generate_answers
from llava.inference.batch.questions import Question
from llava.inference.engine.image_loader import AHEAD, THREADS, ImageLoader
from llava.inference.session import Sampling

GREEDY = Sampling(max_new_tokens=6)
QUESTIONS = [
    Question(0, "Is there railing?", ("landscape.jpg",)),
    Question(1, "hello"),
    Question(2, "gone", ("none.jpg",)),
    Question(3, "Compare <image> with <image>", ("portrait.png", "square.png")),
    Question(4, " ", ("tiny.png",)),
    Question(5, "What are the  colors?", ("portrait.png",)),
    Question(6, "far", ("../images/tiny.png",)),
    Question(7, "long " * 600),
    Question(8, "broken", ("torn.png",)),
    Question(9, "huge", ("huge.png",)),
    Question(10, "<image>", ()),
    Question(11, "last", ("tiny.png",)),
]
CODES = {
    2: "image_missing",
    4: "question_empty",
    6: "path_outside_folder",
    7: "prompt_too_long",
    8: "image_corrupt",
    9: "image_too_large",
    10: "question_empty",
}


@pytest.fixture(scope="module")
def singly(answer_singly):
    """Text of each good question, answered alone."""
    return answer_singly([question for question in QUESTIONS if question.question_id not in CODES], GREEDY)


@pytest.mark.parametrize("batch_size", [1, 3, 12, 50])
def test_answers_equal_single_ones_and_errors_stay_their_own(session, folder, singly, batch_size):
    answers = list(generate_answers(session, QUESTIONS, folder, GREEDY, batch_size=batch_size))
    assert [answer.question for answer in answers] == QUESTIONS
    assert {answer.question.question_id: answer.error for answer in answers if answer.error} == CODES
    assert {answer.question.question_id: answer.text for answer in answers if not answer.error} == singly
    assert all(answer.text == "" and answer.message for answer in answers if answer.error)


def test_chance_is_the_same_whatever_the_batch(session, folder):
    warm = Sampling(temperature=1.0, max_new_tokens=4, seed=0)
    whole = [answer.text for answer in generate_answers(session, QUESTIONS, folder, warm, batch_size=5)]
    rest = [answer.text for answer in generate_answers(session, QUESTIONS[3:], folder, warm, batch_size=4)]
    assert len(set(whole)) > 2
    assert rest == whole[3:]


def test_images_are_decoded_only_a_little_ahead(session, folder, monkeypatch):
    load, loaded = ImageLoader.load, []
    monkeypatch.setattr(ImageLoader, "load", lambda self, names: loaded.append(names) or load(self, names))
    questions = [Question(index, "what?", ("tiny.png",)) for index in range(60)]
    answers = generate_answers(session, questions, folder, GREEDY, batch_size=2)
    next(answers)
    assert len(loaded) <= 2 + AHEAD * THREADS
    answers.close()


@pytest.mark.skipif(sys.platform != "linux", reason="a forked process keeps the patch")
def test_images_are_decoded_by_as_many_processes_as_are_asked_for(session, folder, singly, monkeypatch, tmp_path):
    load = ImageLoader.load

    def recorded(self, names):
        (tmp_path / str(os.getpid())).touch()
        return load(self, names)

    monkeypatch.setattr(ImageLoader, "load", recorded)
    answers = generate_answers(session, QUESTIONS, folder, GREEDY, batch_size=5, workers=2, threaded_groups=2)
    assert {answer.question.question_id: answer.text for answer in answers if not answer.error} == singly
    assert len([*tmp_path.iterdir()]) == 3  # this process reads the first two
    assert (tmp_path / str(os.getpid())).exists()


@pytest.mark.parametrize("gib, expected", [(80, 32), (24, 18), (16, 2), (8, 1)])
def test_the_default_batch_fits_the_device(monkeypatch, gib, expected):
    properties = type("Properties", (), {"total_memory": gib * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert default_batch_size(torch.device("cuda")) == expected
    assert default_batch_size(torch.device("cpu")) == 8
