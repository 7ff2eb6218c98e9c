"""Conversations of a web page's visitors: one per browser session, bounded in number and idle time."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from llava.inference.chat.chat import Chat
from llava.inference.loaded_model import Reply, latest_reply
from llava.inference.sampler import Sampling
from llava.inference.session import Session

MAX_CONVERSATIONS = 32  # each keeps a KV cache of up to 1 GB for each 7B model
IDLE_SECONDS = 1800.0
MAX_QUESTION_CHARACTERS = 8_000
_THUMBNAIL_PIXELS = 640  # of the longer side


@dataclass
class Turn:
    """A question with the answer of each model.

    Attributes:
        question: text.
        image: new image of this turn; None without one.
        thumbnail: JPEG file of it, for display.
        texts: the answers, as far as they were streamed.
        replies: the complete answers; None while they are streamed, and after an error.
        errors: messages instead of an answer.
        in_chat: whether the model's chat holds this turn.
    """

    question: str
    image: Image.Image | None
    thumbnail: Path | None
    texts: list[str]
    replies: list[Reply | None]
    errors: list[str | None]
    in_chat: list[bool]


class Conversation:
    """Conversation of one visitor with one model, or with several side by side.

    Args:
        sessions: the models.
        folder: for thumbnails, which are removed with the conversation.

    Attributes:
        turns: so far, the current one included.
    """

    def __init__(self, sessions: Sequence[Session], folder: Path) -> None:
        self.turns: list[Turn] = []
        self._folder = folder
        self._chats = [Chat(session, with_scores=True) for session in sessions]
        self._image: Image.Image | None = None
        self._is_stopped = False

    def ask(self, question: str, image: Image.Image | None, sampling: Sampling) -> Iterator[None]:
        """Ask all models, and yield whenever `turns` has changed.

        A new image starts a new conversation about it. A model that fails (the context is full, no memory) has a
        message instead of its answer, and the others go on.

        Args:
            question: text.
            image: upright and in RGB; None = go on with the image of the conversation.
            sampling: how tokens are chosen.
        """
        if image is not None:
            self.reset()
            self._image = image
        n_models = len(self._chats)
        thumbnail = None if image is None else self._write_thumbnail(image)
        turn = Turn(
            question, image, thumbnail, [""] * n_models, [None] * n_models, [None] * n_models, [False] * n_models
        )
        self.turns.append(turn)
        self._is_stopped = False
        yield
        with contextlib.ExitStack() as stack:
            streams = {
                place: stack.enter_context(contextlib.closing(self._stream(chat, question, sampling, turn, place)))
                for place, chat in enumerate(self._chats)
            }
            while streams and not self._is_stopped:
                for place in list(streams):
                    if next(streams[place], None) is None:
                        del streams[place]
                yield
        yield

    def _stream(self, chat: Chat, question: str, sampling: Sampling, turn: Turn, place: int) -> Iterator[str]:
        """Add the pieces of a model's answer to its turn, and yield them."""
        before, chat.sampling = len(chat.turns), sampling
        images = [self._image] if self._image is not None and not chat.turns else []
        try:
            with contextlib.closing(chat.reply(question, images)) as pieces:
                for piece in pieces:
                    turn.texts[place] += piece
                    yield piece
        except ValueError as error:
            turn.errors[place] = f"{error}; start a new chat"
        except torch.OutOfMemoryError:
            chat.reset()
            torch.cuda.empty_cache()
            turn.errors[place] = "out of memory; the model has forgotten this chat: ask again, or start a new one"
            for earlier in self.turns:
                earlier.in_chat[place] = False
        finally:
            if len(chat.turns) > before:
                reply = latest_reply(chat)
                turn.in_chat[place], turn.replies[place], turn.texts[place] = True, reply, reply.text

    def _write_thumbnail(self, image: Image.Image) -> Path:
        small = image.copy()
        small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        descriptor, name = tempfile.mkstemp(".jpg", "image-", self._folder)
        with os.fdopen(descriptor, "wb") as stream:
            small.save(stream, "JPEG", quality=85)
        return Path(name)

    def stop(self) -> None:
        """End the answer that is being streamed; what there is of it stays."""
        self._is_stopped = True

    def undo(self) -> Turn | None:
        """Forget the latest turn and return it; None if there is none."""
        if not self.turns:
            return None
        for place, chat in enumerate(self._chats):
            if self.turns[-1].in_chat[place]:
                chat.undo()
        return self.turns.pop()

    def close(self) -> None:
        """End the answer that is being streamed and forget what is shown; another thread may be computing it."""
        self.stop()
        self._forget_turns()

    def _forget_turns(self) -> None:
        for turn in self.turns:
            if turn.thumbnail is not None:
                turn.thumbnail.unlink(missing_ok=True)
        self.turns = []

    def reset(self) -> None:
        """Forget the conversation and its image."""
        self._forget_turns()
        self._image = None
        for chat in self._chats:
            chat.reset()


class Conversations:
    """Conversations by browser session. The longest idle one makes room for a new one; the expired ones are dropped.

    Args:
        create: makes a conversation.
        most: number of conversations.
        idle_seconds: after which a conversation is dropped when another one is looked up.
        clock: in seconds.
    """

    def __init__(
        self,
        create: Callable[[], Conversation],
        most: int = MAX_CONVERSATIONS,
        idle_seconds: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._create, self._most, self._idle_seconds, self._clock = create, most, idle_seconds, clock
        self._found: dict[str, tuple[float, Conversation]] = {}  # in the order of use
        self._lock = threading.Lock()

    def get(self, session_id: str) -> Conversation:
        """Return the conversation of a browser session, a new one if it has none."""
        now = self._clock()
        with self._lock:
            _, conversation = self._found.pop(session_id, (now, None))
            expired = [key for key, (used, _) in self._found.items() if now - used > self._idle_seconds]
            surplus = list(self._found)[: max(0, len(self._found) - len(expired) + 1 - self._most)]
            for key in {*expired, *surplus}:
                self._found.pop(key)[1].close()
            self._found[session_id] = now, conversation or self._create()
            return self._found[session_id][1]

    def drop(self, session_id: str) -> None:
        """Forget a browser session, whose page was closed; an answer that is being streamed ends."""
        with self._lock:
            _, conversation = self._found.pop(session_id, (0.0, None))
        if conversation is not None:
            conversation.close()
