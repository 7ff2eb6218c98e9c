"""How far two models differ: the same prompts and pictures, logits and greedy answers compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import get_template
from llava.mm_utils import tokenizer_image_token
from llava.tokenization import LlavaTokenizer

QUESTIONS = ("What is in the picture?", "Is there a person?", "How many things are there?", "What color is the sky?")
ANSWER_TOKENS = 8


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
def probe_model(model: nn.Module, tokenizer: LlavaTokenizer, template: str) -> list[Probe]:
    """Ask a loaded model a few questions about pictures of noise, the same at every call.

    Args:
        model: a `LlavaLlamaForCausalLM`, or one wrapped by peft.
        tokenizer: of the model.
        template: of its prompts.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    tower = inner.get_vision_tower()
    side = tower.config.image_size
    probes = []
    for seed, question in enumerate(QUESTIONS):
        dialogue = get_template(template)
        dialogue.append_message(dialogue.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
        dialogue.append_message(dialogue.roles[1], None)
        input_ids = tokenizer_image_token(dialogue.get_prompt(), tokenizer, return_tensors="pt")[None]
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
        inputs = {"input_ids": input_ids.to(inner.device), "images": pixels.to(inner.device, tower.dtype)}
        logits = model(**inputs).logits[0].float().cpu()
        answer = inner.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        probes.append(Probe(logits, answer[0].tolist()))
    return probes


def compare_probes(first: Sequence[Probe], second: Sequence[Probe]) -> Parity:
    """Return how far two models' answers to the same questions differ."""
    pairs = list(zip(first, second, strict=True))
    return Parity(
        logit_difference=max((one.logits - other.logits).abs().max().item() for one, other in pairs),
        logit_scale=max(one.logits.abs().max().item() for one, _ in pairs),
        greedy_agreement=sum(one.answer == other.answer for one, other in pairs) / len(pairs),
    )
