"""Tokenize prompts: first and follow-up turns, and answers to be scored, through the functions that training uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import Conversation, Segment
from llava.data.supervision import ASSISTANT, HUMAN, build_dialogue, encode_example, encode_segments
from llava.tokenization.text_limit import MAX_TEXT, describe_long_text

if TYPE_CHECKING:  # for annotations: it imports transformers
    from llava.tokenization.llama_tokenizer import LlavaTokenizer

_PLACEHOLDER_TEXT = "x"


class PromptError(ValueError):
    """A question that has no prompt.

    Attributes:
        code: `question_empty`, `image_count_mismatch` or `prompt_too_long`, as written into answers files.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def place_question(question: str, n_images: int) -> str:
    """Return the question with one `<image>` per image: where it marks them, or each on a line before it.

    Raises:
        PromptError: if the question has no text, too much text, or marks another number of images than `n_images`.
    """
    if len(question) > MAX_TEXT:
        raise PromptError("prompt_too_long", f"the question {describe_long_text(question)}; shorten it")
    if not question.replace(DEFAULT_IMAGE_TOKEN, "").strip():
        raise PromptError("question_empty", "the question is empty; write one")
    count = question.count(DEFAULT_IMAGE_TOKEN)
    if count not in (0, n_images):
        raise PromptError(
            "image_count_mismatch",
            f"the question has {count} {DEFAULT_IMAGE_TOKEN} but {n_images} images; write one mark per image, or none "
            "to put them first",
        )
    return question if count else f"{DEFAULT_IMAGE_TOKEN}\n" * n_images + question


def first_turn_ids(
    question: str,
    n_images: int,
    template: Conversation,
    tokenizer: LlavaTokenizer,
    *,
    use_im_start_end: bool = False,
    encode_text: Callable[..., list[int]] | None = None,
) -> list[int]:
    """Tokenize the first turn of a conversation, up to where the answer begins.

    Args:
        question: text, with or without `<image>`.
        n_images: number of its images.
        template: an empty conversation.
        tokenizer: of the model.
        use_im_start_end: put `<im_start>` and `<im_end>` around each image.
        encode_text: replaces `tokenizer.encode_text`, for example by a cached version.

    Returns:
        The beginning of `encode_example`'s ids for the same question.

    Raises:
        PromptError: as `place_question`.
    """
    dialogue = _dialogue([place_question(question, n_images)], template, use_im_start_end)
    return encode_segments(dialogue.segments(), tokenizer, encode_text)[0]


def answered_ids(
    question: str,
    n_images: int,
    answer: str,
    template: Conversation,
    tokenizer: LlavaTokenizer,
    *,
    use_im_start_end: bool = False,
) -> tuple[list[int], list[int]]:
    """Tokenize a question and a given answer, to score the answer.

    Args:
        question: as in `first_turn_ids`.
        n_images: number of its images.
        answer: text.
        template: an empty conversation.
        tokenizer: of the model.
        use_im_start_end: put `<im_start>` and `<im_end>` around each image.

    Returns:
        The input ids, up to the last supervised token but one, and the supervised tokens: the answer and its end.

    Raises:
        PromptError: as `place_question`.
    """
    turns = [{"from": HUMAN, "value": place_question(question, n_images)}, {"from": ASSISTANT, "value": answer}]
    input_ids, labels = encode_example(turns, template, tokenizer, use_im_start_end=use_im_start_end)
    supervised = [index for index, label in enumerate(labels) if label != IGNORE_INDEX]
    return input_ids[: supervised[-1]], input_ids[supervised[0] : supervised[-1] + 1]


def next_turn_ids(
    question: str, n_images: int, template: Conversation, tokenizer: LlavaTokenizer, *, use_im_start_end: bool = False
) -> list[int]:
    """Tokenize a follow-up turn: what comes after an ended answer, up to where the next answer begins.

    Args and errors as in `first_turn_ids`.
    """
    dialogue = _dialogue([_PLACEHOLDER_TEXT, place_question(question, n_images)], template, use_im_start_end)
    *_, answer, follow_up = dialogue.segments()
    end = Segment(_ending(answer), supervised=True)
    before = encode_segments([end], tokenizer)[0]  # so that spaces after the end are those of a whole conversation
    return encode_segments([end, follow_up], tokenizer)[0][len(before) :]


def ending_ids(template: Conversation, tokenizer: LlavaTokenizer) -> list[int]:
    """Tokenize what the template puts after an answer, to append it to an answer that was cut off."""
    dialogue = _dialogue([_PLACEHOLDER_TEXT, _PLACEHOLDER_TEXT], template, use_im_start_end=False)
    *_, answer, _ = dialogue.segments()
    return tokenizer.encode_text(_ending(answer), at_start=False)


def _dialogue(questions: list[str], template: Conversation, use_im_start_end: bool) -> Conversation:
    """Build a conversation from questions, each but the last with a placeholder answer."""
    turns = [{"from": HUMAN, "value": questions[0]}]
    for question in questions[1:]:
        turns += [{"from": ASSISTANT, "value": _PLACEHOLDER_TEXT}, {"from": HUMAN, "value": question}]
    dialogue = build_dialogue(turns, template, use_im_start_end=use_im_start_end)
    dialogue.append_message(dialogue.roles[1], None)
    return dialogue


def _ending(answer: Segment) -> str:
    return answer.text.partition(_PLACEHOLDER_TEXT)[2]
