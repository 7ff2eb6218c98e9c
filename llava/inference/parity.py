"""Parity of two models: difference of their logits and greedy answers on the same prompts and images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_TEMPLATE
from llava.conversation import get_template
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import attach_adapter, build_model
from llava.model.checkpoint.checkpoint import Checkpoint
from llava.model.devices import free_memory
from llava.tokenization.llama_tokenizer import LlavaTokenizer

QUESTIONS = ("What is in the image?", "Is there a person?", "How many things are there?", "What color is the sky?")
ANSWER_TOKENS = 8
ROUNDINGS = 16  # units of the dtype's epsilon; random models of 8 to 40 layers differ by 2 to 4 after a merge
SUMMATION = 1e-4  # of the largest logit, for another order of fp32 sums; ten times what was measured
_ROOM = 1.3  # memory needed, in sizes of the weights; the rest is for activations


class Probe(NamedTuple):
    """A model's logits for one prompt, (S, W) fp32 on the CPU, and the ids of its greedy answer."""

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
) -> list[Probe]:
    """Run a model on a few questions about images of noise, the same at every call.

    Args:
        model: a `LlavaLlamaForCausalLM`, or one wrapped by peft.
        tokenizer: of the model.
        template: of its prompts.
        device: where it computes.
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
        inputs = {"input_ids": input_ids.to(device), "images": pixels.to(device, tower.dtype)}
        logits = model(**inputs, use_cache=False).logits[0].float().cpu()
        answer = inner.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)[0].tolist()
        probes.append(Probe(logits, answer))
    return probes


def fits_in_memory(weight_bytes: int, device: torch.device) -> bool:
    """Tell whether a device has room for a model's weights and for what it computes."""
    return weight_bytes * _ROOM <= free_memory(device)


def probe_checkpoint(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    adapter_directory: str | Path | None = None,
    mm_projector: str | Path | None = None,
) -> list[Probe]:
    """Load a checkpoint and return what it answers.

    Args:
        checkpoint: from `open_checkpoint`; without the adapter's products if `adapter_directory` is given.
        device: where it computes.
        adapter_directory: LoRA directory computed beside the weights, by peft.
        mm_projector: see `open_checkpoint`.
    """
    model = build_model(checkpoint, device=device).eval()
    model = attach_adapter(model, adapter_directory, mm_projector) if adapter_directory else model
    template = checkpoint.config.conversation_template or DEFAULT_TEMPLATE
    return probe_model(model, checkpoint.tokenizer, template, device=device)


def rounding_bound(logit_scale: float, *dtypes: torch.dtype) -> float:
    """Return the largest difference of logits that rounding explains.

    Args:
        logit_scale: largest logit.
        dtypes: that weights were rounded to, and that both models computed in.
    """
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return logit_scale * (ROUNDINGS * coarsest + SUMMATION)


def compare_probes(first: Sequence[Probe], second: Sequence[Probe]) -> Parity:
    """Return the parity of two models from their probes of the same questions."""
    pairs = list(zip(first, second, strict=True))
    return Parity(
        logit_difference=max((one.logits - other.logits).abs().max().item() for one, other in pairs),
        logit_scale=max(one.logits.abs().max().item() for one, _ in pairs),
        greedy_agreement=sum(one.answer == other.answer for one, other in pairs) / len(pairs),
    )
