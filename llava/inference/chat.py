"""A dialogue about images that is read once: the KV cache stays from turn to turn, and answers come piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from llava.inference.answer_text import AnswerStream
from llava.inference.prompts import ending_ids, next_turn_ids
from llava.inference.session import Prompt, Sampling, Session

_UNKNOWN = -1


class Chat:
    """A dialogue with a model.

    Args:
        session: model and template.
        sampling: how tokens are chosen; None = greedy.

    Attributes:
        turns: question and clean answer of each turn.
        ids: the whole dialogue as the model sees it, answers as it generated them, `IMAGE_TOKEN_INDEX` per image.
        fed_tokens: positions the model computed for the latest turn, in tokens and image patches.

    Raises:
        ValueError: if beam search is asked for, which can't be streamed.

    Example:
        >>> chat = Chat(session)
        >>> for piece in chat.reply("What is this?", [image]):
        ...     print(piece, end="", flush=True)
    """

    def __init__(self, session: Session, sampling: Sampling | None = None) -> None:
        self.session = session
        self.sampling = sampling or Sampling(max_new_tokens=512)
        if self.sampling.num_beams != 1:
            raise ValueError(f"num_beams is {self.sampling.num_beams}, but a chat streams its answers; use 1")
        self._generator = torch.Generator()
        if self.sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self.sampling.seed)
        self.reset()

    def reset(self) -> None:
        """Forget the dialogue, its images included."""
        self.turns: list[tuple[str, str]] = []
        self.ids: list[int] = []
        self.fed_tokens = 0
        self._pixels: list[Tensor] = []
        self._forget_cache()

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
        self.session.check_length(self._cached + self.session.spliced_length(unfed), self.sampling.max_new_tokens)
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
        start, is_ended, self.fed_tokens = self._cached, False, 0
        try:
            logits = self._feed(unfed)
            while True:
                token = choose_token(logits, self.sampling, self._generator)
                piece = answer.push(token)
                is_ended = token in self.session.stop_ids or (self.session.stops_on_text and answer.has_stop_text)
                if piece:
                    yield piece
                if is_ended or len(answer.ids) == self.sampling.max_new_tokens:
                    break
                logits = self._feed(Prompt([token], []))
            if rest := answer.finish():
                yield rest
        finally:
            if answer.ids:
                self._close_turn(question, turn, answer, is_ended)
                start += self.session.spliced_length(unfed) + len(answer.ids) - 1  # the last token was not fed
            if self._cached != start:  # an exception inside the model, or between its step and the next choice
                self._forget_cache()

    def _close_turn(self, question: str, turn: Prompt, answer: AnswerStream, is_ended: bool) -> None:
        end = [] if is_ended else ending_ids(self.session.template, self.session.tokenizer)
        self.turns.append((question, answer.text))
        self.ids += turn.input_ids + answer.ids + end
        self._pixels += turn.pixel_values
        self._unfed = Prompt(answer.ids[-1:] + end, [])

    def _forget_cache(self) -> None:
        """Have the next turn read the whole dialogue again."""
        self._cache = DynamicCache()
        self._cached = 0  # positions in the cache
        self._unfed = Prompt(list(self.ids), list(self._pixels))  # the part of `ids` behind them

    @torch.no_grad()
    def _feed(self, prompt: Prompt) -> Tensor:
        """Extend the cache and return the logits (W,) behind the last position."""
        input_ids = torch.tensor([prompt.input_ids], device=self.session.model.device)  # (1, T)
        inputs_embeds = self.session.model.splice(input_ids, prompt.pixel_values).inputs_embeds  # (1, S, D)
        cached, self._cached = self._cached, _UNKNOWN  # an interrupt may leave some layers a step ahead of others
        output = self.session.model(
            inputs_embeds=inputs_embeds, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cached = cached + inputs_embeds.shape[1]
        self.fed_tokens += inputs_embeds.shape[1]
        return output.logits[0, -1]


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> int:
    """Choose the next token: the likeliest at temperature 0, else by chance.

    Args:
        logits: (W,).
        sampling: temperature and top_p.
        generator: of chance, on the CPU; None = torch's own.
    """
    if sampling.temperature == 0:
        return int(logits.float().argmax())
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1).cpu()  # (W,)
    if sampling.top_p is not None:
        ordered, order = probabilities.sort(descending=True)
        is_beyond = ordered.cumsum(0) - ordered >= sampling.top_p  # the likeliest always stays
        probabilities[order[is_beyond]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))
