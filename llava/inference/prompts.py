"""From a question and its number of pictures to token ids, through the same functions that training goes through."""

from __future__ import annotations

from collections.abc import Callable

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import Conversation, Segment
from llava.data.supervision import ASSISTANT, HUMAN, build_dialogue, encode_example, encode_segments
from llava.tokenization import LlavaTokenizer

_STAND_IN = "x"


class PromptError(ValueError):
    """A question that can't be asked.

    Attributes:
        code: `question_empty`, `image_count_mismatch` or `prompt_too_long`; goes into error records.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def place_question(question: str, n_images: int) -> str:
    """Return the question with one `<image>` per picture: where it has them already, else each on a line in front.

    Raises:
        PromptError: if the question has no text, or marks another number of pictures than there are.
    """
    if not question.replace(DEFAULT_IMAGE_TOKEN, "").strip():
        raise PromptError("question_empty", "the question is empty; write one")
    count = question.count(DEFAULT_IMAGE_TOKEN)
    if count not in (0, n_images):
        raise PromptError(
            "image_count_mismatch",
            f"the question has {count} {DEFAULT_IMAGE_TOKEN} but {n_images} images; write one mark per image, or none "
            "to have them in front",
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
    """Return the ids of a dialogue that starts with this question and ends where the model answers.

    Args:
        question: text, with or without `<image>`.
        n_images: pictures that belong to it.
        template: an empty dialogue.
        tokenizer: of the model.
        use_im_start_end: put `<im_start>` and `<im_end>` around each image.
        encode_text: `tokenizer.encode_text`, which may remember texts that occur in every question.

    Returns:
        The ids that `encode_example` gives for the same question, up to the answer.

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
    """Return what scores a given answer: ids to compute, and ids that should follow the last of them.

    Args:
        question: as in `first_turn_ids`.
        n_images: pictures that belong to it.
        answer: text.
        template: an empty dialogue.
        tokenizer: of the model.
        use_im_start_end: put `<im_start>` and `<im_end>` around each image.

    Returns:
        The ids up to the last but one that training supervises, and all ids that it supervises: the answer and its end.

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
    """Return the ids that follow an ended answer: this question, up to where the model answers.

    Args and errors as in `first_turn_ids`.
    """
    dialogue = _dialogue([_STAND_IN, place_question(question, n_images)], template, use_im_start_end)
    *_, answer, follow_up = dialogue.segments()
    end = Segment(_ending(answer), supervised=True)
    before = encode_segments([end], tokenizer)[0]  # so that spaces behind the end fall as in a whole dialogue
    return encode_segments([end, follow_up], tokenizer)[0][len(before) :]


def ending_ids(template: Conversation, tokenizer: LlavaTokenizer) -> list[int]:
    """Return the ids of what the template puts behind an answer, for answers that were broken off."""
    dialogue = _dialogue([_STAND_IN, _STAND_IN], template, use_im_start_end=False)
    *_, answer, _ = dialogue.segments()
    return tokenizer.encode_text(_ending(answer), at_start=False)


def _dialogue(questions: list[str], template: Conversation, use_im_start_end: bool) -> Conversation:
    """Put questions into the template, each but the last with a stand-in for its answer."""
    turns = [{"from": HUMAN, "value": questions[0]}]
    for question in questions[1:]:
        turns += [{"from": ASSISTANT, "value": _STAND_IN}, {"from": HUMAN, "value": question}]
    dialogue = build_dialogue(turns, template, use_im_start_end=use_im_start_end)
    dialogue.append_message(dialogue.roles[1], None)
    return dialogue


def _ending(answer: Segment) -> str:
    return answer.text.partition(_STAND_IN)[2]
