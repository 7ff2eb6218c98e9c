"""Windows of questions that are tokenised and grouped as a batch run goes.

Image names and text lengths decide the order of the whole run, without tokenising: questions about the same images
come together, those with more images and longer texts first. The ordered run is cut into windows, and a window is
tokenised and grouped when the groups before it are nearly used up. So the first answer of a run of a million questions
waits for one window, and only windows in use take memory for ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.inference.batch.answers_file import Answer
from llava.inference.batch.questions import Question
from llava.inference.engine.prefix_groups import (
    common_system_prefix,
    even_parts,
    group_requests,
    has_system_prefix,
)
from llava.inference.engine.sequence import PrefixGroup, Request
from llava.inference.prompts import PromptError, answered_ids, place_question
from llava.inference.session import Session

_BYTES_PER_TOKEN = 4
_TOKENS_AFTER_TEXT = 8  # of the template, after each question
_CACHED_TEXTS = 64  # the text before the first image is that of the question before

ImageGroup = Sequence[Question]
"""Questions about the same images, few enough that one rank answers them all."""
RequestsOf = Callable[[Question], list[Request]]


def group_by_images(questions: Iterable[Question], largest: int) -> list[ImageGroup]:
    """Bring questions about the same images together, whatever their order; return the longest first.

    Args:
        questions: of the run.
        largest: most questions of an image group; more about the same images become several of equal size.
    """
    by_images: dict[tuple[str, ...], list[Question]] = {}
    for question in questions:
        by_images.setdefault(question.images, []).append(question)
    image_groups: list[ImageGroup] = []
    for images, members in by_images.items():
        if not images:
            members.sort(key=_text_bytes)
        image_groups += even_parts(members, largest)
    return sorted(image_groups, key=_n_images_and_bytes, reverse=True)


def estimate_positions(image_group: ImageGroup, patches: int) -> int:
    """Return about how many positions an image group takes, before it is tokenised.

    Args:
        image_group: questions about the same images.
        patches: positions that an image takes.
    """
    texts = sum(_text_bytes(question) // _BYTES_PER_TOKEN + _TOKENS_AFTER_TEXT for question in image_group)
    return len(image_group[0].images) * patches + texts


def request_builder(session: Session, choices: Sequence[str] = ()) -> RequestsOf:
    """Return the function from a question to its requests, one for each choice; it raises `PromptError`."""
    use_im_start_end = session.model.config.mm_use_im_start_end
    encode_text = lru_cache(maxsize=_CACHED_TEXTS)(session.tokenizer.encode_text)

    def requests_of(question: Question) -> list[Request]:
        text, images = question.text, question.images
        if not choices:
            ids = session.prompt_ids(text, len(images), encode_text=encode_text)
            return [Request(question, ids, images, request_id=question.request_id)]
        requests = []
        for number, choice in enumerate(choices):
            ids, targets = answered_ids(
                text, len(images), choice, session.template, session.tokenizer, use_im_start_end=use_im_start_end
            )
            requests.append(Request(question, ids, images, tuple(targets), number))
        return requests

    return requests_of


def find_system_prefix(questions: Iterable[Question], requests_of: RequestsOf) -> list[int]:
    """Return the ids that the prompts of these questions start with, found from two of them.

    The two are those whose texts before the first image come first and last in the alphabet: what they share, all
    share, but for a token that reaches over the end of it in other texts. `Windows` keeps prompts like these apart.
    """
    first = last = None
    for question in questions:
        try:
            lead = place_question(question.text, len(question.images)).partition(DEFAULT_IMAGE_TOKEN)[0]
        except PromptError:
            continue
        first = (lead, question) if first is None or lead < first[0] else first
        last = (lead, question) if last is None or lead > last[0] else last
    return common_system_prefix(
        request for _, question in filter(None, (first, last)) for request in requests_of(question)
    )


class Windows:
    """Prefix groups of a run, planned window by window.

    Args:
        requests_of: from `request_builder`.
        system_prefix: ids that the prompts start with.
        patches: positions that an image takes, for the order.
        group_size: most sequences of a group.
        size: questions of a window.

    Attributes:
        errors: answers with an error, of questions without a prompt; the caller takes them.
        outside: questions whose prompts do not start with the system prefix; they are in no group.
    """

    def __init__(
        self,
        requests_of: RequestsOf,
        system_prefix: Sequence[int],
        patches: int,
        *,
        group_size: int,
        size: int,
    ) -> None:
        self.errors: list[Answer] = []
        self.outside: list[Question] = []
        self._requests_of, self._system_prefix, self._patches = requests_of, list(system_prefix), patches
        self._group_size, self._size = group_size, size

    def groups(self, image_groups: Iterable[ImageGroup]) -> Iterator[PrefixGroup]:
        """Yield the prefix groups of all questions, in the order of the image groups, within a window longest first."""
        for questions in _cut(image_groups, self._size):
            requests = [request for question in questions for request in self._requests(question)]
            yield from group_requests(requests, self._system_prefix, self._patches, group_size=self._group_size)

    def take_errors(self) -> list[Answer]:
        """Remove and return the answers with an error."""
        errors, self.errors = self.errors, []
        return errors

    def _requests(self, question: Question) -> list[Request]:
        try:
            requests = self._requests_of(question)
        except PromptError as error:
            self.errors.append(Answer(question, "", error.code, str(error)))
            return []
        if all(has_system_prefix(request, self._system_prefix) for request in requests):
            return requests
        self.outside.append(question)
        return []


def _cut(image_groups: Iterable[ImageGroup], size: int) -> Iterator[list[Question]]:
    """Yield the questions of successive image groups, at least `size` at a time."""
    window: list[Question] = []
    for image_group in image_groups:
        window += image_group
        if len(window) >= size:
            yield window
            window = []
    if window:
        yield window


def _n_images_and_bytes(image_group: ImageGroup) -> tuple[int, int]:
    return len(image_group[0].images), sum(map(_text_bytes, image_group))


def _text_bytes(question: Question) -> int:
    text = question.text
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
