"""`LocalChat`: a visitor's conversation with a model that is loaded here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from PIL import Image

from llava.inference.chat.chat import Chat
from llava.inference.loaded_model import latest_reply
from llava.inference.sampling import Sampling
from llava.inference.session import Session
from llava.serve.model_chat import AnswerError, Certainty

OUT_OF_MEMORY = "out of memory; the model has forgotten this chat: ask again, or start a new one"


class LocalChat:
    """Conversation with a loaded model, whose KV cache is kept from turn to turn; see `ModelChat`.

    Args:
        session: the model.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._chat = Chat(session, with_scores=True)

    @property
    def n_turns(self) -> int:
        """Questions that the model remembers."""
        return len(self._chat.turns)

    def reply(self, question: str, image: Image.Image | None, sampling: Sampling) -> Iterator[str]:
        """Ask a question, and return an iterator over the pieces of its answer; see `ModelChat.reply`."""
        self._chat.sampling = sampling
        try:
            with contextlib.closing(self._chat.reply(question, [] if image is None else [image])) as pieces:
                yield from pieces
            return
        except ValueError as error:
            raise AnswerError(f"{error}; start a new chat") from error
        except (torch.OutOfMemoryError, MemoryError):
            pass  # the exception holds tensors, so memory is freed after it
        self._chat = Chat(self._session, with_scores=True)  # with an empty KV cache
        torch.cuda.empty_cache()
        raise AnswerError(OUT_OF_MEMORY)

    def latest(self) -> tuple[str, Certainty]:
        """Return the latest answer, and how sure the model is of it without temperature."""
        reply = latest_reply(self._chat)
        ends = self._chat.scores[0].runner_up in self._session.stop_ids
        runner_up = "" if ends else reply.runner_up  # not the name of a token
        return reply.text, Certainty(reply.probability, runner_up, reply.runner_up_probability)

    def undo(self) -> None:
        """Forget the latest turn."""
        self._chat.undo()

    def reset(self) -> None:
        """Forget the conversation; its KV cache is used again."""
        self._chat.reset()
