"""Chat with a kept KV cache: each turn computes only its new tokens, and the answer is streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.inference.chat.kv_cache import ChatKVCache
from llava.inference.detokenizer import AnswerStream
from llava.inference.engine.device_to_host import HostCopy
from llava.inference.prompts import ending_ids, next_turn_ids
from llava.inference.sampler import Sampling, TokenScore, draw_key, score_tokens, select_tokens
from llava.inference.session import Prompt, Session


class Chat:
    """Conversation with a model.

    Args:
        session: model and template.
        sampling: how tokens are chosen; None = greedy.
        cache: empty KV cache; None = the fastest that the model allows.
        with_scores: also note the log-probabilities of each token, in `scores`.

    Attributes:
        turns: question and clean answer of each turn.
        scores: of each token of the latest answer; empty unless requested.
        ids: the whole conversation as the model reads it, answers as generated, `IMAGE_TOKEN_INDEX` per image.
        computed_positions: positions that the model computed for the latest turn, in tokens and image patches.
        is_pipelined: launch the next decode step before the token just chosen has reached the CPU; if the answer ends
            with that token, the step's result is dropped. True on CUDA.

    Raises:
        ValueError: if beam search is requested, which can't be streamed.

    Example:
        >>> chat = Chat(session)
        >>> for piece in chat.reply("What is this?", [image]):
        ...     print(piece, end="", flush=True)
    """

    def __init__(
        self,
        session: Session,
        sampling: Sampling | None = None,
        cache: ChatKVCache | None = None,
        *,
        with_scores: bool = False,
    ) -> None:
        self.session = session
        self.with_scores = with_scores
        self.sampling = sampling or Sampling(max_new_tokens=512)
        if self.sampling.num_beams != 1:
            raise ValueError(f"num_beams is {self.sampling.num_beams}, but a chat streams its answers; use 1")
        self._cache = session.kv_caches.create() if cache is None else cache
        self.is_pipelined = session.model.device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, its images included."""
        self.turns: list[tuple[str, str]] = []
        self.ids: list[int] = []
        self.scores: list[TokenScore] = []
        self.computed_positions = 0
        self._cached = 0  # positions of the KV cache that belong to the conversation
        self._pending = Prompt([], [])  # the end of `ids`, which is not in the KV cache yet
        self._before: list[tuple[list[int], int, Prompt]] = []  # ids, cached and pending before each turn

    def undo(self) -> None:
        """Forget the latest turn; its positions stay in the KV cache until others take their place.

        Raises:
            ValueError: if there is none.
        """
        if not self.turns:
            raise ValueError("the conversation has no turn to undo")
        self.turns, self.scores = self.turns[:-1], []
        self.ids, self._cached, self._pending = self._before.pop()

    def reply(self, question: str, images: Sequence[Image.Image] = (), *, request_id: Any = None) -> Iterator[str]:
        """Ask a question, and return an iterator over the pieces of its answer.

        The turn is recorded when the iterator is used up or closed; the tokens generated until then are its answer. A
        turn closed before its first token is not recorded.

        Args:
            question: text; its `<image>` marks say where the images go, without any they go first.
            images: new images of this turn.
            request_id: JSON value that with the seed decides the draws; None = the conversation's ids.

        Raises:
            PromptError: if the question is empty, marks another number of images, or fills the context.
            ValueError: if there are images and the model has no vision tower.
        """
        turn = Prompt(self._turn_ids(question, len(images)), self.session.pixel_values(images))
        prompt = Prompt(self._pending.input_ids + turn.input_ids, self._pending.pixel_values + turn.pixel_values)
        length = self._cached + self.session.spliced_length(prompt)
        limit = self.session.answer_limit(length, self.sampling.max_new_tokens)
        request_id = [*self.ids, *turn.input_ids] if request_id is None else request_id
        return self._stream(question, turn, prompt, self._generate(prompt, limit, request_id))

    def _turn_ids(self, question: str, n_images: int) -> list[int]:
        if not self.turns:
            return self.session.prompt_ids(question, n_images)
        session = self.session
        use_im_start_end = session.model.config.mm_use_im_start_end
        return next_turn_ids(question, n_images, session.template, session.tokenizer, use_im_start_end=use_im_start_end)

    def _stream(self, question: str, turn: Prompt, prompt: Prompt, tokens: Iterator[int]) -> Iterator[str]:
        """Yield text from tokens until the answer ends, then record the turn."""
        answer = AnswerStream(self.session.tokenizer, self.session.template.stop_text)
        stop_ids, stops_on_text = self.session.stop_ids, self.session.stops_on_text
        is_ended, self.computed_positions, self.scores = False, 0, []
        try:
            for token in tokens:
                piece = answer.push(token)
                is_ended = token in stop_ids or (stops_on_text and answer.has_stop_text)
                if piece:
                    yield piece
                if is_ended:
                    break
            if rest := answer.finish():
                yield rest
        finally:
            if answer.ids:
                computed = self.session.spliced_length(prompt) + len(answer.ids) - 1  # all but the last token
                self._record_turn(question, turn, answer, computed, is_ended)

    @torch.no_grad()
    def _generate(self, prompt: Prompt, n_tokens: int, request_id: Any) -> Iterator[int]:
        """Yield at most `n_tokens` of an answer.

        Args:
            prompt: the tokens and images that are not in the KV cache yet.
            n_tokens: longest answer.
            request_id: as in `draw_key`.
        """
        cache, model, sampling = self._cache, self.session.model, self.sampling.seeded()

        def choose(logits: Tensor, step: int) -> list[Tensor]:
            keys = None if sampling.temperature == 0 else [draw_key(sampling.seed, request_id, step)]
            token = select_tokens(logits, sampling, keys)
            return [token, *score_tokens(logits, token)] if self.with_scores else [token]

        cache.truncate(self._cached)
        input_ids = torch.tensor([prompt.input_ids], device=model.device)  # (1, T)
        embeds = model.splice(input_ids, prompt.pixel_values).inputs_embeds[0]  # (S, D)
        chosen = choose(cache.prefill(embeds, room=n_tokens), 0)  # (1,) each
        for step in range(1, n_tokens + 1):
            is_last = step == n_tokens
            copy = HostCopy(chosen)
            if self.is_pipelined and not is_last:
                chosen = choose(cache.decode(chosen[0]), step)
            [token], *score = copy.wait()
            if score:
                self.scores.append(TokenScore(*(value for [value] in score)))
            yield token
            if not self.is_pipelined and not is_last:
                chosen = choose(cache.decode(chosen[0]), step)

    def _record_turn(self, question: str, turn: Prompt, answer: AnswerStream, computed: int, is_ended: bool) -> None:
        end = [] if is_ended else ending_ids(self.session.template, self.session.tokenizer)
        turns, ids = [*self.turns, (question, answer.text)], [*self.ids, *turn.input_ids, *answer.ids, *end]
        pending, cached = Prompt(answer.ids[-1:] + end, []), self._cached + computed
        before = [*self._before, (self.ids, self._cached, self._pending)]
        # One statement, so that an interruption hardly ever leaves the turn half recorded.
        self.turns, self.ids, self._pending, self._cached, self._before = turns, ids, pending, cached, before
        self.computed_positions = computed


def answer_one(
    session: Session,
    question: str,
    images: Sequence[Image.Image] = (),
    sampling: Sampling | None = None,
    *,
    request_id: Any = None,
) -> str:
    """Return the clean answer to a single question, decoded as in a chat, or by beam search.

    Args:
        session: model and template.
        question: as in `Chat.reply`.
        images: of the question.
        sampling: None = greedy.
        request_id: as in `Chat.reply`.

    Raises:
        ValueError: as `Session.prepare`.
    """
    sampling = sampling or Sampling()
    if sampling.num_beams > 1:
        prompt = session.prepare(question, images, max_new_tokens=sampling.max_new_tokens)
        return session.answer_prompts([prompt], sampling, [request_id])[0]
    return "".join(Chat(session, sampling).reply(question, images, request_id=request_id))
