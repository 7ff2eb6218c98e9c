"""How far two models differ: the same prompts and pictures, logits and greedy answers compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_TEMPLATE
from llava.conversation import get_template
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import attach_adapter, build_model
from llava.model.checkpoint import Checkpoint
from llava.model.devices import default_dtype, free_memory
from llava.model.streaming import stream_model
from llava.tokenization import LlavaTokenizer

QUESTIONS = ("What is in the picture?", "Is there a person?", "How many things are there?", "What color is the sky?")
ANSWER_TOKENS = 8
_ROOM = 1.3  # of a model's weights, for what it computes


class Probe(NamedTuple):
    """What a model says to one question: logits (S, W) fp32 on the CPU, ids of its greedy answer."""

    logits: Tensor
    answer: list[int]


class Parity(NamedTuple):
    """Largest absolute difference of logits, largest logit, and share of equal greedy answers (0..1)."""

    logit_difference: float
    logit_scale: float
    greedy_agreement: float


@torch.no_grad()
def probe_model(
    model: nn.Module,
    tokenizer: LlavaTokenizer,
    template: str,
    *,
    device: torch.device,
    questions: Sequence[str] = QUESTIONS,
    answer_tokens: int = ANSWER_TOKENS,
) -> list[Probe]:
    """Ask a model a few questions about pictures of noise, the same at every call.

    Args:
        model: a `LlavaLlamaForCausalLM`, or one wrapped by peft.
        tokenizer: of the model.
        template: of its prompts.
        device: where it computes.
        questions: to be asked.
        answer_tokens: longest answer, in tokens.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    tower = inner.get_vision_tower()
    side = tower.config.image_size
    probes = []
    for seed, question in enumerate(questions):
        dialogue = get_template(template)
        dialogue.append_message(dialogue.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
        dialogue.append_message(dialogue.roles[1], None)
        input_ids = tokenizer_image_token(dialogue.get_prompt(), tokenizer, return_tensors="pt")[None]
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
        inputs = {"input_ids": input_ids.to(device), "images": pixels.to(device, tower.dtype)}
        logits = model(**inputs, use_cache=False).logits[0].float().cpu()
        answer = [int(logits[-1].argmax())]
        if answer_tokens > 1:
            answer = inner.generate(**inputs, do_sample=False, max_new_tokens=answer_tokens)[0].tolist()
        probes.append(Probe(logits, answer))
    return probes


class Prober:
    """Asks checkpoints the same questions, in memory where there is room, else with the weights left in their files.

    Streamed weights are read anew for every step, so one question and the first word of its answer must do then.

    Args:
        weight_bytes: of the models, in the dtype that `device` computes in.
        device: where they compute.
    """

    def __init__(self, weight_bytes: int, device: torch.device) -> None:
        self.device = device
        self.is_streamed = weight_bytes * _ROOM > free_memory(device)
        self.questions = QUESTIONS[:1] if self.is_streamed else QUESTIONS
        self.answer_tokens = 1 if self.is_streamed else ANSWER_TOKENS

    def ask(self, checkpoint: Checkpoint, *, adapter_directory: str | None = None, bits: int = 16) -> list[Probe]:
        """Return what a checkpoint answers.

        Args:
            checkpoint: from `open_checkpoint`; without the adapter's products if `adapter_directory` is given.
            adapter_directory: LoRA directory computed beside the weights, by peft.
            bits: of the LLM's weights; below 16 it has to fit into memory.
        """
        if self.is_streamed:
            model = stream_model(checkpoint, self.device, default_dtype(self.device), adapter_directory)
        else:
            model = build_model(checkpoint, device=self.device, bits=bits).eval()
            model = attach_adapter(model, adapter_directory) if adapter_directory else model
        template = checkpoint.config.conversation_template or DEFAULT_TEMPLATE
        return probe_model(
            model,
            checkpoint.tokenizer,
            template,
            device=self.device,
            questions=self.questions,
            answer_tokens=self.answer_tokens,
        )


def compare_probes(first: Sequence[Probe], second: Sequence[Probe]) -> Parity:
    """Return how far two models' answers to the same questions differ."""
    pairs = list(zip(first, second, strict=True))
    return Parity(
        logit_difference=max((one.logits - other.logits).abs().max().item() for one, other in pairs),
        logit_scale=max(one.logits.abs().max().item() for one, _ in pairs),
        greedy_agreement=sum(one.answer == other.answer for one, other in pairs) / len(pairs),
    )
