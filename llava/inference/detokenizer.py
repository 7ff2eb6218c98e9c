"""Detokenizer: generated ids to clean text, for whole answers and streamed ones."""

from __future__ import annotations

from collections.abc import Sequence

from llava.tokenization.llama_tokenizer import LlavaTokenizer

_UNFINISHED_CHARACTER = "\ufffd"
"""Decoded from bytes that are not, or not yet, a character."""


def clean_answer(text: str, stop_text: str) -> str:
    """Cut an answer at the template's stop text, and strip it."""
    return text.partition(stop_text)[0].strip()


def decode_answer(ids: Sequence[int], tokenizer: LlavaTokenizer, stop_text: str) -> str:
    """Return the clean text of a whole answer."""
    return clean_answer(tokenizer.decode(list(ids), skip_special_tokens=True), stop_text)


class AnswerStream:
    """Streaming detokenizer, whose pieces add up to `decode_answer` of all ids.

    Text that may still change is held back: incomplete characters, trailing spaces, the beginning of the stop text.

    Args:
        tokenizer: of the model.
        stop_text: ends an answer.
    """

    def __init__(self, tokenizer: LlavaTokenizer, stop_text: str) -> None:
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._stop_text = stop_text
        self._tokens: list[str] = []
        self._decoded = ""
        self._shown = 0

    @property
    def text(self) -> str:
        """The clean answer so far."""
        return decode_answer(self.ids, self._tokenizer, self._stop_text)

    @property
    def has_stop_text(self) -> bool:
        """Whether the stop text was generated."""
        return self._stop_text in self._decoded

    def push(self, token: int) -> str:
        """Add an id and return the text that is final now, often none."""
        self.ids.append(token)
        self._tokens += self._tokenizer.convert_ids_to_tokens([token], skip_special_tokens=True)
        self._decoded = self._tokenizer.convert_tokens_to_string(self._tokens)
        final = self._decoded.rstrip(_UNFINISHED_CHARACTER)
        if self._stop_text not in final:
            final = final[: len(final) - self._stop_overlap(final)]
        return self._show(clean_answer(final, self._stop_text))

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._show(self.text)

    def _show(self, text: str) -> str:
        piece, self._shown = text[self._shown :], max(self._shown, len(text))
        return piece

    def _stop_overlap(self, text: str) -> int:
        """Return how many characters at the end of `text` may begin the stop text."""
        longest = min(len(text), len(self._stop_text) - 1)
        return next((size for size in range(longest, 0, -1) if self._stop_text.startswith(text[-size:])), 0)
