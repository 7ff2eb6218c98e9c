"""Prompt templates: the exact text around questions and answers, as data, and the one function that assembles it.

A prompt is built as segments, each marked as supervised (an answer with its end mark) or not, so that training labels
and inference prompts come from the same place. Source: LLaVA-1.5's templates, text for text.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:  # for annotations: a prompt needs no Pillow
    from PIL import Image


class SeparatorStyle(Enum):
    """How turns are joined."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


class Segment(NamedTuple):
    """A stretch of prompt text.

    `supervised` marks what the model has to produce itself: an answer and the mark that ends it.
    """

    text: str
    supervised: bool


Message: TypeAlias = "str | tuple[str, Any, str] | None"


@dataclasses.dataclass
class Conversation:
    """A dialogue in one template: `append_message` adds turns, `get_prompt` gives the text.

    Attributes:
        system: text before the first turn.
        roles: name of the user, name of the assistant.
        messages: `[role, text]` pairs; the text is None where the model should answer. In place of a text there may
            be (text, image, mode), as Gradio clients have it.
        offset: number of leading messages that belong to the template.
        sep_style: how turns are joined.
        sep: ends a turn, or a user's turn where `sep2` differs.
        sep2: ends an assistant's turn.
        version: name of the prompt format used in training flags.
        skip_next: set and read by Gradio clients of the original.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[Message]]
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "unknown"
    skip_next: bool = False

    def append_message(self, role: str, message: Message) -> None:
        """Add a turn: its text, or (text, image, mode); None leaves the answer to the model."""
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """Return a dialogue that can grow without changing this one."""
        return dataclasses.replace(self, messages=[list(message) for message in self.messages])

    def get_prompt(self) -> str:
        """Return the whole dialogue as text, ending where the model goes on."""
        return "".join(segment.text for segment in self.segments())

    def get_images(self, return_pil: bool = False) -> list[Image.Image] | list[str]:
        """Return the images of `(text, image, mode)` messages, as the original's Gradio clients send them.

        Args:
            return_pil: images, instead of PNG files in base64.

        Raises:
            ValueError: if a mode is unknown.
        """
        return [self.process_image(image, mode, return_pil) for _, image, mode in self._messages_with_image()]

    def process_image(
        self, image: Image.Image, image_process_mode: str, return_pil: bool = False, **options: Any
    ) -> Image.Image | str:
        """Return an image as a client shows it; arguments and errors as in `show_image`."""
        from llava.image_files.resize import show_image  # imports Pillow

        return show_image(image, image_process_mode, return_pil=return_pil, **options)

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """Return `[question, answer]` pairs for Gradio's chatbot, images as HTML in front of their question."""
        pairs: list[list[str | None]] = []
        for index, (_, message) in enumerate(self.messages[self.offset :]):
            if index % 2:
                pairs[-1][1] = message
                continue
            if isinstance(message, tuple):
                text, image, _ = message
                data = self.process_image(image, "Default", image_format="JPEG")
                shown = f'<img src="data:image/jpeg;base64,{data}" alt="user upload image" />'
                message = shown + text.replace("<image>", "").strip()
            pairs.append([message, None])
        return pairs

    def dict(self) -> dict[str, Any]:
        """Return the dialogue as JSON can hold it, images left out."""
        texts = [[role, message[0] if isinstance(message, tuple) else message] for role, message in self.messages]
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": texts,
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }

    def _messages_with_image(self) -> Iterator[tuple[str, Image.Image, str]]:
        for _, message in self.messages[self.offset :]:
            if isinstance(message, tuple):
                yield message

    @property
    def stop_text(self) -> str:
        """Text that ends an answer in this template."""
        return self.sep if self.sep2 is None else self.sep2

    def segments(self) -> list[Segment]:
        """Return the prompt in order, split only where supervision starts and ends."""
        build = {
            SeparatorStyle.SINGLE: self._labelled_turns,
            SeparatorStyle.TWO: self._labelled_turns,
            SeparatorStyle.MPT: self._tagged_turns,
            SeparatorStyle.PLAIN: self._plain_turns,
            SeparatorStyle.LLAMA_2: self._instruction_turns,
        }[self.sep_style]
        runs = itertools.groupby(build(), key=lambda segment: segment.supervised)
        joined = [Segment("".join(segment.text for segment in run), supervised) for supervised, run in runs]
        return [segment for segment in joined if segment.text]

    def _turns(self) -> list[tuple[str, str | None]]:
        """Return roles and texts; the text is None where the model should answer.

        A dialogue that opens with (text, image, mode) has its image there, whatever the text says of it.
        """
        turns = [(role, _text_of(message)) for role, message in self.messages]
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return turns
        role, text = turns[0]
        question = str(text).replace("<image>", "").strip()
        if "mmtag" not in self.version:
            return [(role, f"<image>\n{question}"), *turns[1:]]
        shown = [(self.roles[0], "<Image><image></Image>"), (self.roles[1], "Received.")]
        return [*shown, (role, question or None), *turns[1:]]

    def _is_answer(self, role: str | None) -> bool:
        return role == self.roles[1]

    def _labelled_turns(self) -> Iterator[Segment]:
        """`SYSTEM USER: question ASSISTANT: answer</s>`."""
        ends = (self.sep, self.stop_text)
        yield Segment(self.system + self.sep, False)
        for index, (role, text) in enumerate(self._turns()):
            yield Segment(f"{role}:", False)
            if text is not None:
                yield Segment(f" {text}{ends[index % 2]}", self._is_answer(role))

    def _tagged_turns(self) -> Iterator[Segment]:
        """`<|im_start|>user\\nquestion<|im_end|>`; the tags are part of the role names."""
        yield Segment(self.system + self.sep, False)
        for role, text in self._turns():
            yield Segment(str(role), False)
            if text is not None:
                yield Segment(text + self.sep, self._is_answer(role))

    def _plain_turns(self) -> Iterator[Segment]:
        """Texts and separators only: image, caption."""
        yield Segment(self.system, False)
        for index, (_, text) in enumerate(self._turns()):
            if text is not None:
                yield Segment(text + (self.sep, self.stop_text)[index % 2], index % 2 == 1)

    def _instruction_turns(self) -> Iterator[Segment]:
        """`[INST] <<SYS>> ... question [/INST] answer </s><s>[INST] ...`."""
        system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
        for index, (role, text) in enumerate(self._turns()):
            if index == 0 and (text is None or role != self.roles[0]):
                raise ValueError(f"template {self.version!r}: the first message must be a text of {self.roles[0]!r}")
            if text is not None and index % 2 == 0:
                start = system if index == 0 else self.sep
                yield Segment(f"[INST] {start}{text} [/INST]" if index == 0 else f"{start}[INST] {text} [/INST]", False)
            elif text is not None:
                yield Segment(f" {text} {self.sep2}", True)


def _text_of(message: Message) -> str | None:
    """Return the text of a message; None where there is none yet.

    Raises:
        TypeError: if it is neither text nor a tuple that starts with one.
    """
    text = message[0] if isinstance(message, tuple) and message else message
    if isinstance(text, str):
        return text if text or isinstance(message, tuple) else None
    if not message:
        return None
    raise TypeError(f"a message is {type(message).__name__}; use a text, (text, image, mode) or None")


_POLITE = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_CURIOUS_USER = "A chat between a curious user and an artificial intelligence assistant. "
_CURIOUS_HUMAN = "A chat between a curious human and an artificial intelligence assistant. "
_MMTAG = (
    _CURIOUS_USER
    + "The assistant is able to understand the visual content that the user provides, and assist the user "
    "with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_V0_EXAMPLE = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of "
    "time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the "
    "other hand, are finite and will eventually be depleted, such as coal, oil, and natural gas. Here are "
    "some key differences between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy "
    "sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, and "
    "other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have "
    "lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
    "locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
    "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social instability.\n",
)

_CHATML_ROLES = ("<|im_start|>user\n", "<|im_start|>assistant\n")
_V0_ROLES = ("Human", "Assistant")
_V1_ROLES = ("USER", "ASSISTANT")
_INST_ROLES = ("USER", "ASSISTANT")
_SINGLE, _TWO, _MPT, _PLAIN, _LLAMA_2 = SeparatorStyle

conv_vicuna_v1 = Conversation(_CURIOUS_USER + _POLITE.format("user"), _V1_ROLES, [], 0, _TWO, " ", "</s>", "v1")
conv_llava_v0 = Conversation(_CURIOUS_HUMAN + _POLITE.format("human"), _V0_ROLES, [], 0, _SINGLE, "###", None, "v0")
_EXAMPLE = [[role, text] for role, text in zip(_V0_ROLES, _V0_EXAMPLE, strict=True)]
conv_vicuna_v0 = dataclasses.replace(conv_llava_v0, messages=_EXAMPLE, offset=len(_EXAMPLE))
conv_llava_v1 = Conversation(_CURIOUS_HUMAN + _POLITE.format("human"), _V1_ROLES, [], 0, _TWO, " ", "</s>", "v1")
conv_llava_v0_mmtag = Conversation(_MMTAG, _V0_ROLES, [], 0, _SINGLE, "###", None, "v0_mmtag")
conv_llava_v1_mmtag = Conversation(_MMTAG, _V1_ROLES, [], 0, _TWO, " ", "</s>", "v1_mmtag")
conv_llava_plain = Conversation("", ("", ""), [], 0, _PLAIN, "\n", None, "plain")
conv_llama_2 = Conversation(_LLAMA_2_SYSTEM, _INST_ROLES, [], 0, _LLAMA_2, "<s>", "</s>", "llama_v2")
conv_llava_llama_2 = Conversation(_LLAVA_LLAMA_2_SYSTEM, _INST_ROLES, [], 0, _LLAMA_2, "<s>", "</s>", "llama_v2")
conv_mistral_instruct = Conversation("", _INST_ROLES, [], 0, _LLAMA_2, "", "</s>", "llama_v2")
conv_chatml_direct = Conversation(
    "<|im_start|>system\nAnswer the questions.", _CHATML_ROLES, [], 0, _MPT, "<|im_end|>", None, "mpt"
)
conv_mpt = Conversation(_MPT_SYSTEM, _CHATML_ROLES, [], 0, _MPT, "<|im_end|>", None, "mpt")

default_conversation = conv_vicuna_v1

conv_templates: dict[str, Conversation] = {
    "default": conv_vicuna_v0,
    "v0": conv_vicuna_v0,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llama_2": conv_llama_2,
    "mistral_instruct": conv_mistral_instruct,
    "chatml_direct": conv_chatml_direct,
    "mistral_direct": conv_chatml_direct,
    "plain": conv_llava_plain,
    "v0_plain": conv_llava_plain,
    "llava_v0": conv_llava_v0,
    "v0_mmtag": conv_llava_v0_mmtag,
    "llava_v1": conv_llava_v1,
    "v1_mmtag": conv_llava_v1_mmtag,
    "llava_llama_2": conv_llava_llama_2,
    "mpt": conv_mpt,
}


def get_template(name: str) -> Conversation:
    """Return a fresh dialogue in the named template.

    Raises:
        ValueError: if there is no such template.
    """
    if name not in conv_templates:
        raise ValueError(f"unknown conversation template {name!r}; choose one of {', '.join(sorted(conv_templates))}")
    return conv_templates[name].copy()
