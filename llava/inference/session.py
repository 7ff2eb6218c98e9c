"""One object that owns prompts and generation: `Session`. Batch runs, single calls and the chat all ask through it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteriaList

from llava.constants import DEFAULT_TEMPLATE
from llava.conversation import Conversation, get_template
from llava.image_processing import CLIPPixels
from llava.inference.answer_text import decode_answer
from llava.inference.dialogue_cache import DialogueCaches
from llava.inference.prompts import PromptError, first_turn_ids
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images
from llava.model.builder import load_pretrained_model
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.tokenization import LlavaTokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are chosen. Unlike in transformers, no `top_k` is applied unasked.

    Attributes:
        temperature: 0 = the most likely token each time (greedy); above, chosen by chance, the more evenly the higher.
        top_p: only among the likeliest tokens that together have this probability; None = among all.
        num_beams: above 1, beam search.
        max_new_tokens: longest answer, in tokens.
        seed: makes chance repeatable; None = another result each time.

    Raises:
        ValueError: if a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 128
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; choose 0 (the likeliest answer) or a positive number")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; choose a probability above 0, at most 1")
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}; choose 1 (no beam search) or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; choose 1 or more")

    def generation_arguments(self) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`."""
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.temperature == 0:
            return {**arguments, "do_sample": False}
        top_p = 1.0 if self.top_p is None else self.top_p
        return {**arguments, "do_sample": True, "temperature": self.temperature, "top_p": top_p, "top_k": 0}


class Request(NamedTuple):
    """A question and its pictures, in the order of its `<image>` marks if it has any."""

    question: str
    images: Sequence[Image.Image] = ()


class Prompt(NamedTuple):
    """What the model takes: ids with `IMAGE_TOKEN_INDEX` per image, and one (3, H, W) or (tiles, 3, H, W) per image."""

    input_ids: list[int]
    pixel_values: list[Tensor]


@dataclasses.dataclass(frozen=True)
class Session:
    """A model with everything needed to ask it.

    Attributes:
        tokenizer: of the model.
        model: in eval mode.
        image_processor: of the model's image encoder; None without one.
        template: empty dialogue in the prompt template of the weights.
        context_length: tokens of prompt, image patches and answer together.
        dialogues: opens what chats keep; replaced where it is not the model's.
    """

    tokenizer: LlavaTokenizer
    model: LlavaLlamaForCausalLM
    image_processor: CLIPPixels | None
    template: Conversation
    context_length: int
    dialogues: DialogueCaches | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dialogues is None or self.dialogues.model is not self.model:
            object.__setattr__(self, "dialogues", DialogueCaches(self.model))

    @classmethod
    def load(
        cls,
        model_path: str,
        model_base: str | None = None,
        *,
        bits: int = 16,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        vision_tower: str | None = None,
        use_flash_attn: bool = False,
        conv_mode: str | None = None,
    ) -> Session:
        """Load a model directory; arguments as in `load_pretrained_model`.

        Args:
            bits: 16, or 8 or 4 through bitsandbytes.
            conv_mode: prompt template; None = the one saved with the weights.

        Raises:
            FileNotFoundError: if a file is missing.
            ImportError: if bitsandbytes or flash-attn is needed and not installed.
            ValueError: if files or options don't fit each other, or the template is unknown.
        """
        if bits not in (4, 8, 16):
            raise ValueError(f"bits is {bits}; choose 4, 8 or 16")
        if conv_mode is not None:
            get_template(conv_mode)  # an unknown name is refused before the weights are read
        tokenizer, model, image_processor, _ = load_pretrained_model(
            model_path,
            model_base,
            get_model_name_from_path(model_path),
            load_8bit=bits == 8,
            load_4bit=bits == 4,
            device=device,
            use_flash_attn=use_flash_attn,
            dtype=dtype,
            vision_tower=vision_tower,
        )
        saved = model.config.conversation_template or DEFAULT_TEMPLATE
        if conv_mode is not None and conv_mode != saved:
            logger.info("prompt template: %s, as asked for; the weights say %s", conv_mode, saved)
        template = get_template(conv_mode or saved)
        return cls(tokenizer, model, image_processor, template, model.config.max_position_embeddings)

    def with_template(self, conv_mode: str | None) -> Session:
        """Return the same model under another prompt template; None = the one saved with the weights.

        Raises:
            ValueError: if the template is unknown.
        """
        name = conv_mode or self.model.config.conversation_template or DEFAULT_TEMPLATE
        return dataclasses.replace(self, template=get_template(name))

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: `</s>`, and the template's stop text where that is a token of its own."""
        ends = {self.tokenizer.eos_token_id}
        if not self.stops_on_text:
            ends.add(self.tokenizer.convert_tokens_to_ids(self.template.stop_text))
        return sorted(ends)

    @property
    def stops_on_text(self) -> bool:
        """Whether the stop text has to be looked for in the answer's text."""
        marks = (*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab())
        return self.template.stop_text not in marks

    def prompt_ids(
        self, question: str, n_images: int = 0, *, encode_text: Callable[..., list[int]] | None = None
    ) -> list[int]:
        """Return the ids of a question, up to where the model answers, as in training.

        Args:
            question: text; its `<image>` marks say where the images go, without any they go in front.
            n_images: number of images.
            encode_text: as in `first_turn_ids`.

        Raises:
            PromptError: if the question is empty or marks another number of images.
        """
        return first_turn_ids(
            question,
            n_images,
            self.template,
            self.tokenizer,
            use_im_start_end=self.model.config.mm_use_im_start_end,
            encode_text=encode_text,
        )

    def pixel_values(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Return one (3, H, W), or for "anyres" (tiles, 3, H, W), tensor per picture.

        Raises:
            ValueError: if the model has no image encoder.
        """
        if not images:
            return []
        if self.image_processor is None:
            raise ValueError("the model has no image encoder; ask without images, or pass --vision-tower")
        return [process_images([image], self.image_processor, self.model.config)[0] for image in images]

    def prepare(self, question: str, images: Sequence[Image.Image] = (), *, max_new_tokens: int = 0) -> Prompt:
        """Turn a question into what the model takes; safe to call in several threads.

        Args:
            question: as in `prompt_ids`.
            images: its pictures.
            max_new_tokens: room to leave for the answer, in tokens.

        Raises:
            PromptError: if the question is empty, marks another number of images, or does not fit the context.
            ValueError: if there are images and the model has no image encoder.
        """
        prompt = Prompt(self.prompt_ids(question, len(images)), self.pixel_values(images))
        self.check_length(self.spliced_length(prompt), max_new_tokens)
        return prompt

    def spliced_length(self, prompt: Prompt) -> int:
        """Return the positions a prompt takes, in tokens and image patches."""
        if not prompt.pixel_values:
            return len(prompt.input_ids)
        tower = self.model.get_vision_tower()
        patches = tower.num_patches + int(tower.select_feature == "cls_patch")
        tiles = sum(1 if pixels.ndim == 3 else len(pixels) for pixels in prompt.pixel_values)
        return len(prompt.input_ids) - len(prompt.pixel_values) + tiles * patches

    def check_length(self, length: int, max_new_tokens: int) -> None:
        """Refuse what does not fit the context.

        Raises:
            PromptError: if `length` and `max_new_tokens` together are more than the model's positions.
        """
        if length + max_new_tokens > self.context_length:
            raise PromptError(
                "prompt_too_long",
                f"the prompt takes {length} tokens and the answer up to {max_new_tokens}, more than the context of "
                f"{self.context_length}; shorten the question or lower max_new_tokens",
            )

    def generate_ids(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
        """Answer prompts in one batch, left-padded.

        Returns:
            per prompt the generated ids, up to and with the one that ends the answer.
        """
        length = max(len(prompt.input_ids) for prompt in prompts)
        input_ids = torch.zeros(len(prompts), length, dtype=torch.long)  # (B, T)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, length - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
            attention_mask[row, length - len(prompt.input_ids) :] = 1
        device = self.model.device
        arguments = sampling.generation_arguments()
        if self.stops_on_text:
            nothing = input_ids[:, :0]  # generate() hands the generated ids alone to its criteria
            criteria = KeywordsStoppingCriteria([self.template.stop_text], self.tokenizer, nothing)
            arguments["stopping_criteria"] = StoppingCriteriaList([criteria])
        stop_ids = self.stop_ids
        with _seeded(sampling.seed if sampling.temperature else None):
            output = self.model.generate(
                input_ids.to(device),
                images=[pixels for prompt in prompts for pixels in prompt.pixel_values],
                attention_mask=attention_mask.to(device),
                eos_token_id=stop_ids,
                pad_token_id=self.tokenizer.eos_token_id,
                use_cache=True,
                **arguments,
            )  # (B, new tokens)
        return [_until_stop(ids, stop_ids) for ids in output.tolist()]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the clean text of an answer's ids."""
        return decode_answer(ids, self.tokenizer, self.template.stop_text)

    def answer_prompts(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """Return the clean answers to prepared prompts, in one batch."""
        return [self.decode(ids) for ids in self.generate_ids(prompts, sampling)] if prompts else []

    def answer_batch(self, requests: Sequence[Request], sampling: Sampling | None = None) -> list[str]:
        """Return the clean answers to several questions, in one batch.

        Args:
            requests: questions with any number of pictures each, none included.
            sampling: None = greedy.

        Raises:
            ValueError: as `prepare`.
        """
        sampling = sampling or Sampling()
        prompts = [
            self.prepare(request.question, request.images, max_new_tokens=sampling.max_new_tokens)
            for request in requests
        ]
        return self.answer_prompts(prompts, sampling)


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Return ids up to and with the first one that ends an answer; behind it there is only padding."""
    end = next((index + 1 for index, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Make chance repeatable inside the block and leave it undisturbed outside."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
