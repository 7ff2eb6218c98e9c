"""From one LLaVA record's dialogue to token ids and labels, built together, segment by segment.

Source: LLaVA-1.5's `preprocess_v1`, `preprocess_llama_2`, `preprocess_plain` and `preprocess_multimodal`; the results
are equal, except that no row is ever masked as a whole because two ways of counting its tokens disagreed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def encode_example(
    conversations: Sequence[Mapping[str, str]],
    template: str | Conversation,
    tokenizer: LlavaTokenizer,
    *,
    use_im_start_end: bool = False,
) -> tuple[list[int], list[int]]:
    """Return the ids and labels of one record.

    Args:
        conversations: turns `{"from": "human" | "gpt", "value": text}`, alternating; an opening of the assistant
            before the first question is left out, as in the original.
        template: name of a prompt template, or an empty dialogue in it.
        tokenizer: of the model that is trained.
        use_im_start_end: put `<im_start>` and `<im_end>` around each image.

    Returns:
        input_ids with `IMAGE_TOKEN_INDEX` in the place of each image, and labels of the same length: the id where the
        model has to produce it (answers and what ends them), else `IGNORE_INDEX`.

    Raises:
        ValueError: if the turns don't alternate, a turn is empty or no object, or nothing is supervised.
    """
    dialogue = build_dialogue(conversations, template, use_im_start_end=use_im_start_end)
    input_ids, labels = encode_segments(dialogue.segments(), tokenizer)
    if all(label == IGNORE_INDEX for label in labels):
        raise ValueError("the dialogue has no answer, so there is nothing to learn from it")
    return input_ids, labels


def build_dialogue(
    conversations: Sequence[Mapping[str, str]], template: str | Conversation, *, use_im_start_end: bool = False
) -> Conversation:
    """Put a record's turns into a template; arguments and errors as in `encode_example`."""
    dialogue = get_template(template) if isinstance(template, str) else template.copy()
    is_plain = dialogue.sep_style is SeparatorStyle.PLAIN
    if is_plain:  # trained without the line break that the prompt has between image and caption
        dialogue.sep, dialogue.sep2 = "", dialogue.stop_text
    turns = list(conversations)
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {index + 1} is no object with 'from' and 'value'")
    if turns and turns[0].get("from") == ASSISTANT:
        turns = turns[1:]
    for index, turn in enumerate(turns):
        expected = (HUMAN, ASSISTANT)[index % 2]
        if turn.get("from") != expected:
            raise ValueError(f"turn {index + 1} is from {turn.get('from')!r}; turns alternate, so {expected!r} is due")
        text = turn.get("value")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"turn {index + 1}, from {expected!r}, is empty")
        if is_plain and expected == HUMAN:
            text = plain_question(text)
        else:
            text = place_images(text, dialogue.version, use_im_start_end=use_im_start_end)
        dialogue.append_message(dialogue.roles[index % 2], text)
    return dialogue


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
        raise ValueError(f"template 'plain' describes images, but the question {text!r} has no {DEFAULT_IMAGE_TOKEN}")
    return DEFAULT_IMAGE_TOKEN * count


def encode_segments(segments: Sequence[Segment], tokenizer: LlavaTokenizer) -> tuple[list[int], list[int]]:
    """Encode prompt segments to ids and labels, each image a placeholder that is never supervised."""
    input_ids = [tokenizer.bos_token_id] if tokenizer.add_bos_token else []
    labels = [IGNORE_INDEX] * len(input_ids)
    special_ids = set(tokenizer.all_special_ids)
    at_start = True
    for segment in segments:
        for index, text in enumerate(segment.text.split(DEFAULT_IMAGE_TOKEN)):
            if index:
                input_ids.append(IMAGE_TOKEN_INDEX)
                labels.append(IGNORE_INDEX)
                at_start = True
            if not text:
                continue
            ids = tokenizer.encode_text(text, at_start=at_start)
            input_ids += ids
            labels += ids if segment.supervised else [IGNORE_INDEX] * len(ids)
            # legacy Llama tokenizers put a space behind a special token, as they do at the start
            at_start = tokenizer.legacy and ids[-1] in special_ids
    return input_ids, labels
