"""Sampler of chat, batch inference and `eval_model`: greedy, temperature and top-p, reproducible per request.

Tokens are drawn by the exponential form of the Gumbel-max trick: argmax of p_i / e_i with e_i ~ Exp(1) is i with
probability p_i. The noise e_i is a hash of seed, request, step and token, so a draw does not depend on the batch it is
computed in, and a last-bit difference between logits changes it only where two tokens tie.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from llava.model.devices import send

ROWS_AT_ONCE = 256  # rows of logits per draw; bounds its memory
_MIXERS = (30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)  # shifts and factors of splitmix64, as int64
_LAST_SHIFT = 31
_TOKEN_STEP = -0x61C8864680B583EB  # 2**64 / golden ratio
_MANTISSA_BITS = 53


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Unlike in transformers, there is no default `top_k`.

    Attributes:
        temperature: 0 = the most likely token (greedy); above 0, tokens are sampled, more evenly the higher it is.
        top_p: sample among the most likely tokens that together have this probability; None = among all.
        num_beams: above 1, beam search.
        max_new_tokens: longest answer, in tokens; the context may leave less.
        seed: of the draws; None = a random one.

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
            raise ValueError(f"temperature is {self.temperature}; choose 0 (greedy) or a positive number")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; choose a probability above 0, at most 1")
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}; choose 1 (no beam search) or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; choose 1 or more")

    def generation_arguments(self) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`; without beams `SeededDraws` samples instead of it."""
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.temperature == 0 or self.num_beams == 1:
            return {**arguments, "do_sample": False}
        top_p = 1.0 if self.top_p is None else self.top_p
        return {**arguments, "do_sample": True, "temperature": self.temperature, "top_p": top_p, "top_k": 0}

    def seeded(self) -> Sampling:
        """Return these parameters with a seed, a random one if there is none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))


def draw_key(seed: int, request_id: Any, step: int) -> int:
    """Return the key of one draw, an int64.

    Args:
        seed: see `Sampling`.
        request_id: JSON value that distinguishes the request from others.
        step: tokens that the answer has so far.
    """
    digest = hashlib.sha256(f"{seed} {json.dumps(request_id)} {step}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def exponential_noise(keys: Tensor, vocabulary: int) -> Tensor:
    """Return Exp(1) noise above 0, the same on every device, (B,) int64 -> (B, W) float32.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014 (splitmix64).
    """
    mixed = keys[:, None] + _TOKEN_STEP * torch.arange(1, vocabulary + 1, device=keys.device)  # (B, W), wraps around
    for shift, factor in _MIXERS:
        mixed = (mixed ^ _shift_right(mixed, shift)) * factor
    mixed = mixed ^ _shift_right(mixed, _LAST_SHIFT)
    uniform = (_shift_right(mixed, 64 - _MANTISSA_BITS) + 1).to(torch.float32) * 2.0**-_MANTISSA_BITS  # in (0, 1]
    return -torch.log1p(-uniform)


def select_tokens(logits: Tensor, sampling: Sampling, keys: Sequence[int] | None) -> Tensor:
    """Return the next token of each sequence, (B, W) -> (B,), on the device.

    Args:
        logits: (B, W).
        sampling: temperature and top_p.
        keys: B of them, from `draw_key`; None at temperature 0.
    """
    if sampling.temperature == 0:
        return logits.float().argmax(dim=-1)
    sent = send(torch.tensor(keys, dtype=torch.int64), logits.device)
    parts = zip(logits.split(ROWS_AT_ONCE), sent.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([_draw(part, sampling, part_keys) for part, part_keys in parts])


class SeededDraws(LogitsProcessor):
    """Logits processor with which greedy search in transformers' `generate` returns the tokens of `select_tokens`.

    Args:
        sampling: with a seed, at a temperature above 0.
        request_ids: one per row, as in `draw_key`.
    """

    def __init__(self, sampling: Sampling, request_ids: Sequence[Any]) -> None:
        self._sampling, self._request_ids = sampling, request_ids
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores whose argmax is the drawn token, (B, W)."""
        keys = [draw_key(self._sampling.seed, request_id, self._step) for request_id in self._request_ids]
        self._step += 1
        tokens = select_tokens(scores, self._sampling, keys)
        return torch.zeros_like(scores).scatter_(-1, tokens[:, None], 1.0)


def _draw(logits: Tensor, sampling: Sampling, keys: Tensor) -> Tensor:
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        wide = ordered if ordered.device.type == "mps" else ordered.double()  # MPS has no float64
        is_beyond = wide.cumsum(-1) - wide >= sampling.top_p  # the most likely token always stays
        kept = ordered.masked_fill(is_beyond, 0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, kept)
    return (probabilities / exponential_noise(keys, logits.shape[-1])).argmax(dim=-1)


def _shift_right(values: Tensor, count: int) -> Tensor:
    """Shift int64 right, filling with zeros."""
    return (values >> count) & ((1 << (64 - count)) - 1)


class TokenScore(NamedTuple):
    """Log-probability of a chosen token, the likeliest other token, and that one's log-probability."""

    logprob: float
    runner_up: int
    runner_up_logprob: float


def score_tokens(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logprobs of tokens, and the runners-up with theirs, (B, W) and (B,) -> (B,) three times."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    others = logprobs.scatter(-1, tokens[:, None], float("-inf"))
    best, runner_up = others.max(-1)
    return chosen, runner_up, best
