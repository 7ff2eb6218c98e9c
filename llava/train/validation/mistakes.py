"""Wrong answers of a validation, as thumbnails with question, true and given answer."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from llava.data.records import EncodedRecord
from llava.data.split import ranked
from llava.files.terminal_text import escape_controls, shorten
from llava.image_files.decode import open_image
from llava.image_files.errors import ImageError
from llava.image_files.resize import expand_to_square
from llava.inference.session import Session

logger = logging.getLogger(__name__)

MOST_SHOWN = 12
"""Wrong answers of a validation that a tracker gets."""
THUMBNAIL_SIZE = 256  # pixels of the longest side
TEXT_SHOWN = 300  # characters of a question or answer
_GREY = (128, 128, 128)


class Mistake(NamedTuple):
    """A question that was answered wrong.

    Attributes:
        question: its index among the questions of the validation.
        prompt: the encoded record up to the answer.
        true: the true answer.
        given: the model's answer.
    """

    question: int
    prompt: EncodedRecord
    true: str
    given: str


class ShownMistake(NamedTuple):
    """A wrong answer as a person sees it.

    Attributes:
        image: thumbnail of the question's last image; a grey square if it has none or can't be read any more.
        question: its text.
        true: the true answer.
        given: the model's answer.
    """

    image: Image.Image
    question: str
    true: str
    given: str

    @property
    def caption(self) -> str:
        """The texts in one line."""
        return f"{self.question} | true: {self.true} | given: {self.given}"


def choose_mistakes(mistakes: Collection[Mistake], most: int = MOST_SHOWN) -> list[Mistake]:
    """Choose some mistakes in an order that is the same in every validation: what stays wrong stays shown."""
    by_question = {mistake.question: mistake for mistake in mistakes}
    return [by_question[question] for question in ranked(by_question, 0)[:most]]


def show_mistakes(mistakes: Sequence[Mistake], session: Session) -> list[ShownMistake]:
    """Return mistakes with their images and texts, each bounded in size.

    Args:
        mistakes: from `choose_mistakes`.
        session: has the tokenizer and the template.
    """
    shown = []
    for _, prompt, true, given in mistakes:
        texts = question_text(prompt.input_ids, session), true, given
        image = _thumbnail(prompt.images[-1] if prompt.images else None)
        shown.append(ShownMistake(image, *(shorten(escape_controls(text), TEXT_SHOWN) for text in texts)))
    return shown


def question_text(input_ids: Sequence[int], session: Session) -> str:
    """Return the user's last turn in a prompt, without the markers of images and roles.

    A template that marks turns otherwise than "USER:" gives the whole prompt.

    Args:
        input_ids: of the prompt up to the answer; negative ones stand for images.
        session: has the tokenizer and the template.
    """
    text = session.tokenizer.decode([number for number in input_ids if number >= 0], skip_special_tokens=True)
    user, assistant = session.template.roles
    turn = text.rpartition(f"{user}:")[2] if user else text
    return turn.strip().removesuffix(f"{assistant}:").strip()


def _thumbnail(path: Path | None) -> Image.Image:
    size = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    if path is not None:
        try:
            image = open_image(path)
        except (ImageError, OSError) as error:
            logger.warning("an image of a wrong answer is not shown: %s", error)
        else:
            image.thumbnail(size)
            return expand_to_square(image, _GREY).resize(size)  # some trackers want images of one size
    return Image.new("RGB", size, _GREY)
