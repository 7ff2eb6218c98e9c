"""Fixtures for questions to a model."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava.inference.session import Session


@pytest.fixture(scope="session")
def session(goldens: Path) -> Session:
    """Return a tiny LLaVA with random weights, fp32 on the CPU; no test changes it."""
    torch.set_num_threads(1)  # more only wait for each other at this size
    return Session.load(str(goldens / "llava-v1.5-golden"), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def swap_words() -> Callable[[Session, int, int], Session]:
    """Return the function (session, id, other id) -> session that says the one where the first says the other."""

    def swap(session: Session, token: int, other: int) -> Session:
        model = copy.deepcopy(session.model)
        with torch.no_grad():
            model.lm_head.weight[[token, other]] = model.lm_head.weight[[other, token]]
        return dataclasses.replace(session, model=model)

    return swap
