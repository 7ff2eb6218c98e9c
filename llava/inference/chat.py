"""A dialogue about images that is read once: the KV cache stays from turn to turn, and answers come piece by piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from llava.inference.answer_text import AnswerStream
from llava.inference.arrival import Arrival
from llava.inference.dialogue_cache import DialogueCache
from llava.inference.prompts import ending_ids, next_turn_ids
from llava.inference.session import Prompt, Request, Sampling, Session
from llava.model.devices import send


class Chat:
    """A dialogue with a model.

    Args:
        session: model and template.
        sampling: how tokens are chosen; None = greedy.
        cache: empty; None = the fastest that suits the model.

    Attributes:
        turns: question and clean answer of each turn.
        ids: the whole dialogue as the model sees it, answers as it generated them, `IMAGE_TOKEN_INDEX` per image.
        fed_tokens: positions the model computed for the latest turn, in tokens and image patches.
        is_ahead: give the device the step behind a token before the token is looked at; what is then not wanted is
            forgotten.

    Raises:
        ValueError: if beam search is asked for, which can't be streamed.

    Example:
        >>> chat = Chat(session)
        >>> for piece in chat.reply("What is this?", [image]):
        ...     print(piece, end="", flush=True)
    """

    def __init__(self, session: Session, sampling: Sampling | None = None, cache: DialogueCache | None = None) -> None:
        self.session = session
        self.sampling = sampling or Sampling(max_new_tokens=512)
        if self.sampling.num_beams != 1:
            raise ValueError(f"num_beams is {self.sampling.num_beams}, but a chat streams its answers; use 1")
        self._generator = torch.Generator()
        if self.sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self.sampling.seed)
        self._races: deque[Tensor] = deque()
        self._cache = session.dialogues.open() if cache is None else cache
        self.is_ahead = session.model.device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Forget the dialogue, its images included."""
        self.turns: list[tuple[str, str]] = []
        self.ids: list[int] = []
        self.fed_tokens = 0
        self._kept = 0  # positions of the cache that count
        self._unfed = Prompt([], [])  # the part of `ids` behind them

    def reply(self, question: str, images: Sequence[Image.Image] = ()) -> Iterator[str]:
        """Ask, and return an iterator over the pieces of the answer.

        A dialogue goes on only when the iterator is used up or closed; what was generated until then is the answer. A
        turn broken off before its first token leaves no trace.

        Args:
            question: text; its `<image>` marks say where the images go, without any they go in front.
            images: new pictures of this turn.

        Raises:
            PromptError: if the question is empty, marks another number of images, or the dialogue fills the context.
            ValueError: if there are images and the model has no image encoder.
        """
        turn = Prompt(self._turn_ids(question, len(images)), self.session.pixel_values(images))
        unfed = Prompt(self._unfed.input_ids + turn.input_ids, self._unfed.pixel_values + turn.pixel_values)
        self.session.check_length(self._kept + self.session.spliced_length(unfed), self.sampling.max_new_tokens)
        return self._stream(question, turn, unfed)

    def _turn_ids(self, question: str, n_images: int) -> list[int]:
        if not self.turns:
            return self.session.prompt_ids(question, n_images)
        session = self.session
        use_im_start_end = session.model.config.mm_use_im_start_end
        return next_turn_ids(question, n_images, session.template, session.tokenizer, use_im_start_end=use_im_start_end)

    def _stream(self, question: str, turn: Prompt, unfed: Prompt) -> Iterator[str]:
        """Feed the new part of the dialogue, then choose and feed tokens until the answer ends."""
        answer = AnswerStream(self.session.tokenizer, self.session.template.stop_text)
        stop_ids, stops_on_text = self.session.stop_ids, self.session.stops_on_text
        is_ended, self.fed_tokens = False, 0
        self._cache.cut(self._kept)
        try:
            for token in self._tokens(unfed):
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
                n_fed = self.session.spliced_length(unfed) + len(answer.ids) - 1  # the last token is not fed yet
                self._close_turn(question, turn, answer, n_fed, is_ended)

    @torch.no_grad()
    def _tokens(self, prompt: Prompt) -> Iterator[int]:
        """Yield the tokens of an answer; on CUDA the next one is under way before a token is looked at."""
        cache, model, n_tokens = self._cache, self.session.model, self.sampling.max_new_tokens
        input_ids = torch.tensor([prompt.input_ids], device=model.device)  # (1, T)
        embeds = model.splice(input_ids, prompt.pixel_values).inputs_embeds[0]  # (S, D)
        token = self._choose(cache.read(embeds, room=n_tokens), 0)  # (1,)
        for number in range(1, n_tokens + 1):
            is_last = number == n_tokens
            arrival = Arrival([token])
            if self.is_ahead and not is_last:
                token = self._choose(cache.step(token), 1)
            [[chosen]] = arrival.wait()
            if self._races:
                self._races.popleft()
            yield chosen
            if not self.is_ahead and not is_last:
                token = self._choose(cache.step(token), 0)

    def _choose(self, logits: Tensor, n_ahead: int) -> Tensor:
        """Choose the next token, (1, W) -> (1,).

        Args:
            logits: behind the last token.
            n_ahead: tokens chosen before that nobody has looked at; if they are dropped, their chance is not lost.
        """
        if self.sampling.temperature == 0:
            return select_token(logits, self.sampling, None)
        if len(self._races) <= n_ahead:
            self._races.append(draw_race(logits.shape[-1], self._generator))
        return select_token(logits, self.sampling, send(self._races[n_ahead], logits.device))

    def _close_turn(self, question: str, turn: Prompt, answer: AnswerStream, n_fed: int, is_ended: bool) -> None:
        end = [] if is_ended else ending_ids(self.session.template, self.session.tokenizer)
        turns, ids = [*self.turns, (question, answer.text)], [*self.ids, *turn.input_ids, *answer.ids, *end]
        unfed, kept = Prompt(answer.ids[-1:] + end, []), self._kept + n_fed
        # At once, so that there is next to no moment at which an interruption finds a part of the turn.
        self.turns, self.ids, self._unfed, self._kept, self.fed_tokens = turns, ids, unfed, kept, n_fed


def answer_one(session: Session, request: Request, sampling: Sampling | None = None) -> str:
    """Return the clean answer to a single question, computed as a chat computes it, or by beam search.

    Args:
        session: model and template.
        request: a question with its pictures.
        sampling: None = greedy.

    Raises:
        ValueError: as `Session.prepare`.
    """
    sampling = sampling or Sampling()
    if sampling.num_beams > 1:
        return session.answer_batch([request], sampling)[0]
    return "".join(Chat(session, sampling).reply(request.question, request.images))


def draw_race(vocabulary: int, generator: torch.Generator | None) -> Tensor:
    """Return the chance that decides a token, (W,): exponentially distributed times, see `select_token`."""
    return torch.empty(vocabulary).exponential_(generator=generator)


def select_token(logits: Tensor, sampling: Sampling, race: Tensor | None) -> Tensor:
    """Return the next token, on the device, (1, W) -> (1,).

    Where tokens arrive at times with means of 1 / probability, each is the first with its probability; so does
    `torch.multinomial` draw one.

    Args:
        logits: behind the last token.
        sampling: temperature and top_p.
        race: (W,) of `draw_race`; not needed at temperature 0.
    """
    if sampling.temperature == 0:
        return logits.float().argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)  # (1, W)
    if sampling.top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        is_beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the likeliest always stays
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered.masked_fill(is_beyond, 0))
    return (probabilities / race).argmax(dim=-1)


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> int:
    """Choose the next token: the likeliest at temperature 0, else by chance.

    Args:
        logits: (W,).
        sampling: temperature and top_p.
        generator: of chance, on the CPU; None = torch's own.
    """
    race = None if sampling.temperature == 0 else draw_race(len(logits), generator).to(logits.device)
    return int(select_token(logits[None], sampling, race))
