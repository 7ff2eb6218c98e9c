"""From one LLaVA record's dialogue to token ids and labels, built together, segment by segment.

Source: LLaVA-1.5's `preprocess_v1`, `preprocess_llama_2`, `preprocess_plain` and `preprocess_multimodal`; the results
are equal, except that no row is ever masked as a whole because two ways of counting its tokens disagreed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, Segment, SeparatorStyle, get_template
from llava.tokenization import LlavaTokenizer

HUMAN, ASSISTANT = "human", "gpt"
NO_ANSWER = "the dialogue has no answer, so there is nothing to learn from it"
_NO_IMAGE = "template 'plain' describes images, but the question {!r} has no " + DEFAULT_IMAGE_TOKEN
_VALUE_SHOWN = 40


class Fault(NamedTuple):
    """Why a record can't be used: a code for programs, a sentence for people."""

    code: str
    message: str


def encode_example(
    conversations: Sequence[Mapping[str, str]],
    template: str | Conversation,
    tokenizer: LlavaTokenizer,
    *,
    use_im_start_end: bool = False,
    encode_text: Callable[..., list[int]] | None = None,
) -> tuple[list[int], list[int]]:
    """Return the ids and labels of one record.

    Args:
        conversations: turns `{"from": "human" | "gpt", "value": text}`, alternating; an opening of the assistant
            before the first question is left out, as in the original.
        template: name of a prompt template, or an empty dialogue in it.
        tokenizer: of the model that is trained.
        use_im_start_end: put `<im_start>` and `<im_end>` around each image.
        encode_text: in the place of `tokenizer.encode_text`, for one that remembers texts; None = that itself.

    Returns:
        input_ids with `IMAGE_TOKEN_INDEX` in the place of each image, and labels of the same length: the id where the
        model has to produce it (answers and what ends them), else `IGNORE_INDEX`.

    Raises:
        ValueError: if the turns don't alternate, a turn is empty or no object, or nothing is supervised.
    """
    dialogue = build_dialogue(conversations, template, use_im_start_end=use_im_start_end)
    input_ids, labels = encode_segments(dialogue.segments(), tokenizer, encode_text)
    if labels.count(IGNORE_INDEX) == len(labels):
        raise ValueError(NO_ANSWER)
    return input_ids, labels


def build_dialogue(
    conversations: Sequence[Mapping[str, str]], template: str | Conversation, *, use_im_start_end: bool = False
) -> Conversation:
    """Put a record's turns into a template; arguments and errors as in `encode_example`."""
    dialogue = get_template(template) if isinstance(template, str) else template.copy()
    is_plain = dialogue.sep_style is SeparatorStyle.PLAIN
    if is_plain:  # trained without the line break that the prompt has between image and caption
        dialogue.sep, dialogue.sep2 = "", dialogue.stop_text
    fault = next(find_turn_faults(conversations, is_plain=is_plain), None)
    if fault is not None:
        raise ValueError(fault.message)
    for index, turn in enumerate(without_opening(conversations)):
        text = turn["value"]
        if is_plain and index % 2 == 0:
            text = plain_question(text)
        else:
            text = place_images(text, dialogue.version, use_im_start_end=use_im_start_end)
        dialogue.append_message(dialogue.roles[index % 2], text)
    return dialogue


def without_opening(conversations: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    """Return the turns from the first question on; an opening of the assistant before it is left out."""
    has_opening = bool(conversations) and conversations[0].get("from") == ASSISTANT
    return conversations[1:] if has_opening else conversations


def find_turn_faults(conversations: Sequence[Any], *, is_plain: bool) -> Iterator[Fault]:
    """Yield what is wrong with a dialogue's turns, which are counted from 1 in the messages.

    Of turns that are no objects, and of turns of the wrong role, only the first is told: those behind it are usually
    wrong for the same reason.

    Args:
        conversations: of a record.
        is_plain: the template is the captioning one, whose questions are images.
    """
    for number, turn in enumerate(conversations, start=1):
        if not isinstance(turn, Mapping):
            yield Fault("bad_turn", f"turn {number} is no object with 'from' and 'value'")
            return
    turns = without_opening(conversations)
    alternates = True
    for index, turn in enumerate(turns):
        number, expected = index + 1 + len(conversations) - len(turns), (HUMAN, ASSISTANT)[index % 2]
        role, text = turn.get("from"), turn.get("value", "")
        if alternates and role != expected:
            alternates = False
            yield Fault("roles", f"turn {number} is from {role!r}; turns alternate, so {expected!r} is due")
        if not isinstance(text, str):
            yield Fault("not_text", f"turn {number}, from {role!r}, is {str(text)[:_VALUE_SHOWN]}, which is no text")
        elif not text.strip():
            yield Fault("empty_turn", f"turn {number}, from {role!r}, is empty")
        elif is_plain and alternates and index % 2 == 0 and DEFAULT_IMAGE_TOKEN not in text:
            yield Fault("caption_without_image", _NO_IMAGE.format(text))
        elif not _is_encodable(text):
            yield Fault("half_character", f"turn {number}, from {role!r}, holds half of a surrogate pair")


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def place_images(text: str, version: str, *, use_im_start_end: bool = False) -> str:
    """Write a turn's `<image>` as the template wants it.

    A single image goes to the front, on a line of its own; several stay where they stand.
    """
    if DEFAULT_IMAGE_TOKEN not in text:
        return text
    if text.count(DEFAULT_IMAGE_TOKEN) == 1:
        text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
    if "mmtag" in version:
        text = text.replace(DEFAULT_IMAGE_TOKEN, f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>")
    if use_im_start_end:
        text = text.replace(DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN)
    return text


def plain_question(text: str) -> str:
    """Return the question of the captioning template: its images, without their text.

    Raises:
        ValueError: if there is no image.
    """
    count = text.count(DEFAULT_IMAGE_TOKEN)
    if not count:
        raise ValueError(_NO_IMAGE.format(text))
    return DEFAULT_IMAGE_TOKEN * count


def encode_segments(
    segments: Sequence[Segment], tokenizer: LlavaTokenizer, encode_text: Callable[..., list[int]] | None = None
) -> tuple[list[int], list[int]]:
    """Encode prompt segments to ids and labels, each image a placeholder that is never supervised."""
    encode_text = encode_text or tokenizer.encode_text
    input_ids = [tokenizer.bos_token_id] if tokenizer.add_bos_token else []
    labels = [IGNORE_INDEX] * len(input_ids)
    # legacy Llama tokenizers put a space behind a special token, as they do at the start
    starts_text = set(tokenizer.all_special_ids) if tokenizer.legacy else set()
    at_start = True
    for segment in segments:
        for index, text in enumerate(segment.text.split(DEFAULT_IMAGE_TOKEN)):
            if index:
                input_ids.append(IMAGE_TOKEN_INDEX)
                labels.append(IGNORE_INDEX)
                at_start = True
            if not text:
                continue
            ids = encode_text(text, at_start=at_start)
            input_ids += ids
            labels += ids if segment.supervised else [IGNORE_INDEX] * len(ids)
            at_start = ids[-1] in starts_text
    return input_ids, labels
