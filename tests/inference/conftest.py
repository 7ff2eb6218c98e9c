"""Fixtures for questions to a model."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.image_files.decode import open_image
from llava.inference.batch.questions import Question
from llava.inference.prompts import next_turn_ids
from llava.inference.session import Sampling, Session


@pytest.fixture(scope="session")
def session(goldens: Path) -> Session:
    """Return a tiny LLaVA with random weights, fp32 on the CPU; no test changes it."""
    torch.set_num_threads(1)  # more only wait for each other at this size
    return Session.load(str(goldens / "llava-v1.5-golden"), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def folder(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of images, of which torn.png is damaged and huge.png has more pixels than are read."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("landscape.jpg", "portrait.png", "square.png", "tiny.png"):
        (folder / name).write_bytes((goldens / "images" / name).read_bytes())
    (folder / "torn.png").write_bytes((folder / "portrait.png").read_bytes()[:200])
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    return folder


@pytest.fixture(scope="session")
def answer_singly(session: Session, folder: Path) -> Callable[[Sequence[Question], Sampling], dict[int | str, str]]:
    """Return the function (questions, sampling) -> answers by id, each question answered alone."""

    def answer(questions: Sequence[Question], sampling: Sampling) -> dict[int | str, str]:
        texts = {}
        for question in questions:
            images = [open_image(folder / name) for name in question.images]
            [texts[question.question_id]] = session.answer_prompts([session.prepare(question.text, images)], sampling)
        return texts

    return answer


@pytest.fixture(scope="session")
def swap_words() -> Callable[[Session, int, int], Session]:
    """Return the function (session, id, other id) -> session that says the one where the first says the other."""

    def swap(session: Session, token: int, other: int) -> Session:
        model = copy.deepcopy(session.model)
        with torch.no_grad():
            model.lm_head.weight[[token, other]] = model.lm_head.weight[[other, token]]
        return dataclasses.replace(session, model=model)

    return swap


@pytest.fixture(scope="session")
def turn_ids() -> Callable[..., list[int]]:
    """Return the function (session, question, number of images, is_first=) -> ids of a turn of a dialogue."""

    def ids(session: Session, question: str, n_images: int, *, is_first: bool) -> list[int]:
        if is_first:
            return session.prompt_ids(question, n_images)
        return next_turn_ids(question, n_images, session.template, session.tokenizer)

    return ids
