"""Conversations of a web page's visitors: one per browser session, bounded in number and idle time."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from llava.image_files.decode import open_image
from llava.inference.sampling import Sampling
from llava.serve.model_chat import AnswerError, Certainty, ModelChat

logger = logging.getLogger(__name__)

MAX_CONVERSATIONS = 32  # each keeps a KV cache of up to 1 GB for each 7B model
IDLE_SECONDS = 1800.0
MAX_QUESTION_CHARACTERS = 8_000
_FAULT = "the program failed in this answer, and its log has the reason; ask again, or start a new chat"
_THUMBNAIL_PIXELS = 640  # of the longer side


class Upload(NamedTuple):
    """Image file that a visitor sent, and its pixels, upright and in RGB."""

    path: Path
    image: Image.Image


@dataclass
class Answer:
    """Answer of one model, as far as it was streamed.

    Attributes:
        text: so far.
        is_complete: whether it has ended without an error.
        certainty: of a complete answer; None = unknown.
        error: message instead of the rest of the answer.
        in_chat: whether the model remembers the question and this answer.
    """

    text: str = ""
    is_complete: bool = False
    certainty: Certainty | None = None
    error: str | None = None
    in_chat: bool = False


@dataclass
class Turn:
    """A question with the answer of each model.

    Attributes:
        question: text.
        thumbnail: JPEG file of the image that came with it, for display; None without one.
        answers: one for each model.
    """

    question: str
    thumbnail: Path | None
    answers: list[Answer] = field(default_factory=list)


class Conversation:
    """Conversation of one visitor with one model, or with several side by side.

    Between questions it keeps the image as the file that was sent, since decoded it can have half a gigabyte.

    Args:
        chats: with each model.
        folder: for thumbnails and the image, which are removed with the conversation.

    Attributes:
        turns: so far, the current one included.
        lock: held by who asks, since a visitor may ask again before an answer has ended.
    """

    def __init__(self, chats: Sequence[ModelChat], folder: Path) -> None:
        self.turns: list[Turn] = []
        self.lock = threading.Lock()
        self._folder = folder
        self._chats = list(chats)
        self._image: Path | None = None
        self._is_stopped = self._is_closed = False

    def ask(self, question: str, upload: Upload | None, sampling: Sampling) -> Iterator[None]:
        """Ask all models, and yield whenever `turns` has changed.

        A new image starts a new conversation about it. A model that fails (the context is full, no memory) has a
        message instead of its answer, and the others go on.

        Args:
            question: text.
            upload: a new image; None = go on with the image of the conversation.
            sampling: how tokens are chosen.
        """
        thumbnail = None
        if upload is not None:
            self.reset()
            thumbnail = self._keep(upload)
        yield from self._answer(Turn(question, thumbnail), upload and upload.image, sampling)

    def ask_again(self, sampling: Sampling) -> Iterator[None]:
        """Forget the answers to the latest question and ask it again; see `ask`.

        Raises:
            ValueError: if there is no question.
        """
        turn = self.undo()
        if turn is None:
            raise ValueError("there is no question to ask again")
        yield from self._answer(Turn(turn.question, turn.thumbnail), None, sampling)

    def _answer(self, turn: Turn, image: Image.Image | None, sampling: Sampling) -> Iterator[None]:
        turn.answers = [Answer() for _ in self._chats]
        self.turns.append(turn)
        self._is_stopped = False
        yield
        if image is None and self._image is not None and not all(chat.n_turns for chat in self._chats):
            image = open_image(self._image)
        with contextlib.ExitStack() as stack:
            streams = {
                place: stack.enter_context(contextlib.closing(self._stream(place, turn, image, sampling)))
                for place in range(len(self._chats))
            }
            while streams and not (self._is_stopped or self._is_closed):
                pieces = {place: next(streams[place], None) for place in list(streams)}
                for place in [place for place, piece in pieces.items() if piece is None]:
                    del streams[place]
                if any(piece != "" for piece in pieces.values()):
                    yield
        if self._is_closed:
            self._forget_turns()
        yield

    def _stream(self, place: int, turn: Turn, image: Image.Image | None, sampling: Sampling) -> Iterator[str]:
        """Add the pieces of a model's answer to its turn, and yield them."""
        chat, answer = self._chats[place], turn.answers[place]
        before = chat.n_turns
        try:
            with contextlib.closing(chat.reply(turn.question, None if before else image, sampling)) as pieces:
                for piece in pieces:
                    answer.text += piece
                    yield piece
        except Exception as error:  # a fault of the program must not end the page, nor another model's answer
            if not isinstance(error, AnswerError):
                logger.exception("an answer failed")
            answer.error = str(error) if isinstance(error, AnswerError) else _FAULT
            if not chat.n_turns:  # it has forgotten the conversation
                for earlier in self.turns:
                    earlier.answers[place].in_chat = False
        finally:
            if chat.n_turns > before:
                answer.in_chat = answer.is_complete = True
                answer.text, answer.certainty = chat.latest()

    def _keep(self, upload: Upload) -> Path:
        """Copy an uploaded image, whose file is deleted before the conversation may end; return its thumbnail."""
        self._image = self._create_file(upload.path.suffix)
        shutil.copyfile(upload.path, self._image)
        small = upload.image.copy()
        small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        thumbnail = self._create_file(".jpg")
        small.save(thumbnail, "JPEG", quality=85)
        return thumbnail

    def _create_file(self, suffix: str) -> Path:
        descriptor, name = tempfile.mkstemp(suffix, "image-", self._folder)
        os.close(descriptor)
        return Path(name)

    def stop(self) -> None:
        """End the answer that is being streamed; what there is of it stays."""
        self._is_stopped = True

    def undo(self) -> Turn | None:
        """Forget the latest turn and return it; None if there is none."""
        if not self.turns:
            return None
        for place, chat in enumerate(self._chats):
            if self.turns[-1].answers[place].in_chat:
                chat.undo()
        return self.turns.pop()

    def close(self) -> None:
        """End the answer that is being streamed and forget what is shown; another thread may be computing it."""
        self._is_closed = True
        self._forget_turns()

    def _forget_turns(self) -> None:
        for file in [self._image, *(turn.thumbnail for turn in self.turns)]:
            if file is not None:
                file.unlink(missing_ok=True)
        self._image, self.turns = None, []

    def reset(self) -> None:
        """Forget the conversation and its image."""
        self._forget_turns()
        for chat in self._chats:
            chat.reset()


class Conversations:
    """Conversations by browser session; the longest idle one makes room for a new one.

    Args:
        create: makes a conversation.
        most: number of conversations.
        idle_seconds: after which a conversation expires.
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
            for key in list(self._found)[: max(0, len(self._found) + 1 - self._most)]:
                self._found.pop(key)[1].close()
            self._found[session_id] = now, conversation or self._create()
            return self._found[session_id][1]

    def find(self, session_id: str) -> Conversation | None:
        """Return the conversation of a browser session if it has one, which does not count as use."""
        with self._lock:
            return self._found.get(session_id, (0.0, None))[1]

    def drop_expired(self) -> None:
        """Drop the conversations that nobody has used for too long."""
        now = self._clock()
        with self._lock:
            for key in [key for key, (used, _) in self._found.items() if now - used > self._idle_seconds]:
                self._found.pop(key)[1].close()

    def drop(self, session_id: str) -> None:
        """Forget a browser session, whose page was closed; an answer that is being streamed ends."""
        with self._lock:
            _, conversation = self._found.pop(session_id, (0.0, None))
        if conversation is not None:
            conversation.close()
