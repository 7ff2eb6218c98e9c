"""From generated ids to the text a user sees: cleaning an answer, whole or while it grows."""

from __future__ import annotations

from collections.abc import Sequence

from llava.tokenization import LlavaTokenizer

_UNFINISHED_CHARACTER = "\ufffd"
"""What decoding gives for bytes that are not, or not yet, a character."""


def clean_answer(text: str, stop_text: str) -> str:
    """Cut an answer where the template ends it, and strip the spaces around it."""
    return text.partition(stop_text)[0].strip()


def decode_answer(ids: Sequence[int], tokenizer: LlavaTokenizer, stop_text: str) -> str:
    """Return the clean text of a whole answer."""
    return clean_answer(tokenizer.decode(list(ids), skip_special_tokens=True), stop_text)


class AnswerStream:
    """Text of an answer, piece by piece; the pieces together are `decode_answer` of all ids.

    What may still change is held back: bytes that are no character yet, spaces that may be last, a stop text's start.

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
        """Take the next id and return the text that is certain now, often none."""
        self.ids.append(token)
        self._tokens += self._tokenizer.convert_ids_to_tokens([token], skip_special_tokens=True)
        self._decoded = self._tokenizer.convert_tokens_to_string(self._tokens)
        certain = self._decoded.rstrip(_UNFINISHED_CHARACTER)
        if self._stop_text not in certain:
            certain = certain[: len(certain) - self._stop_overlap(certain)]
        return self._show(clean_answer(certain, self._stop_text))

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
