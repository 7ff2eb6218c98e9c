"""`Endpoint`: a server with an OpenAI-compatible API, and a visitor's conversation with one of its models."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import math
import queue
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, NamedTuple

import openai
from PIL import Image

from llava.files.terminal_text import describe_error
from llava.inference.sampling import Sampling
from llava.serve.model_chat import AnswerError, Certainty

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
IMAGE_SIDE = 2_048  # longest side of an image that is sent, in pixels; OpenAI's own limit
_JPEG_QUALITY = 95
_POLL_SECONDS = 0.02  # after which an answer that waits lets another model's go on
_SILENCE_SECONDS = 600.0  # without a byte from the server
_CONNECT_SECONDS = 10.0
_LIST_SECONDS = 30.0  # for the list of models
_MODELS_NAMED = 10  # in a message
_MESSAGE_CHARACTERS = 300  # of a server's error message


class Piece(NamedTuple):
    """What a server streams of an answer: text, and the log-probabilities of its tokens if it gives them."""

    text: str
    tokens: Sequence[Any]


class Endpoint:
    """A server with an OpenAI-compatible API.

    Args:
        url: of the API; one without a path is completed by `/v1`.
        key: sent with each request; None = none.

    Attributes:
        gives_logprobs: False once the server has refused a request for them.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url, self.gives_logprobs = complete_url(url), True
        self._client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=key or "none",
            max_retries=0,
            timeout=openai.Timeout(_SILENCE_SECONDS, connect=_CONNECT_SECONDS),
        )
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="endpoint", daemon=True).start()

    def list_models(self) -> list[str]:
        """Return the names of the models that the server lists; empty if it has no list.

        Raises:
            OSError: if the server can't be reached, refuses the key or reports an error.
        """

        async def read() -> list[str]:
            return [model.id async for model in self._client.models.list(timeout=_LIST_SECONDS)]

        try:
            return asyncio.run_coroutine_threadsafe(read(), self.loop).result()
        except openai.NotFoundError:
            return []
        except openai.OpenAIError as error:
            raise OSError(f"--endpoint {self.url}: {describe_failure(error)}") from error
        except (AttributeError, ValueError) as error:  # an answer of another kind, a web page say
            raise OSError(
                f"--endpoint {self.url}: no OpenAI-compatible API answers there; check the address"
            ) from error

    async def stream(self, model: str, messages: Sequence[dict[str, Any]], sampling: Sampling) -> AsyncIterator[Piece]:
        """Ask a model, and yield the pieces of its answer; cancelling closes the connection.

        Raises:
            openai.OpenAIError: if there is no answer.
            AnswerError: if the stream ends before the answer does.
        """
        fields = {"model": model, "messages": list(messages), "stream": True}
        fields |= {"temperature": sampling.temperature, "max_tokens": sampling.max_new_tokens}
        if sampling.seed is not None:
            fields["seed"] = sampling.seed
        is_ended = False
        async with await self._open(fields) as chunks:
            async for chunk in chunks:
                for choice in chunk.choices:
                    is_ended = is_ended or choice.finish_reason is not None
                    yield Piece(choice.delta.content or "", (choice.logprobs and choice.logprobs.content) or ())
        if not is_ended:
            raise AnswerError("the connection to the model's server broke off in mid-answer; ask again")

    async def _open(self, fields: dict[str, Any]) -> Any:
        """Start a streamed chat completion; a server that refuses log-probabilities is asked without them."""
        create = self._client.chat.completions.create
        if self.gives_logprobs:
            try:
                return await create(**fields, logprobs=True, top_logprobs=2)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                refused = error
            stream = await create(**fields)  # the reason may be another one, which is raised then
            self.gives_logprobs = False
            logger.warning("the server refuses log-probabilities, so none are shown: %s", describe_failure(refused))
            return stream
        return await create(**fields)


class EndpointChat:
    """Conversation with a served model, which gets all of it with each question; see `ModelChat`.

    Args:
        endpoint: the server.
        model: its name there.
    """

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self._endpoint, self._model = endpoint, model
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._messages: list[dict[str, Any]] = []
        self._latest: tuple[str, Certainty | None] = "", None

    @property
    def n_turns(self) -> int:
        """Questions that are sent along with the next one."""
        return len(self._messages) // 2

    def reply(self, question: str, image: Image.Image | None, sampling: Sampling) -> Iterator[str]:
        """Ask a question, and return an iterator over the pieces of its answer; see `ModelChat.reply`."""
        asked = user_message(question, image)
        arrived: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        reading = self._read([*self._messages, asked], sampling, arrived)
        task = asyncio.run_coroutine_threadsafe(reading, self._endpoint.loop)
        pieces: list[Piece] = []
        try:
            while (piece := _take(arrived)) is not None:
                if piece.text or piece.tokens:
                    pieces.append(piece)
                yield piece.text
            task.result()
            self._remember(asked, pieces)
        except GeneratorExit:  # stopped
            if any(piece.text for piece in pieces):
                self._remember(asked, pieces)
            raise
        finally:
            task.cancel()

    async def _read(self, messages: list[dict[str, Any]], sampling: Sampling, arrived: queue.SimpleQueue) -> None:
        """Hand on what arrives, and None at the end.

        Raises:
            AnswerError: if there is no answer, or the connection breaks.
        """
        try:
            async for piece in self._endpoint.stream(self._model, messages, sampling):
                arrived.put(piece)
        except openai.OpenAIError as error:
            logger.warning("%s: %s", self._endpoint.url, describe_error(error))
            raise AnswerError(describe_failure(error, self._model)) from error
        except ValueError as error:  # no JSON
            raise AnswerError("the model's server does not stream what an OpenAI-compatible API does") from error
        finally:
            arrived.put(None)

    def _remember(self, asked: dict[str, Any], pieces: Sequence[Piece]) -> None:
        text = "".join(piece.text for piece in pieces).strip()
        self._messages = [*self._messages, asked, {"role": "assistant", "content": text}]
        self._latest = text, certainty_of([token for piece in pieces for token in piece.tokens])

    def latest(self) -> tuple[str, Certainty | None]:
        """Return the latest answer, and how sure the model is of it, if the server gives log-probabilities."""
        return self._latest

    def undo(self) -> None:
        """Forget the latest turn."""
        self._messages = self._messages[:-2]


def _take(arrived: queue.SimpleQueue[Piece | None]) -> Piece | None:
    """Return the next piece, an empty one if none arrives soon, or None at the end."""
    try:
        return arrived.get(timeout=_POLL_SECONDS)
    except queue.Empty:
        return Piece("", ())


def choose_models(endpoint: Endpoint, wanted: Sequence[str]) -> list[str]:
    """Return the names of the models to talk to: the wanted ones, else the only one that the server lists.

    Raises:
        OSError: as `Endpoint.list_models`.
        ValueError: if none is wanted, and the server lists none or several.
    """
    listed = endpoint.list_models()
    shown = ", ".join(listed[:_MODELS_NAMED]) + (", …" if len(listed) > _MODELS_NAMED else "")
    if not wanted:
        if len(listed) != 1:
            found = f"serves {len(listed)} models ({shown})" if listed else "does not list its models"
            raise ValueError(f"--endpoint {endpoint.url} {found}; name one with --endpoint-model")
        return listed
    for name in wanted:
        if listed and name not in listed:
            logger.warning(
                "%s does not list the model %s, only %s; it is asked for it anyway", endpoint.url, name, shown
            )
    return list(wanted)


def complete_url(url: str) -> str:
    """Return the address of an API; `http://host:8000` becomes `http://host:8000/v1`."""
    url = url.rstrip("/")
    return url if "/" in url.partition("://")[2] else f"{url}/v1"


def user_message(question: str, image: Image.Image | None) -> dict[str, Any]:
    """Return the message of a question, with its image as a data URL of a JPEG."""
    if image is None:
        return {"role": "user", "content": question}
    small = image.copy()
    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    shown = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [shown, {"type": "text", "text": question}]}


def certainty_of(tokens: Sequence[Any]) -> Certainty | None:
    """Return how sure a model is of an answer, from the API's log-probabilities; None without any."""
    if not tokens:
        return None
    first = tokens[0]
    others = [other for other in first.top_logprobs or () if other.token != first.token]
    best = max(others, key=lambda other: other.logprob, default=None)
    probability = math.exp(min(0.0, sum(token.logprob for token in tokens)))
    return Certainty(probability, *((best.token, math.exp(best.logprob)) if best else ("", 0.0)))


def describe_failure(error: openai.OpenAIError, model: str | None = None) -> str:
    """Return a sentence about a request that failed, without the server's address."""
    match error:
        case openai.APITimeoutError():
            return "the model's server does not answer; is it running?"
        case openai.APIConnectionError():
            reason = (error.__cause__ and str(error.__cause__)) or "connection error"
            return f"the model's server can't be reached, or broke off the connection ({reason})"
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            return f"the model's server refuses the key (HTTP {error.status_code}); set {KEY_VARIABLE} to a valid one"
        case openai.NotFoundError():
            return f"the model's server does not know the model {model} ({_message_of(error)})"
        case openai.APIStatusError():
            return f"the model's server reports HTTP {error.status_code} ({_message_of(error)})"
    return f"the model's server reports an error ({_message_of(error)})"


def _message_of(error: openai.OpenAIError) -> str:
    """Return what a server says about its error, shortened."""
    body = getattr(error, "body", None)
    found = body.get("message") or body.get("detail") if isinstance(body, dict) else None
    text = " ".join(str(found or error).split())
    return text if len(text) <= _MESSAGE_CHARACTERS else f"{text[:_MESSAGE_CHARACTERS]}…"
