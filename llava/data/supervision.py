"""Encode a LLaVA record to input ids and labels, built together, segment by segment.

Source: LLaVA-1.5's `preprocess_v1`, `preprocess_llama_2`, `preprocess_plain` and `preprocess_multimodal`; the results
are equal, except that no row is ever masked as a whole because two ways of counting its tokens disagreed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, Segment, SeparatorStyle, get_template
from llava.data.row_errors import RowError
from llava.files.terminal_text import shorten, show
from llava.tokenization.text_limit import MAX_TEXT

if TYPE_CHECKING:  # for annotations: it imports transformers
    from llava.tokenization.llama_tokenizer import LlavaTokenizer

HUMAN, ASSISTANT, SYSTEM = "human", "gpt", "system"
NO_ANSWER = "the dialogue has no answer, so there is nothing to learn from it"
_NO_IMAGE = "template 'plain' describes images, but the question {} has no " + DEFAULT_IMAGE_TOKEN
_VALUE_SHOWN = 40


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
    error = next(find_turn_errors(conversations, is_plain=is_plain), None)
    if error is not None:
        raise ValueError(error.message)
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


def find_turn_errors(conversations: Sequence[Any], *, is_plain: bool) -> Iterator[RowError]:
    """Yield what is wrong with a dialogue's turns, which are counted from 1 in the messages.

    Of turns that are not objects, and of turns of the wrong role, only the first is reported: those after it are
    usually wrong for the same reason.

    Args:
        conversations: of a record.
        is_plain: the template is the captioning one, whose questions are images.
    """
    for number, turn in enumerate(conversations, start=1):
        if not isinstance(turn, Mapping):
            yield RowError("bad_turn", f"turn {number} is not an object with 'from' and 'value'")
            return
        if "value" not in turn and ("from" not in turn or len(turn) > 1):
            keys = (", ".join(map(show, turn)) or "nothing")[:_VALUE_SHOWN]
            yield RowError("bad_turn", f"turn {number} is not an object with 'from' and 'value', but has {keys}")
            return
    turns = without_opening(conversations)
    error = _find_length_error(turns)
    if error is not None:
        yield error
        return
    alternates = True
    for index, turn in enumerate(turns):
        number, expected = index + 1 + len(conversations) - len(turns), (HUMAN, ASSISTANT)[index % 2]
        role, text = turn.get("from"), turn.get("value", "")
        if alternates and role != expected:
            alternates = False
            yield _role_error(number, role, expected)
        if not isinstance(text, str):
            shown = shorten(show(text), _VALUE_SHOWN)
            yield RowError("not_text", f"turn {number}, from {show(role)}, is {shown}, which is not text")
        elif not text.strip():
            yield RowError("empty_turn", f"turn {number}, from {show(role)}, is empty")
        elif is_plain and alternates and index % 2 == 0 and DEFAULT_IMAGE_TOKEN not in text:
            yield RowError("caption_without_image", _NO_IMAGE.format(show(text)))
        elif not _is_encodable(text):
            yield RowError("half_character", f"turn {number}, from {show(role)}, holds half of a surrogate pair")


def _find_length_error(turns: Sequence[Mapping[str, Any]]) -> RowError | None:
    texts = [text for turn in turns if isinstance(text := turn.get("value"), str)]
    total = sum(map(len, texts))
    if total <= MAX_TEXT:
        return None
    start = max(texts, key=len)[:_VALUE_SHOWN]
    message = f"the turns have {total:,} characters, and at most {MAX_TEXT:,} are read; shorten the one that begins"
    return RowError("too_long", f"{message} {start!r}")


def _role_error(number: int, role: Any, expected: str) -> RowError:
    if role == SYSTEM:
        return RowError(
            "system_turn", f"turn {number} is from 'system', and the template has a system prompt of its own"
        )
    if role not in (HUMAN, ASSISTANT):
        return RowError("roles", f"turn {number} is from {show(role)}; roles are {HUMAN!r} and {ASSISTANT!r} in turn")
    return RowError("roles", f"turn {number} is from {show(role)}; turns alternate, so {expected!r} is due")


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def place_images(text: str, version: str, *, use_im_start_end: bool = False) -> str:
    """Write a turn's `<image>` as the template wants it.

    A single image goes to the front, on a line of its own; several stay where they stand. `<im_start>` and `<im_end>`
    that stand around an image already, as clients of the original write them, are not written twice.
    """
    if DEFAULT_IMAGE_TOKEN not in text:
        return text
    marked = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
    if use_im_start_end:
        text = text.replace(marked, DEFAULT_IMAGE_TOKEN)
    if text.count(DEFAULT_IMAGE_TOKEN) == 1:
        text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
    if "mmtag" in version:
        text = text.replace(DEFAULT_IMAGE_TOKEN, f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>")
    return text.replace(DEFAULT_IMAGE_TOKEN, marked) if use_im_start_end else text


def plain_question(text: str) -> str:
    """Return the question of the captioning template: its images, without their text.

    Raises:
        ValueError: if there is no image.
    """
    count = text.count(DEFAULT_IMAGE_TOKEN)
    if not count:
        raise ValueError(_NO_IMAGE.format(show(text)))
    return DEFAULT_IMAGE_TOKEN * count


def encode_segments(
    segments: Sequence[Segment], tokenizer: LlavaTokenizer, encode_text: Callable[..., list[int]] | None = None
) -> tuple[list[int], list[int]]:
    """Encode prompt segments to ids and labels, each image a placeholder that is never supervised."""
    encode_text = encode_text or tokenizer.encode_text
    input_ids = [tokenizer.bos_token_id] if tokenizer.add_bos_token else []
    labels = [IGNORE_INDEX] * len(input_ids)
    # legacy Llama tokenizers put a space after a special token, as they do at the start
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
