"""`ModelChat`: what a visitor's conversation needs of a model, whether it is loaded here or served elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from llava.inference.sampling import Sampling


class AnswerError(Exception):
    """A model gave no answer, or broke off in it; the message is for the visitor."""


@dataclass(frozen=True)
class Certainty:
    """How sure a model is of its answer.

    Attributes:
        probability: of the whole answer.
        runner_up: the likeliest other first token, as text; empty if it ends the answer.
        runner_up_probability: of that token; 0 = unknown.
    """

    probability: float
    runner_up: str
    runner_up_probability: float


class ModelChat(Protocol):
    """Conversation with one model about one image."""

    @property
    def n_turns(self) -> int:
        """Return the number of questions that the model remembers."""

    def reply(self, question: str, image: Image.Image | None, sampling: Sampling) -> Iterator[str]:
        """Ask a question, and return an iterator over the pieces of its answer; "" where nothing has arrived yet.

        The turn is remembered when the iterator is used up, or closed after text has arrived.

        Args:
            question: text.
            image: shown with this question; None = none, or the one shown before.
            sampling: how tokens are chosen.

        Raises:
            AnswerError: if there is no answer; the model may have forgotten the conversation, see `n_turns`.
        """

    def latest(self) -> tuple[str, Certainty | None]:
        """Return the latest answer, and how sure the model is of it; None if that is unknown."""

    def undo(self) -> None:
        """Forget the latest turn."""

    def reset(self) -> None:
        """Forget the conversation."""
