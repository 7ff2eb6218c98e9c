"""`Session`: a loaded model with tokenizer, image processor and prompt template; builds prompts, generates answers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from llava.clip_image_processor import CLIPPixels
from llava.constants import DEFAULT_TEMPLATE, FP8
from llava.conversation import Conversation, get_template
from llava.inference.chat.kv_cache import KVCacheFactory
from llava.inference.detokenizer import decode_answer
from llava.inference.prompts import PromptError, first_turn_ids
from llava.inference.sampler import Sampling, SeededDraws, draw_key
from llava.mm_utils import KeywordsStoppingCriteria, process_images
from llava.model.builder import load_checkpoint
from llava.model.checkpoint.loading_options import read_options
from llava.model.configuration import context_length
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.tokenization.llama_tokenizer import LlavaTokenizer

logger = logging.getLogger(__name__)


class Prompt(NamedTuple):
    """Model input.

    Attributes:
        input_ids: T of them, `IMAGE_TOKEN_INDEX` per image.
        pixel_values: N of them, each (3, height, width) or (tiles, 3, height, width).
    """

    input_ids: list[int]
    pixel_values: list[Tensor]


@dataclasses.dataclass(frozen=True)
class Session:
    """A loaded model, ready to answer.

    Attributes:
        tokenizer: of the model.
        model: in eval mode.
        image_processor: of the vision tower; None without one.
        template: empty conversation in the prompt template of the weights.
        context_length: positions of prompt and answer together, in tokens and image patches.
        kv_caches: creates the KV caches of chats; a new one is made if it belongs to another model.
        warned_limits: values of `max_new_tokens` whose reduction was logged.
    """

    tokenizer: LlavaTokenizer
    model: LlavaLlamaForCausalLM
    image_processor: CLIPPixels | None
    template: Conversation
    context_length: int
    kv_caches: KVCacheFactory | None = dataclasses.field(default=None, repr=False, compare=False)
    warned_limits: set[int] = dataclasses.field(default_factory=set, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kv_caches is None or self.kv_caches.model is not self.model:
            object.__setattr__(self, "kv_caches", KVCacheFactory(self.model))

    @classmethod
    def load(
        cls,
        model_path: str,
        model_base: str | None = None,
        *,
        bits: int | str = 16,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        vision_tower: str | None = None,
        use_flash_attn: bool = False,
        conv_mode: str | None = None,
    ) -> Session:
        """Load a checkpoint; arguments as in `load_pretrained_model`.

        Args:
            bits: 16, or 8 or 4 through bitsandbytes, or "fp8".
            conv_mode: prompt template; None = the one saved with the weights.

        Raises:
            FileNotFoundError: if a file is missing.
            ImportError: if bitsandbytes or flash-attn is needed and not installed.
            ValueError: if files or options contradict each other, or the template is unknown.
        """
        if bits not in (4, 8, 16, FP8):
            raise ValueError(f"bits is {bits!r}; choose 4, 8, 16 or {FP8!r}")
        if conv_mode is not None:
            get_template(conv_mode)  # raises for an unknown name before the weights are read
        options = read_options(
            {"dtype": dtype, "vision_tower": vision_tower, "load_fp8": bits == FP8},
            load_8bit=bits == 8,
            load_4bit=bits == 4,
            use_flash=use_flash_attn,
        )
        checkpoint, model = load_checkpoint(model_path, model_base, options, device_map="auto", device=device)
        saved = model.config.conversation_template or DEFAULT_TEMPLATE
        if conv_mode is not None and conv_mode != saved:
            logger.info("prompt template: %s, as requested; the one saved with the weights is %s", conv_mode, saved)
        template = get_template(conv_mode or saved)
        return cls(checkpoint.tokenizer, model, checkpoint.image_processor, template, context_length(model.config))

    def with_template(self, conv_mode: str | None) -> Session:
        """Return a session with another prompt template; None = the one saved with the weights.

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
        """Whether the stop text is not a token of its own, and must be searched for in the decoded answer."""
        marks = (*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab())
        return self.template.stop_text not in marks

    def prompt_ids(
        self, question: str, n_images: int = 0, *, encode_text: Callable[..., list[int]] | None = None
    ) -> list[int]:
        """Tokenize a question as in training, up to where the answer begins.

        Args:
            question: text; its `<image>` marks say where the images go, without any they go first.
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
        """Preprocess images of any mode, each to (3, height, width), or for "anyres" (tiles, 3, height, width).

        Raises:
            ImageError: as `process_images`.
            ValueError: if the model has no vision tower.
        """
        if not images:
            return []
        self.require_vision_tower()
        return [process_images([image], self.image_processor, self.model.config)[0] for image in images]

    def require_vision_tower(self) -> None:
        """Raise ValueError if the model has no vision tower, and so no images can be asked about."""
        if self.image_processor is None:
            raise ValueError("the model has no vision tower; ask without images, or pass --vision-tower")

    def prepare(self, question: str, images: Sequence[Image.Image] = (), *, max_new_tokens: int = 0) -> Prompt:
        """Build the model input of a question; thread-safe.

        Args:
            question: as in `prompt_ids`.
            images: of any mode, in order.
            max_new_tokens: longest answer, in tokens; 0 = none.

        Raises:
            PromptError: if the question is empty, marks another number of images, or fills the context.
            ValueError: if there are images and the model has no vision tower.
        """
        prompt = Prompt(self.prompt_ids(question, len(images)), self.pixel_values(images))
        self.answer_limit(self.spliced_length(prompt), max_new_tokens)
        return prompt

    def spliced_length(self, prompt: Prompt) -> int:
        """Return the length of a prompt after splicing, in tokens and image patches."""
        if not prompt.pixel_values:
            return len(prompt.input_ids)
        tower = self.model.get_vision_tower()
        patches = tower.num_patches + int(tower.select_feature == "cls_patch")
        tiles = sum(1 if pixels.ndim == 3 else len(pixels) for pixels in prompt.pixel_values)
        return len(prompt.input_ids) - len(prompt.pixel_values) + tiles * patches

    def answer_limit(self, length: int, max_new_tokens: int) -> int:
        """Return the most tokens that an answer may have: `max_new_tokens`, or fewer if the context leaves fewer.

        The first reduction of each `max_new_tokens` is logged.

        Args:
            length: of the prompt, in tokens and image patches.
            max_new_tokens: longest answer, in tokens; 0 = none.

        Raises:
            PromptError: if the prompt fills the context.
        """
        left = self.context_length - length
        if left < min(1, max_new_tokens):
            raise PromptError(
                "prompt_too_long",
                f"the prompt takes {length} tokens, which leaves nothing for an answer in the context of "
                f"{self.context_length}; shorten it",
            )
        if left < max_new_tokens and max_new_tokens not in self.warned_limits:
            self.warned_limits.add(max_new_tokens)
            logger.warning(
                "max_new_tokens is %d, but a prompt of %d tokens leaves %d in the context of %d: its answer ends there",
                max_new_tokens,
                length,
                left,
                self.context_length,
            )
        return min(max_new_tokens, left)

    def generate_ids(
        self, prompts: Sequence[Prompt], sampling: Sampling, request_ids: Sequence[Any] | None = None
    ) -> list[list[int]]:
        """Generate answers in one left-padded batch; beam searches that a batch could change run one by one.

        Args:
            prompts: from `prepare`.
            sampling: how tokens are chosen.
            request_ids: one JSON value per prompt, which with the seed decides its draws; None = the prompts' ids.

        Returns:
            per prompt the generated ids, including the one that ends the answer.
        """
        lengths = [self.spliced_length(prompt) for prompt in prompts]
        limits = [max(1, min(sampling.max_new_tokens, self.context_length - length)) for length in lengths]
        pairs = zip(prompts, request_ids or [None] * len(prompts), strict=True)
        request_ids = [prompt.input_ids if request_id is None else request_id for prompt, request_id in pairs]
        sampling = sampling.seeded()
        if sampling.num_beams > 1 and (sampling.temperature or len(set(limits)) > 1):
            return [self._beam_search(*row, sampling) for row in zip(prompts, limits, request_ids, strict=True)]
        found = self._generate(prompts, dataclasses.replace(sampling, max_new_tokens=max(limits)), request_ids)
        return [ids[:limit] for ids, limit in zip(found, limits, strict=True)]

    def _beam_search(self, prompt: Prompt, limit: int, request_id: Any, sampling: Sampling) -> list[int]:
        """Return the answer of a beam search over one prompt; above temperature 0 transformers samples the beams."""
        sampling = dataclasses.replace(sampling, max_new_tokens=limit)
        if sampling.temperature == 0:
            return self._generate([prompt], sampling, [request_id])[0]
        with torch.random.fork_rng():
            torch.manual_seed(draw_key(sampling.seed, request_id, 0) & (2**63 - 1))
            return self._generate([prompt], sampling, [request_id])[0]

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling, request_ids: Sequence[Any]) -> list[list[int]]:
        """Call transformers' `generate` on a left-padded batch."""
        length = max(len(prompt.input_ids) for prompt in prompts)
        input_ids = torch.zeros(len(prompts), length, dtype=torch.long)  # (B, T)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, -len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
            attention_mask[row, -len(prompt.input_ids) :] = 1
        device = self.model.device
        arguments = sampling.generation_arguments()
        if self.stops_on_text:
            no_prompt = input_ids[:, :0]  # `generate` passes only generated ids to its criteria
            criteria = KeywordsStoppingCriteria([self.template.stop_text], self.tokenizer, no_prompt)
            arguments["stopping_criteria"] = StoppingCriteriaList([criteria])
        if sampling.temperature and sampling.num_beams == 1:
            arguments["logits_processor"] = LogitsProcessorList([SeededDraws(sampling, request_ids)])
        stop_ids = self.stop_ids
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

    def answer_prompts(
        self, prompts: Sequence[Prompt], sampling: Sampling, request_ids: Sequence[Any] | None = None
    ) -> list[str]:
        """Return the clean answers to prompts from `prepare`, in one batch; arguments as in `generate_ids`."""
        return [self.decode(ids) for ids in self.generate_ids(prompts, sampling, request_ids)] if prompts else []


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Return ids up to and including the first stop id; padding follows it."""
    end = next((index + 1 for index, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
