"""From logits to the next token, for many answers at once, each with chance of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from llava.inference.session import Sampling
from llava.model.devices import send


def chance(seed: int, question_id: int | str, step: int) -> float:
    """Return the number in [0, 1) that decides a token of an answer, whatever else is computed.

    Args:
        seed: of the run.
        question_id: of the question.
        step: tokens that the answer has already.
    """
    digest = hashlib.sha256(f"{seed} {question_id!r} {step}".encode()).digest()
    return (int.from_bytes(digest[:7], "big") >> 4) / 2**52


def select_tokens(logits: Tensor, sampling: Sampling, chances: Sequence[float] | None) -> Tensor:
    """Return the next token of each answer, (M, W) -> (M,).

    Args:
        logits: of the model.
        sampling: greedy if the temperature is 0.
        chances: one number in [0, 1) per answer, from `chance`; not needed for greedy.
    """
    if sampling.temperature == 0:
        return logits.float().argmax(dim=-1)
    probabilities, order = torch.sort((logits.float() / sampling.temperature).softmax(-1), descending=True, stable=True)
    below = probabilities.double().cumsum(-1) - probabilities  # of all likelier tokens
    if sampling.top_p is not None:
        probabilities = probabilities.masked_fill(below >= sampling.top_p, 0)  # the first always stays
    reached = probabilities.double().cumsum(-1)
    threshold = send(torch.tensor(chances, dtype=torch.float64), logits.device)[:, None] * reached[:, -1:]
    place = (reached <= threshold).sum(-1, keepdim=True)
    return order.gather(-1, place)[:, 0]


def score_tokens(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logprobs of tokens, and the likeliest others with theirs, (M, W) and (M,) -> (M,) three times."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    others = logprobs.scatter(-1, tokens[:, None], float("-inf"))
    best, runner_up = others.max(-1)
    return chosen, runner_up, best
